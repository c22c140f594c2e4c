"""Write log lines of our own loggers and of libraries; the argument is the log format."""

import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from predictor.observability import logging as predictor_logging

log_format = "json" if sys.argv.pop() == "json" else "text"

import kserve.logging  # noqa: E402, KServe parses sys.argv when it is imported

predictor_logging.configure("INFO", log_format)  # type: ignore[arg-type]
kserve.logging.configure_logging()
logging.getLogger("predictor.model").debug("a debug line")
for name in ("predictor.model", "kserve", "kserve.trace", "uvicorn.access", "uvicorn.error", "httpx"):
    for level in (logging.INFO, logging.WARNING):
        logging.getLogger(name).log(level, "a line")
logging.getLogger("ContinuousBatchingLogger").info("a line")
logging.getLogger("ContinuousBatchingLogger").warning("a line")
warnings.warn("old", FutureWarning, stacklevel=1)
if logging.getLogger("uvicorn.access").hasHandlers():
    logging.getLogger("predictor.model").error("uvicorn creates access lines")
