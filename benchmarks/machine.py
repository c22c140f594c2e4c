"""What a measurement ran on: CPU, its vector instructions, memory, and the versions that decide speed."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from devtools.paths import ROOT

ISA_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
"""Flags of /proc/cpuinfo that kernels for language models use."""
PACKAGES = ("torch", "transformers", "kserve")


def facts() -> dict[str, Any]:
    """Return the facts about this machine and this checkout."""
    cpu = _cpuinfo(Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "isa": [flag for flag in ISA_FLAGS if flag in cpu.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "revision": _revision(),
    }


def _cpuinfo(text: str) -> dict[str, str]:
    """Return the fields of the first CPU."""
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _revision() -> str | None:
    """Return the commit that is checked out; None outside of a Git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
