"""The composition root: settings -> model -> server. `python -m predictor --served_model_name NAME --model_dir DIR`."""

import os
import sys

from predictor import settings
from predictor.errors import StartupError


def main() -> int:
    """Serve until told to end; the exit code."""
    try:
        read = settings.read(sys.argv[1:])
        # kserve parses argv when it is imported, and would take our flags for abbreviations of its own.
        del sys.argv[1:]
        from predictor.entrypoints import lifecycle
        from predictor.entrypoints.kserve_model import Predictor
        from predictor.observability import logging

        logging.configure(read.log_level, read.log_format)
        serving = lifecycle.Server(Predictor(read), read)
        serving.run()
        if serving.still_working:
            # Python's own end, under a thread that is deep inside torch, aborts the process.
            logging.shutdown()
            os._exit(0)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
