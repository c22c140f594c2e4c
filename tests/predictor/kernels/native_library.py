"""Builds of the C sources for tests."""

import ast
import fcntl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from devtools.paths import ROOT
from predictor.kernels.cpu import ops

CSRC = ROOT / "predictor" / "kernels" / "csrc"
EMULATED_AMX = ["-include", str(Path(__file__).with_name("emulated_amx.h"))]
"""Compiler flags that replace AMX instructions by plain C."""


def flags() -> list[str]:
    """Compiler flags of the build hook, whose own imports exist only while a wheel is built."""
    tree = ast.parse((ROOT / "hatch_build.py").read_text())
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return [*ast.literal_eval(constants["FLAGS"]), *ast.literal_eval(constants["INSTRUCTIONS"])]


def load_with_emulated_amx(directory: Path) -> Any:
    """Load the library with emulated AMX instructions, compiled into `directory` by the first process that needs it."""
    target = directory / "libemulated_amx.so"
    sources = map(str, sorted(CSRC.glob("*.c")))
    with (directory / "libemulated_amx.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            # Optimizing the emulation takes longer than it saves.
            command = ["gcc", *flags(), "-O1", "-Werror", *EMULATED_AMX, "-shared", *sources, "-o", str(target)]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ops, "LIBRARY", target)
        library, error = ops._load()
    assert library is not None, error
    return library
