"""Interface of a transformers tokenizer, as far as it is used here."""

from typing import Any, Protocol


class Tokenizer(Protocol):
    """Methods and attributes used of a transformers tokenizer."""

    chat_template: Any
    all_special_ids: list[int]

    def __len__(self) -> int: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...  # noqa: D102
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...  # noqa: D102
    def apply_chat_template(  # noqa: D102
        self, conversation: list[Any], *, tools: list[Any] | None, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...
