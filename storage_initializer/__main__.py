"""The program: argv in, an exit code out, whatever happens. Signals and the last line on stderr are here."""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from storage_initializer.cli import commands, output
from storage_initializer.errors import InitializerError, Stopped
from storage_initializer.settings import concealed, read

_PATIENCE_SECONDS = 2.0
"""How long the way out may take before one more signal cuts it short; as a rule it takes half a second."""

log = logging.getLogger("storage_initializer")


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line asks for.

    Returns:
        0 when all is done, 1 when another try may help, 2 when it cannot; then the last line on stderr is the reason.
    """
    signals = _Signals()
    try:
        signals.listen()
        error = _run(words)
        signals.leave()
    except _Signalled as signalled:
        error = Stopped(str(signalled))
    return _fail(error) if error else 0


def _run(words: Sequence[str] | None) -> InitializerError | None:
    """All of it, but signals; the failure is a value, so that a signal may come while it is told."""
    try:
        command, settings = read(words)
        output.configure(settings)
        commands.run(command, settings)
    except InitializerError as error:
        log.debug("the cause:", exc_info=True)
        return error
    except Exception as error:
        log.debug("the cause:", exc_info=True)
        return InitializerError(
            f"unexpected {type(error).__name__} ({error}): run again with LOG_LEVEL=DEBUG and report it"
        )
    return None


def _fail(error: InitializerError) -> int:
    """Write the reason as the last line, and bare: KServe copies it into the status of the InferenceService."""
    # Threads that were left behind may still want to tell something, and this is the last line.
    logging.disable()
    sys.stderr.write(f"{concealed(str(error))}\n")
    sys.stderr.flush()
    return error.exit_code


def _leave(exit_code: int) -> NoReturn:
    """End the program at once, with whatever threads still wait for the network.

    Not by `sys.exit`: the interpreter would wait for those that libraries have started, for as long as a Hub likes to
    keep them. Files need no farewell: what matters was brought to the disk, and the lease is free, before `main` ends.
    """
    for stream in (sys.stdout, sys.stderr):
        # Nobody may be listening any more.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


class _Signalled(BaseException):
    """SIGTERM or Ctrl-C, as one sentence. Not an `Exception`: no `except Exception` on its way may swallow it."""


class _Signals:
    """The first SIGTERM or Ctrl-C raises `_Signalled`, in the main thread, and so frees the lease on its way out.

    That takes about half a second, and later signals (`timeout` sends two at once) must not disturb it. Where it takes
    longer, since the volume hangs, one more signal ends the program without: the lease will be found stale.
    """

    def __init__(self) -> None:
        self._left: float | None = None
        self._reason = ""

    def listen(self) -> None:
        """From now on. Ctrl-C stays ignored where the shell has said so."""
        signal.signal(signal.SIGTERM, self._hear)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._hear)

    def leave(self) -> None:
        """The outcome stands: no signal changes it any more."""
        self._left = time.monotonic()

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self._left is None:
            self.leave()
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            self._reason = f"stopped by {name}: run the same command again to go on"
            raise _Signalled(self._reason)
        if self._reason and time.monotonic() - self._left > _PATIENCE_SECONDS:
            # Past sys.stderr, whose lock the interrupted code may hold.
            with contextlib.suppress(OSError):
                os.write(2, f"{self._reason}\n".encode())
            os._exit(Stopped.exit_code)


if __name__ == "__main__":
    _leave(main())
