"""Settings of all tests: command line, SIGINT, Hypothesis profiles, garbage collection, and workers."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

LONGEST = [
    f"tests/{module}.py"
    for module in (
        "predictor/entrypoints/test_ranks",
        "predictor/entrypoints/test_ray_cluster",
        "predictor/models/test_sharding",
        "predictor/entrypoints/test_process",
        "predictor/entrypoints/test_drain",
        "benchmarks/test_gpu_check",
        "clients/test_clients",
        "storage_initializer/volume/test_crash_recovery",
        "e2e/test_demo",
        "predictor/engine/test_engine",
        "predictor/engine/test_speculative_step",
        "predictor/kernels/test_csrc",
        "monitoring/test_prometheus",
        "predictor/entrypoints/http/test_schema_properties",
        "predictor/devices/test_devices",
        "benchmarks/test_coldstart",
        "e2e/test_cluster",
    )
]
"""Modules that take longest. They are started first, so that no worker is left with one at the end."""

# kserve parses argv when it is imported, and would take pytest's flags for abbreviations of its own.
del sys.argv[1:]

# A shell ignores SIGINT in background jobs, which the programs under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadlines: examples must not fail on a busy machine. HYPOTHESIS_PROFILE=nightly runs many more examples.
_COMMON = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", parent=_COMMON, max_examples=30, derandomize=True)
settings.register_profile("nightly", parent=_COMMON, max_examples=1200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest modules first."""
    items.sort(key=lambda item: _rank(item.nodeid.partition("::")[0]))


def _rank(module: str) -> int:
    return LONGEST.index(module) if module in LONGEST else len(LONGEST)


def pytest_collection_finish() -> None:
    """Leave what exists by now, mostly modules, out of later garbage collections: each engine that stops has one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A temporary folder that all workers of the run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent
