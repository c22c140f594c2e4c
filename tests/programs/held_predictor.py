"""Run the predictor with a model whose forward passes block or fail on order; see `tests/predictor/servers.py`.

The last argument is the file with the order, the others are flags of the predictor.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from predictor.__main__ import main

order = Path(sys.argv.pop())
flags, sys.argv[1:] = sys.argv[1:], []

from predictor.engine import causal_lm, engine  # noqa: E402, KServe parses sys.argv when it is imported
from predictor.models import loader  # noqa: E402

load = loader.load
engine.STOP_TIMEOUT_SECONDS = 1.0
# A model that fails on order is on a device that computes no more.
causal_lm.is_device_lost = lambda model: True  # noqa: ARG005, the parameter of the original


def read_order() -> str:
    """Return the order; "" without one."""
    try:
        return order.read_text()
    except FileNotFoundError:
        return ""


def obey(*_: Any) -> None:
    """Read the order before a forward pass."""
    while command := read_order():
        if command == "fail":
            raise RuntimeError("the device is gone")
        time.sleep(0.02)
        if command == "slow":
            break


def load_and_hook(*args: Any, **options: Any) -> Any:
    """Load the model as usual."""
    loaded = load(*args, **options)
    loaded.model.register_forward_pre_hook(obey)
    return loaded


loader.load = load_and_hook
sys.argv[1:] = flags
sys.exit(main())
