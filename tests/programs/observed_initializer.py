"""Run the storage initializer with a reader that checks the volume before every operation on a file.

Prints every distinct observation at the end: the problems of a visible snapshot, or `nothing`.
"""

import sys
import threading
from pathlib import Path

from storage_initializer.cli.main import main
from tests.storage_initializer.conftest import problems


def run(volume: Path) -> int:
    """Run the program on its own arguments."""
    observations: set[str] = set()
    reading = threading.local()

    def observe(event: str, _: tuple[object, ...]) -> None:
        if event.startswith(("open", "os.")) and not vars(reading):
            reading.now = True
            snapshots = [path for path in volume.glob("*--*/*") if path.name != "refs"]
            observations.update([str(problems(path)) for path in snapshots] or ["nothing"])
            del reading.now

    sys.addaudithook(observe)
    code = main()
    sys.stdout.write("\n".join(sorted(observations)) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[-1])))
