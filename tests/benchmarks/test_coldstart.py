import subprocess
import sys
from pathlib import Path

import pytest

from devtools.paths import ROOT


@pytest.mark.slow
def test_coldstart_reports_phases(tiny_model: Path) -> None:
    words = ["benchmarks.coldstart", "--model_dir", str(tiny_model), "--quantization", "8bit", "--repetitions", "1"]
    process = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for word in ("imports", "x the imports", "tokenizer", "weights", "pack", "warm_up"):
        assert word in process.stdout
