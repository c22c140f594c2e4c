"""The program: arguments to exit code, signals, and the last line on stderr."""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from storage_initializer import settings
from storage_initializer.cli import arguments, commands, output
from storage_initializer.errors import InitializerError, Stopped, explain

_SHUTDOWN_SECONDS = 2.0
"""Time for an orderly shutdown, which usually takes half a second. After it, another signal ends the
program at once."""

log = logging.getLogger("storage_initializer")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 on success, 1 if a retry may succeed, 2 if it cannot. On failure the last line on stderr is the reason.
    """
    signals = _Signals()
    try:
        signals.install()
        error = _run(sys.argv[1:] if words is None else words)
        signals.ignore()
    except _Signalled as signalled:
        error = Stopped(str(signalled))
    return _fail(error) if error else 0


def run_and_exit() -> NoReturn:
    """Run the program and end the process at once, with all threads that still wait for the network.

    `sys.exit` would join the threads of libraries for as long as the Hub keeps them. Nothing is lost: files are flushed
    and the lease is released before `main` returns.
    """
    exit_code = main()
    for stream in (sys.stdout, sys.stderr):
        # The reader of the stream may have exited.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def _run(words: Sequence[str]) -> InitializerError | None:
    """Run the command and return its error, so that a signal may arrive while it is reported."""
    try:
        command = arguments.parse(words)
        loaded = settings.load(command.overrides if isinstance(command, arguments.Publish) else {})
        output.configure(loaded)
        commands.run(command, loaded)
    except Exception as error:
        log.debug("cause:", exc_info=True)
        return explain(error)
    return None


def _fail(error: InitializerError) -> int:
    """Write the reason as the last line, unformatted: KServe copies it into the InferenceService's status."""
    # Abandoned threads may still log, and this must be the last line.
    logging.disable()
    sys.stderr.write(f"{settings.redact(str(error))}\n")
    sys.stderr.flush()
    return error.exit_code


class _Signalled(BaseException):
    """SIGTERM or Ctrl-C. Not an `Exception`, so that no `except Exception` swallows it."""


class _Signals:
    """Signal handling: the first SIGTERM or Ctrl-C raises `_Signalled` in the main thread, which releases the lease.

    Later signals (`timeout` sends two at once) are ignored during the shutdown. If it takes too long because the volume
    hangs, another signal ends the program without releasing the lease, which then becomes stale.
    """

    def __init__(self) -> None:
        self._ending_since: float | None = None
        self._reason = ""

    def install(self) -> None:
        """Install the handlers. Ctrl-C stays ignored if the shell ignores it."""
        signal.signal(signal.SIGTERM, self._handle)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._handle)

    def ignore(self) -> None:
        """Ignore signals from now on: the outcome is final."""
        self._ending_since = time.monotonic()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._ending_since is None:
            self.ignore()
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            self._reason = f"Stopped by {name}. Run the same command again to resume."
            raise _Signalled(self._reason)
        if self._reason and time.monotonic() - self._ending_since > _SHUTDOWN_SECONDS:
            # Not through sys.stderr, whose lock the interrupted code may hold.
            with contextlib.suppress(OSError):
                os.write(2, f"{self._reason}\n".encode())
            os._exit(Stopped.exit_code)
