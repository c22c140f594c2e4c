"""Compiles `predictor/int8.c` when the wheel is built, on the platform that it is for, if there is a C compiler.

Without, nothing is missing but speed: the predictor says which kernels it uses.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

SOURCE, LIBRARY = "predictor/int8.c", "predictor/libint8.so"
# Every CPU gets the same code, which asks it first. OpenMP's runtime is not linked: torch brings one.
FLAGS = "-O3 -std=gnu11 -fno-math-errno -fPIC -fopenmp"
INSTRUCTIONS = "-mfma -mavx512f -mavx512bw -mavx512vl -mavx512vnni -mamx-tile -mamx-int8"


class Int8Library(BuildHookInterface):
    """Hatch's hook."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Put the library beside its source, and into the wheel."""
        del version
        # What lies there may be older than the source, or for another platform. A process that has it open keeps it.
        Path(self.root, LIBRARY).unlink(missing_ok=True)
        # The storage initializer's image is built without the predictor.
        if not Path(self.root, SOURCE).is_file() or (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return
        compiler, compiled = os.environ.get("CC") or "cc", f"{LIBRARY}.o"
        try:
            for arguments in (
                [*FLAGS.split(), *INSTRUCTIONS.split(), "-c", SOURCE, "-o", compiled],
                ["-shared", compiled, "-o", LIBRARY],
            ):
                subprocess.run([compiler, *arguments], cwd=self.root, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            self.app.display_warning(f"{SOURCE} is not compiled, and 8 bits will be slower on a CPU: {said.strip()}")
            return
        finally:
            Path(self.root, compiled).unlink(missing_ok=True)
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(platform_tags())}"
