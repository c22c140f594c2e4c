"""The peers of `benchmarks.compare`: how each prepares the model and is started, with all cores."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.peers import compressed_tensors, environments
from benchmarks.servers import command_server
from devtools import processes
from devtools.paths import ROOT
from kserve_llm.bench import Server
from kserve_llm.errors import BenchmarkError

SEQUENCES = 32
"""Sequences that every server may run at a time; as many as the most callers."""
CONTEXT_TOKENS = 2304
"""Longest prompt and completion together."""
_PROBE_TOKENS = 512
_PROBE_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer with one kind of weights."""

    environment: str
    """A name of `environments.INSTALL`."""
    prepare: Callable[[Path, Path, Path], None] | None
    """Writes the model in the first path for this peer to the last one; the second has the environments."""
    command: Callable[[Path, Path, int], list[str]]
    """Command from `peers_dir`, the prepared model, and a port."""


@contextmanager
def start(name: str, model_dir: Path, peers_dir: Path) -> Iterator[Server]:
    """Run a peer on the model and yield it when it lists its model; its log is in `peers_dir`.

    Raises:
        BenchmarkError: it is not installed or prepared, or did not start.
    """
    port = processes.free_port()
    words = PEERS[name].command(peers_dir, prepared(name, model_dir, peers_dir), port)
    with (
        (peers_dir / f"{name}.log").open("w") as log,
        command_server(name, words, port, environment(peers_dir, PEERS[name].environment), log) as server,
    ):
        yield server


def prepared(name: str, model_dir: Path, peers_dir: Path) -> Path:
    """Return where the model is for this peer; the first call for a model writes it there."""
    peer = PEERS[name]
    environments.python(peers_dir, peer.environment)
    if peer.prepare is None:
        return model_dir.resolve()
    target = peers_dir.resolve() / "models" / _fingerprint(model_dir) / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
        peer.prepare(model_dir, peers_dir, partial)
        partial.rename(target)
    return target


def amx_of_llamacpp(peers_dir: Path) -> str:
    """Say whether llama.cpp runs with AMX kernels: `used`, `not on this CPU` or `off: ...`."""
    if not environments.has_amx():
        return "not on this CPU"
    return "off: the build with AMX kernels does not run" if _without_amx(peers_dir).exists() else "used"


def _fingerprint(model_dir: Path) -> str:
    """Return a name for the model: it changes with the config, and with sizes and times of the weights."""
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    for file in sorted(model_dir.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def environment(peers_dir: Path, name: str) -> dict[str, str]:
    """Return the environment variables of a peer's server."""
    if name == "vllm":
        return {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CACHE_ROOT": str(peers_dir.resolve() / "vllm" / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "VLLM_NO_USAGE_STATS": "1",
        }
    return {"PYTHONPATH": str(ROOT)}


def _write_int8_for_vllm(model_dir: Path, peers_dir: Path, target: Path) -> None:
    del peers_dir
    compressed_tensors.write(model_dir, target)


def _vllm_command(peers_dir: Path, model: Path, port: int) -> list[str]:
    # The program `vllm` looks for a distribution of that name, which vllm-cpu is not.
    command = [str(environments.python(peers_dir, "vllm")), "-m", "vllm.entrypoints.openai.api_server"]
    limits = ["--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", str(SEQUENCES)]
    return [*command, "--model", str(model), "--port", str(port), "--dtype", "bfloat16", *limits]


def _write_gguf(file_type: str) -> Callable[[Path, Path, Path], None]:
    def prepare(model_dir: Path, peers_dir: Path, target: Path) -> None:
        from benchmarks.peers import gguf_file  # needs the package gguf

        gguf_file.write(model_dir, target, file_type)
        if environments.has_amx() and not _runs_with_amx(peers_dir, target):
            _without_amx(peers_dir).touch()

    return prepare


def _without_amx(peers_dir: Path) -> Path:
    """Return the file that exists if llama.cpp's AMX kernels do not run on this CPU."""
    return peers_dir / "llamacpp" / "without-amx"


def _runs_with_amx(peers_dir: Path, model: Path) -> bool:
    """Whether the build with AMX kernels completes a prompt."""
    port = processes.free_port()
    command = _llamacpp_arguments(environments.llama_server(peers_dir, amx=True), model, port)
    try:
        with command_server("llama.cpp with AMX", command, port) as server:
            body = {"model": server.model, "prompt": [1] * _PROBE_TOKENS, "max_tokens": 4, "ignore_eos": True}
            url = f"{server.url}/completions"
            return httpx.post(url, json=body, timeout=_PROBE_SECONDS, trust_env=False).is_success
    except (BenchmarkError, httpx.HTTPError):
        return False


def _llamacpp_command(peers_dir: Path, model: Path, port: int) -> list[str]:
    amx = not _without_amx(peers_dir).exists()
    return _llamacpp_arguments(environments.llama_server(peers_dir, amx=amx), model, port)


def _llamacpp_arguments(program: Path, model: Path, port: int) -> list[str]:
    sequences = ["--parallel", str(SEQUENCES), "--cont-batching", "--ctx-size", str(SEQUENCES * CONTEXT_TOKENS)]
    # Without a cache of prompts: none of them comes twice.
    others = ["--threads", str(len(os.sched_getaffinity(0))), "--cache-ram", "0", "--no-ui", "--port", str(port)]
    return [str(program), "--model", str(model), "--alias", "model", "--host", "127.0.0.1", *sequences, *others]


def _export_for_openvino(bits: int) -> Callable[[Path, Path, Path], None]:
    def prepare(model_dir: Path, peers_dir: Path, target: Path) -> None:
        command = [str(environments.python(peers_dir, "openvino")), "-m", "benchmarks.peers.openvino_export"]
        command += [str(model_dir.resolve()), str(target), "--bits", str(bits)]
        if subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT).returncode:
            raise BenchmarkError(f"`{' '.join(command)}` failed; see its output.")

    return prepare


def _openvino_command(peers_dir: Path, model: Path, port: int) -> list[str]:
    command = [str(environments.python(peers_dir, "openvino")), "-m", "benchmarks.peers.openvino_server"]
    return [*command, "--model_dir", str(model), "--port", str(port), "--max_num_seqs", str(SEQUENCES)]


PEERS = {
    "vllm-bf16": Peer("vllm", None, _vllm_command),
    "vllm-int8": Peer("vllm", _write_int8_for_vllm, _vllm_command),
    "llamacpp-q8_0": Peer("llamacpp", _write_gguf("q8_0"), _llamacpp_command),
    "llamacpp-q4_0": Peer("llamacpp", _write_gguf("q4_0"), _llamacpp_command),
    "openvino-int8": Peer("openvino", _export_for_openvino(8), _openvino_command),
    "openvino-int4": Peer("openvino", _export_for_openvino(4), _openvino_command),
}
"""Peers by their names in the results."""
