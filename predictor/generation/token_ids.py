"""Check token ids: a tokenizer may have tokens for which the model has no embedding."""

from collections.abc import Mapping, Sequence

from predictor.errors import InvalidRequest


def check(token_ids: Sequence[int], where: str, vocabulary_tokens: int, unembedded_tokens: Mapping[int, str]) -> None:
    """Check that a model has an embedding for each token.

    Args:
        token_ids: of a client, or of a text.
        where: the part of the request that has them, for the message.
        vocabulary_tokens: rows of the input embedding; token ids are below it.
        unembedded_tokens: by id, the tokenizer's tokens for which the model has no embedding.

    Raises:
        InvalidRequest: it has none for an id.
    """
    unknown = next((token_id for token_id in token_ids if not 0 <= token_id < vocabulary_tokens), None)
    if unknown is not None:
        token = unembedded_tokens.get(unknown)
        named = f"{unknown}" if token is None else f"{unknown}, {token!r}; remove it"
        raise InvalidRequest(f"Unknown token id in {where}: {named}. This model's are 0 to {vocabulary_tokens - 1}.")
