"""Run the storage initializer repeatedly, each time with a crash at the next file operation.

Usage: crash_points.py ROOT REFERENCE. The n-th run publishes to ROOT/<n> and exits before its n-th fsync, rename,
unlink or rmdir. The program ends after the first run without a crash. Runs are forks, so that imports are paid once.
"""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage_initializer.cli.main import main

CRASHED = 86
OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir")


def crash_before(count: int) -> None:
    """Make the process exit before its n-th file operation, from any thread."""
    remaining, lock = count, threading.Lock()

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal remaining
            with lock:
                remaining -= 1
                if remaining == 0:
                    os._exit(CRASHED)
            return operation(*arguments, **options)

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))


def run(root: Path, reference: str) -> None:
    """Fork a run for each crash point."""
    count = 0
    exit_code = CRASHED
    while exit_code == CRASHED:
        count += 1
        child = os.fork()
        if child == 0:
            crash_before(count)
            os._exit(main([reference, str(root / str(count))]))
        _, status = os.waitpid(child, 0)
        exit_code = os.waitstatus_to_exitcode(status)
    sys.exit(exit_code)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
