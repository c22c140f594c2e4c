"""Create the tracing that the flags configure, and print which of its modules are loaded."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from predictor import settings

parsed = settings.read(sys.argv[1:])
del sys.argv[1:]

from predictor.entrypoints import lifecycle  # noqa: E402, KServe parses sys.argv when it is imported

lifecycle.create_tracing(parsed)
modules = ("predictor.observability.tracing", "opentelemetry.sdk", "opentelemetry.exporter")
print(*(name for name in modules if name in sys.modules))  # noqa: T201
