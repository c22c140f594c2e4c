"""Run the storage initializer and kill it after a number of complete files of a variant.

Usage: killed_initializer.py FILES [ARGUMENT ...]
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from storage_initializer.volume import layout

if __name__ == "__main__":
    remaining = int(sys.argv.pop(1))
    complete = layout.complete

    def complete_or_die(staging: Path, path: str) -> None:
        global remaining
        remaining -= "int8-cpu" in staging.name
        if remaining < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        complete(staging, path)

    layout.complete = complete_or_die
    runpy.run_module("storage_initializer", run_name="__main__", alter_sys=True)
