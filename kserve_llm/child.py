"""A child process that ends with this one."""

import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the end of a service, and a closed terminal."""


class Child:
    """One child process at a time; a signal that stops this process sends it SIGTERM.

    As a context, it handles the signals from before a child starts until after it has ended: whenever one arrives, it
    reaches the child. A child has a session of its own, so that the terminal does not send it Ctrl-C as well.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._signal: int | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Child":
        for number in STOP_SIGNALS:
            # `nohup` ignores SIGHUP, and a shell's background jobs ignore Ctrl-C.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            # Once is enough: a second signal would abort what the first one lets it finish.
            if not self.is_stopped:
                self._process.terminate()
            self._process.wait()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has arrived."""
        return self._signal is not None

    @property
    def is_running(self) -> bool:
        """Whether the child has not ended yet."""
        return self._process is not None and self._process.poll() is None

    def start(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start a child, unless a signal has arrived."""
        self._process = None
        if not self.is_stopped:
            self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        # The signal may have arrived while it was started.
        if self.is_stopped and self._process is not None:
            self._process.terminate()

    def wait(self) -> int:
        """Return the exit code of the child; as in a shell, 128 and the number of the signal that ended it."""
        if self._process is None:
            return 128 + (self._signal or 0)
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def _stop(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        if self._process is not None:
            self._process.terminate()
