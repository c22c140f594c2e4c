"""How much the largest tests do."""

import os

IS_NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
"""Whether tests run at their full sizes, as every night; otherwise the slow tests would take twice as long."""
