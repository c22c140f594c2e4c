"""Compiles what of the predictor is in C when the package is built, on the platform that it is for, if there is a C compiler.

Without, nothing is missing but speed: the predictor says which kernels it uses.
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

SOURCES, LIBRARY = ("predictor/int8.c", "predictor/paged.c"), "predictor/libnative.so"
INSTRUCTIONS = "-mfma -mavx512f -mavx512bw -mavx512vl -mavx512vnni -mamx-tile -mamx-int8"
"""What no CPU is used for before it was asked."""
FLAGS = f"-std=gnu11 -O3 -fno-math-errno {INSTRUCTIONS} -fopenmp -fPIC".split()


class NativeLibrary(BuildHookInterface):
    """Hatch's hook."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Put the library beside its sources, and into the wheel."""
        del version
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return
        compiler = os.environ.get("CC", "cc")
        root = Path(self.root)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                compiled = [str(Path(scratch, Path(source).stem + ".o")) for source in SOURCES]
                for source, to in zip(SOURCES, compiled, strict=True):
                    _run([compiler, *FLAGS, "-c", str(root / source), "-o", to])
                # Without OpenMP's runtime: torch brings one, and two would each have threads.
                _run([compiler, "-shared", *compiled, "-o", str(root / LIBRARY)])
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            self.app.display_warning(f"{LIBRARY} is not compiled, and 8 bits will be slower on a CPU: {said.strip()}")
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(platform_tags())}"


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
