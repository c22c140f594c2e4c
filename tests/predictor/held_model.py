"""Models whose forward passes slow down, block or fail on order: see `servers.Orders`."""

import time
from pathlib import Path
from typing import Any

from predictor.engine import causal_lm, engine
from predictor.models import loader


def install(order: Path) -> None:
    """Make every model that this process loads from now on read the order in this file before a forward pass."""
    load = loader.load
    engine.STOP_TIMEOUT_SECONDS = 1.0
    # A model that fails on order is on a device that computes no more.
    causal_lm.is_device_lost = lambda model: True  # noqa: ARG005, the parameter of the original

    def obey(*_: Any) -> None:
        while command := _read(order):
            if command == "fail":
                raise RuntimeError("the device is gone")
            time.sleep(0.02)
            if command == "slow":
                break

    def load_and_hook(*args: Any, **options: Any) -> Any:
        loaded = load(*args, **options)
        loaded.model.register_forward_pre_hook(obey)
        return loaded

    loader.load = load_and_hook


def _read(order: Path) -> str:
    """Return the order; "" without one."""
    try:
        return order.read_text()
    except FileNotFoundError:
        return ""
