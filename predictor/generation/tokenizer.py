"""Interface of a transformers tokenizer, as far as it is used here."""

from collections.abc import Mapping
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Text to token ids and back."""

    all_special_ids: list[int]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...  # noqa: D102
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...  # noqa: D102


class PromptTokenizer(Tokenizer, Protocol):
    """The same, with the vocabulary."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: Any

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...  # noqa: D102


class TextEncoding(Protocol):
    """Tokens of a text or pair."""

    is_fast: bool

    def __getitem__(self, name: str) -> list[int]: ...
    def get(self, name: str) -> list[int] | None: ...  # noqa: D102
    def sequence_ids(self) -> list[int | None]: ...  # noqa: D102


class TextTokenizer(Protocol):
    """Texts, and pairs of them, to tokens with all that the model takes."""

    def __call__(self, *texts: str) -> TextEncoding: ...  # noqa: D102


class ChatTokenizer(Protocol):
    """Chats to text."""

    chat_template: Any

    def get_response_parser(  # noqa: D102
        self, response_template: dict[str, Any], *, prefix: str
    ) -> object: ...
    def parse_response(  # noqa: D102
        self, response: str, schema: dict[str, Any], *, prefix: str, tools: list[Any]
    ) -> dict[str, Any]: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...  # noqa: D102
    def get_chat_template(self, chat_template: str | None = None, tools: list[Any] | None = None) -> str: ...  # noqa: D102
    def apply_chat_template(  # noqa: D102
        self,
        conversation: list[Any],
        *,
        tools: list[Any] | None,
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool,
        continue_final_message: bool,
        **variables: Any,
    ) -> str: ...
