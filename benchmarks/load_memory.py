"""Print anonymous memory before and after loading 8-bit weights, and the peak, in bytes; for `benchmarks.weights`."""

import re
import sys
import threading
from pathlib import Path

from benchmarks import weights

POLL_SECONDS = 0.002


def anonymous_bytes() -> int:
    """Return the anonymous resident memory of this process."""
    match = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    if match is None:
        raise OSError("/proc/self/status has no RssAnon.")
    return int(match[1]) * 1024


def main() -> None:
    """Load the model directory given as the first argument, and print the three figures."""
    before = peak = anonymous_bytes()
    done = threading.Event()

    def poll() -> None:
        nonlocal peak
        while not done.wait(POLL_SECONDS):
            peak = max(peak, anonymous_bytes())

    poller = threading.Thread(target=poll)
    poller.start()
    loaded = weights.load(Path(sys.argv[1]), "8bit")
    after = anonymous_bytes()
    done.set()
    poller.join()
    print(before, after, max(after, peak))
    del loaded


if __name__ == "__main__":
    main()
