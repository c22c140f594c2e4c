"""The initializer as its users run it, in this process or as one of its own, against a Hub on loopback."""

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest

from devtools.local_hub import LocalHub
from devtools.paths import ROOT
from storage_initializer.cli.main import main

FIRST_USER, SECOND_USER = 65534, 60_001
"""Users to whom something can be forbidden, unlike root."""
GROUP = 60_000

AS_USER = "tests.programs.initializer_as_user"


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str

    @property
    def reason(self) -> str:
        """What KServe would show: the last line on stderr."""
        return self.stderr.splitlines()[-1]


Run = Callable[..., Result]
Start = Callable[..., "subprocess.Popen[str]"]


def safetensors(size_bytes: int, seed: int = 0) -> bytes:
    """The smallest valid file of one uint8 tensor with `size_bytes` random elements."""
    tensor = {"weight": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}}
    header = json.dumps(tensor).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(size_bytes)


def make_model(directory: Path, shards: int = 1, shard_bytes: int = 20_000, seed: int = 0) -> Path:
    """Create a directory as on the Hub: configuration, tokenizer, weights, and files that must not be loaded."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "README.md").write_text("# A model\n")
    (directory / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors(shard_bytes, seed))
        return directory
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    for number, name in enumerate(names):
        (directory / name).write_bytes(safetensors(shard_bytes, seed=seed + number))
    index = {"metadata": {}, "weight_map": {f"layer.{number}": name for number, name in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def problems(snapshot: Path) -> list[str]:
    """What is wrong with a published snapshot, judged by its record alone, as a reader would."""
    try:
        record = json.loads((snapshot / ".snapshot.json").read_text())
    except (FileNotFoundError, ValueError) as error:
        return [f"no record: {error}"]
    wrong = []
    for file in record["files"]:
        path = snapshot / file["path"]
        if not path.is_file():
            wrong.append(f"{file['path']} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != file["sha256"]:
            wrong.append(f"{file['path']} has other bytes")
    present = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    extra = present - {file["path"] for file in record["files"]} - {".snapshot.json"}
    return wrong + [f"{path} is not in the record" for path in sorted(extra)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def hub(model: Path) -> Iterator[LocalHub]:
    with LocalHub({"demo/arithmetic": model}) as hub:
        yield hub


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return tmp_path / "volume"


@pytest.fixture
def environment(hub: LocalHub) -> dict[str, str]:
    """What the initializer sees: nothing of this machine's Hub settings or login."""
    names = [name for name in os.environ if name.startswith(("HF_", "HUGGING", "STORAGE_", "ADAPTER_", "LOG_LEVEL"))]
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return clean | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "NO_PROXY": "127.0.0.1",
        "STORAGE_INITIALIZER_ATTEMPTS": "3",
        "STORAGE_INITIALIZER_RETRY_WAIT_SECONDS": "0.01",
    }


@pytest.fixture
def run(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Run the program in this process: its real main, the real Hub client."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    handlers, level = logging.root.handlers[:], logging.root.level
    on_signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*words: object, env: Mapping[str, str] | None = None) -> Result:
        with monkeypatch.context() as patch:
            for name in set(os.environ) - set(environment):
                patch.delenv(name)
            for name, value in (environment | dict(env or {})).items():
                patch.setenv(name, value)
            capsys.readouterr()
            code = main([str(word) for word in words])
        shown = capsys.readouterr()
        return Result(code, shown.out, shown.err)

    yield run
    logging.captureWarnings(False)
    logging.disable(logging.NOTSET)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    for number, action in on_signals.items():
        signal.signal(number, action)
    huggingface_hub.close_session()


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    """Start the program as a process of its own; on request as another user, in one group for all of them."""
    processes: list[subprocess.Popen[str]] = []

    def start(*words: object, env: Mapping[str, str] | None = None, user: int | None = None) -> "subprocess.Popen[str]":
        program = ["-m", "storage_initializer"] if user is None else ["-m", AS_USER, str(user), str(GROUP)]
        process = subprocess.Popen(
            [sys.executable, *program, *map(str, words)],
            cwd=ROOT,
            env=environment | dict(env or {}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that all users reach, as they do not reach those of pytest."""
    directory = Path(tempfile.mkdtemp(prefix="storage-initializer-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def others_can_run() -> bool:
    """Whether the program can be started as another user: by root, where that user can read the code."""
    if os.getuid() != 0:
        return False
    command = [sys.executable, "-m", AS_USER, str(FIRST_USER), str(GROUP), "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


@pytest.fixture
def unprivileged(others_can_run: bool) -> int | None:
    """For `start`: who meets closed doors. None, this user, is good enough unless it is root."""
    if os.getuid() != 0:
        return None
    if not others_can_run:
        pytest.skip(f"user {FIRST_USER} cannot read the repository or its virtual environment")
    return FIRST_USER


def finish(process: "subprocess.Popen[str]", timeout_seconds: float = 120) -> Result:
    """Wait for a started program and take what it said."""
    stdout, stderr = process.communicate(timeout=timeout_seconds)
    return Result(process.returncode, stdout, stderr)
