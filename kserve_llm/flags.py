"""Flags of the predictor that the command passes on."""

from collections.abc import Sequence


def value(flags: Sequence[str], name: str) -> str | None:
    """Return the value of `--name value` or `--name=value`; None if the flag is not among these."""
    found = None
    for index, word in enumerate(flags):
        flag, equals, text = word.partition("=")
        if flag.replace("-", "_") == f"__{name}":
            found = text if equals else "".join(flags[index + 1 : index + 2])
    return found
