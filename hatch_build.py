"""Compiles what of the predictor is in C when the wheel is built, on its platform, if there is a C compiler.

Without, nothing is missing but speed, and the predictor's log says so.
"""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

SOURCES = ("predictor/kernels/csrc/gemm_int8.c", "predictor/kernels/csrc/paged_attention.c")
LIBRARY = "predictor/kernels/cpu/libnative.so"
FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fPIC", "-fopenmp"]
INSTRUCTIONS = ["-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mamx-tile", "-mamx-int8"]
"""Every CPU gets the same code, which asks it first."""


class NativeLibrary(BuildHookInterface):
    """Hatch's hook."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Put the library beside its sources, and into the wheel."""
        del version
        sources, library = [Path(self.root, name) for name in SOURCES], Path(self.root, LIBRARY)
        # What lies there may be older than the sources, or for another platform. A process that has it open keeps it.
        library.unlink(missing_ok=True)
        # The storage initializer's image is built without the predictor.
        if not sources[0].is_file() or (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return
        try:
            _compile(sources, library)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            self.app.display_warning(f"{LIBRARY} is not compiled, and a CPU will be slower: {said.strip()}")
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(platform_tags())}"


def _compile(sources: list[Path], library: Path) -> None:
    compiler = os.environ.get("CC") or "cc"
    with tempfile.TemporaryDirectory() as scratch:
        objects = [Path(scratch, f"{source.stem}.o") for source in sources]
        commands = [
            [compiler, *FLAGS, *INSTRUCTIONS, "-c", source, "-o", to]
            for source, to in zip(sources, objects, strict=True)
        ]
        # OpenMP's runtime is not linked: torch brings one, and two would each have threads.
        for command in (*commands, [compiler, "-shared", *objects, "-o", library]):
            subprocess.run(command, check=True, capture_output=True, text=True)
