"""Settings of all tests: command line, SIGINT, Hypothesis profiles, garbage collection, and workers."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of a module in one worker, so that its models and servers are started once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def pytest_collection_finish() -> None:
    """Leave what exists by now, mostly modules, out of later garbage collections: each engine that stops has one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A temporary folder that all workers of the run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent
