"""Calls as models write them."""

from collections.abc import Sequence

from predictor.generation.call_envelope import CallEnvelope


def write(envelope: CallEnvelope, calls: Sequence[tuple[str, str]]) -> str:
    """Return calls, as name and JSON of the arguments, in their envelope."""
    texts = [
        envelope.before_name + name + envelope.before_arguments + arguments + envelope.after_arguments
        for name, arguments in calls
    ]
    return envelope.begin + envelope.between_calls.join(texts) + envelope.end
