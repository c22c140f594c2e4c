"""Hatch build hook that compiles the predictor's C kernels into the wheel.

Without a C compiler the wheel is built without them. The predictor then logs a warning and uses torch's kernels.
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

SOURCES = "predictor/kernels/csrc"
LIBRARY = "predictor/kernels/cpu/libnative.so"
FLAGS = ["-std=gnu11", "-O3", "-Wall", "-Wextra", "-fno-math-errno", "-fPIC", "-fopenmp"]
INSTRUCTIONS = ["-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mamx-tile", "-mamx-int8"]
"""Every x86-64 CPU gets the same library; `cpu_isa` selects the kernels at run time."""


class NativeLibrary(BuildHookInterface):
    """Hatch build hook."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library into the package and add it to the wheel."""
        del version
        sources, library = sorted(Path(self.root, SOURCES).glob("*.c")), Path(self.root, LIBRARY)
        # An existing file may be stale or for another platform. Processes that have it open keep it.
        library.unlink(missing_ok=True)
        # The storage initializer's image is built without the predictor.
        if not sources or (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return
        try:
            compile_library(sources, library)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            self.app.display_warning(f"{LIBRARY} is not compiled, CPU inference will be slower: {reason.strip()}")
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(platform_tags())}"


def compile_library(sources: list[Path], library: Path) -> None:
    """Compile `sources` with `$CC`, by default `cc`."""
    compiler = os.environ.get("CC") or "cc"
    with tempfile.TemporaryDirectory() as scratch:
        objects = [Path(scratch, f"{source.stem}.o") for source in sources]
        commands = [
            [compiler, *FLAGS, *INSTRUCTIONS, "-c", source, "-o", target]
            for source, target in zip(sources, objects, strict=True)
        ]
        # The OpenMP runtime is not linked, because torch loads one. A second one would start threads as well.
        for command in (*commands, [compiler, "-shared", *objects, "-o", library]):
            subprocess.run(command, check=True, capture_output=True, text=True)
