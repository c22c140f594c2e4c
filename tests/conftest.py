"""Settings of all tests: command line, SIGINT and Hypothesis profiles."""

import os
import signal
import sys

from hypothesis import HealthCheck, settings

# kserve parses argv when it is imported, and would take pytest's flags for abbreviations of its own.
del sys.argv[1:]

# A shell ignores SIGINT in background jobs, which the programs under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadlines: examples must not fail on a busy machine. HYPOTHESIS_PROFILE=nightly runs many more examples.
_COMMON = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", parent=_COMMON, max_examples=30, derandomize=True)
settings.register_profile("nightly", parent=_COMMON, max_examples=1200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
