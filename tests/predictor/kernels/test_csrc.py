"""The C sources: ctypes prototypes match the header, no compiler warnings, no sanitizer errors."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from devtools.paths import ROOT
from predictor.kernels.cpu import gemm_ops, ops
from tests.predictor.kernels.native_library import CSRC, EMULATED_AMX, flags

C_TYPES = {"void": None, "int": ctypes.c_int, "size_t": ctypes.c_size_t, "float": ctypes.c_float}
needs_gcc = pytest.mark.skipif(not shutil.which("gcc") or ops.cpu_isa is None, reason="needs gcc and AVX-512 VNNI")


def c_type(declaration: str) -> object:
    """The ctypes type of a parameter."""
    return ctypes.c_void_p if "*" in declaration else C_TYPES[declaration.split()[-2]]


def test_prototypes_match_the_header() -> None:
    header = re.sub(r"/\*.*?\*/", "", (CSRC / "kernels.h").read_text(), flags=re.DOTALL)
    declarations = re.findall(r"^(\w+) (\w+)\(([^)]*)\);", header, flags=re.MULTILINE)
    assert len(declarations) == header.count(");")
    parsed = {
        name: (C_TYPES[result], [] if arguments == "void" else [c_type(argument) for argument in arguments.split(",")])
        for result, name, arguments in declarations
    }
    assert parsed == ops.PROTOTYPES


def test_struct_matches_the_header() -> None:
    header = re.sub(r"/\*.*?\*/", "", (CSRC / "kernels.h").read_text(), flags=re.DOTALL)
    struct = re.search(r"typedef struct \{([^}]*)\} LinearArguments;", header)
    assert struct is not None
    fields = []
    for declaration in filter(None, map(str.strip, struct[1].split(";"))):
        first, *others = (name.strip() for name in declaration.split(","))
        *_, name = first.replace("*", " ").split()
        fields += [(each, c_type(first)) for each in (name, *others)]
    assert fields == gemm_ops.LinearArguments._fields_


@pytest.mark.parametrize(("prefix", "names"), [("ISA_", ops.CPU_ISAS), ("BF16_ISA_", ops.BF16_ISAS)])
def test_instruction_sets_match_the_header(prefix: str, names: tuple[str | None, ...]) -> None:
    constants = re.search(rf"enum \{{ ({prefix}[^}}]*) \}}", (CSRC / "kernels.h").read_text())
    assert constants is not None
    expected = [prefix + str(isa or "none").upper() for isa in names]
    assert constants[1].split(", ") == expected


@needs_gcc
@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("*.c")))
def test_source_compiles_without_warnings(source: str, tmp_path: Path) -> None:
    command = ["gcc", *flags(), "-Werror", "-fsyntax-only", str(CSRC / source)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("amx", [pytest.param([], id="native"), pytest.param(EMULATED_AMX, id="emulated_amx")])
def test_kernels_pass_the_sanitizers(amx: list[str], tmp_path: Path) -> None:
    program = tmp_path / "kernels_driver"
    sources = [*CSRC.glob("*.c"), ROOT / "tests" / "programs" / "kernels_driver.c"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", f"-I{CSRC}"]
    compile_command = ["gcc", *flags(), *amx, *sanitizers, *map(str, sources), "-o", str(program), "-lm"]
    result = subprocess.run(compile_command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    result = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
