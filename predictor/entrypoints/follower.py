"""Process of a follower: `python -m predictor.entrypoints.follower`, started by `ranks` with its part on stdin.

Rank 0 alone receives signals, and ends its followers. They end with rank 0, however it ends.
"""

import ctypes
import json
import logging
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""As in linux/prctl.h."""

logger = logging.getLogger(__name__)


def main() -> None:
    """Follow rank 0; the exit code is 0 if rank 0 has ended the work, or knows why it cannot begin."""
    start = json.load(sys.stdin)
    _end_with(start["parent"])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    from predictor.errors import RankFailed
    from predictor.generation import follower
    from predictor.kernels.tensor_parallel import Rank
    from predictor.observability.logging import configure
    from predictor.settings import Settings

    settings, rank = Settings(**start["settings"]), Rank(**start["rank"])
    configure(settings.log_level, settings.log_format, rank.number)
    exit_code = 0
    try:
        follower.follow(settings, rank)
    except RankFailed as failed:
        logger.info("ended: %s", failed)  # rank 0 raises it, too
    except Exception:
        logger.exception("rank %d failed", rank.number)
        exit_code = 1
    logging.shutdown()
    # Python's own exit would wait for a step that waits for other ranks.
    os._exit(exit_code)


def _end_with(parent: int) -> None:
    """End this process when the thread that started it does; elsewhere than on Linux, when its connection breaks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
