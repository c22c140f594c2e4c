"""Start the server: `python -m predictor --served_model_name NAME --model_dir DIR`."""

import logging
import os
import sys

from predictor import settings
from predictor.errors import RankFailed, StartupError
from predictor.resources import openmp


def main() -> int:
    """Serve until a signal and return the exit code."""
    try:
        parsed = settings.read(sys.argv[1:])
        # KServe parses sys.argv when it is imported and would take our flags for abbreviations of its own.
        del sys.argv[1:]
        openmp.limit_spinning()
        from predictor.entrypoints import lifecycle
        from predictor.observability.logging import configure

        configure(parsed.log_level, parsed.log_format)
        if lifecycle.run(parsed):
            # Python's own exit aborts the process while a thread runs inside torch.
            logging.shutdown()
            os._exit(0)
    except RankFailed as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        logging.shutdown()
        # As above: threads may wait for a rank that hangs.
        os._exit(error.exit_code)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
