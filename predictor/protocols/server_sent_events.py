"""Server-sent events with JSON."""

import json
from collections.abc import Mapping
from typing import Any


def encode_event(content: Mapping[str, Any], name: str | None = None) -> str:
    """Return a complete event, with a name if the protocol has such."""
    # ASCII only: some clients also treat Unicode's line separators as ends of lines.
    data = f"data: {json.dumps(content, allow_nan=False, separators=(',', ':'))}\n\n"
    return data if name is None else f"event: {name}\n{data}"
