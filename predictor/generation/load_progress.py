"""How far the load of a model is, and the time until it is ready: from the last load, else from this one."""

import json
import logging
import math
import time
from pathlib import Path

logger = logging.getLogger(__name__)


class LoadProgress:
    """Progress of one load; written by its thread, read by any.

    Args:
        time_file: keeps the duration of the last load; None: no estimate before the weights are read.
    """

    def __init__(self, time_file: Path | None = None) -> None:
        self._time_file = time_file
        self._snapshot = ""
        self._started: float | None = None
        self._weights_started: float | None = None
        self._weights_fraction: float | None = None
        self._last_seconds: float | None = None
        """Duration of the last load of the same snapshot."""

    def start(self, snapshot: Path) -> None:
        """Begin to load a snapshot."""
        self._snapshot = str(snapshot)
        self._last_seconds = self._read()
        self._started = time.monotonic()

    def report_weights(self, fraction: float) -> None:
        """Set the fraction of the weights that is loaded, 0 to 1."""
        if self._weights_started is None:
            self._weights_started = time.monotonic()
        self._weights_fraction = fraction

    def finish(self) -> None:
        """Save the duration."""
        if self._started is None or self._time_file is None:
            return
        content = {"snapshot": self._snapshot, "seconds": round(time.monotonic() - self._started, 3)}
        new = self._time_file.with_name(f"{self._time_file.name}.new")
        try:
            new.write_text(json.dumps(content))
            new.replace(self._time_file)
        except OSError as error:
            logger.warning("the duration of the load is not saved: %s", error)

    @property
    def weights_percent(self) -> int | None:
        """Percentage of the weights' tensors that are loaded; None before and after."""
        fraction = self._weights_fraction
        return math.floor(fraction * 100) if fraction is not None and fraction < 1 else None

    @property
    def seconds_left(self) -> float | None:
        """Expected time until the load ends; None if it is unknown, as before the snapshot is found."""
        if self._started is None:
            return None
        elapsed = time.monotonic() - self._started
        if self._last_seconds is not None and elapsed < self._last_seconds:
            return self._last_seconds - elapsed
        if self._weights_started is None or not self._weights_fraction or self._weights_fraction == 1:
            return None
        per_fraction = (time.monotonic() - self._weights_started) / self._weights_fraction
        return per_fraction * (1 - self._weights_fraction)

    def _read(self) -> float | None:
        if self._time_file is None:
            return None
        try:
            content = json.loads(self._time_file.read_text())
            return float(content["seconds"]) if content["snapshot"] == self._snapshot else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("the duration of the last load cannot be read from %s: %s", self._time_file, error)
            return None
