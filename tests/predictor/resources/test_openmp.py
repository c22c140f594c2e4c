import os
import subprocess
import sys

import pytest

from devtools.paths import ROOT
from predictor.resources import openmp

START = """
import sys, types
import predictor.__main__ as program

def run(settings):
    import torch

sys.modules["predictor.entrypoints.lifecycle"] = types.SimpleNamespace(run=run)
sys.argv[1:] = ["--model_dir", "."]
program.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings another OpenMP runtime")
def test_server_limits_the_active_waiting_of_threads() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in openmp.VARIABLES}
    server = subprocess.run(
        [sys.executable, "-c", START],
        cwd=ROOT,
        env=environment | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert f"GOMP_SPINCOUNT = '{openmp.SPIN_COUNT}'" in server.stderr


@pytest.mark.parametrize("variable", openmp.VARIABLES)
def test_environment_has_priority_over_the_limit_of_active_waiting(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in openmp.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "set")
    openmp.limit_spinning()
    assert {name: os.environ.get(name) for name in openmp.VARIABLES if name != variable} == dict.fromkeys(
        set(openmp.VARIABLES) - {variable}
    )
