"""Build the images with buildah and run them as the manifests do.

No registry, no daemon: Debian with Python from debootstrap replaces `python:3.12-slim`. An image takes minutes and
gigabytes, so only those in BUILD_IMAGES (comma-separated) are built. `make images-check` builds all.
"""

import json
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from packaging.utils import canonicalize_name

from devtools import processes
from devtools.paths import DEMO_MODEL, ROOT

IMAGES = {
    "storage_initializer": ["--file", "images/storage_initializer/Dockerfile"],
    "prepare": ["--file", "images/storage_initializer/Dockerfile", "--target", "prepare"],
    "predictor": ["--file", "images/predictor/Dockerfile"],
    "ray": ["--file", "images/predictor/Dockerfile", "--target", "ray"],
}
LOCKS = {
    "storage_initializer": "images/storage_initializer/requirements.txt",
    "prepare": "images/storage_initializer/requirements-prepare.txt",
    "predictor": "images/predictor/requirements.txt",
    "ray": "images/predictor/requirements-ray.txt",
}
SELECTED = os.environ.get("BUILD_IMAGES", "").split(",")
CANARY = f"hf_{secrets.token_hex(20)}"
TOKEN = re.compile(rb"\b(hf_[A-Za-z0-9]{34,}|gh[pousr]_[A-Za-z0-9]{36,}|AKIA[0-9A-Z]{16}|glpat-[\w-]{20,})\b")
BUILD_SECONDS = 900
VERSION = "9.8.7"

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(BUILD_SECONDS + 300)]


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: root file system, OCI config and history."""

    root: Path
    config: dict[str, Any]
    history: str

    @property
    def scratch(self) -> str:
        """HOME, where the manifests mount an emptyDir."""
        return self.environment["HOME"]

    @property
    def environment(self) -> dict[str, str]:
        """The image's environment variables."""
        return dict(variable.split("=", 1) for variable in self.config["Env"])

    def command(self, words: list[str], mounts: dict[Path, str], environment: dict[str, str]) -> list[str]:
        """Command that runs `words` as PID 1 and the image's user; only HOME and mounts are writable."""
        script = ["set -e", f'mount --rbind "{self.root}" "{self.root}"', f'mount -o remount,ro,bind "{self.root}"']
        script += [f'mount -t tmpfs -o mode=1777 tmpfs "{self.root}{self.scratch}"']
        script += [f'mount -t proc proc "{self.root}/proc"']
        script += [f'mount --rbind /dev "{self.root}/dev"']
        script += [f'mount --bind "{source}" "{self.root}{target}"' for source, target in mounts.items()]
        script += ['exec "$@"']
        variables = [*self.config["Env"], *(f"{name}={value}" for name, value in environment.items())]
        chroot = [
            "chroot",
            f"--userspec={self.config['User']}",
            str(self.root),
            "env",
            "--ignore-environment",
            *variables,
        ]
        return [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            "\n".join(script),
            "sh",
            *chroot,
            *words,
        ]


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Buildah with a temporary store."""
    if os.geteuid() != 0:
        pytest.skip("needs root for debootstrap and chroot")
    for tool in ("buildah", "debootstrap", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    store = tmp_path_factory.mktemp("store")
    yield ["buildah", "--root", str(store / "root"), "--runroot", str(store / "run")]
    shutil.rmtree(store)


@pytest.fixture(scope="module")
def base(buildah: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Base image: Debian bookworm with Python and the mount points of a runtime."""
    folder = tmp_path_factory.mktemp("base")
    _run(
        [
            "debootstrap",
            "--variant=minbase",
            "--include=python3,python3-venv,ca-certificates",
            "bookworm",
            folder / "root",
        ]
    )
    (folder / "root/mnt/models").mkdir()
    _run(["tar", "--create", "--directory", folder / "root", "--exclude=./dev/*", "--file", folder / "base.tar", "."])
    shutil.rmtree(folder / "root")
    (folder / "Dockerfile").write_text("FROM scratch\nADD base.tar /\nENV PATH=/usr/local/bin:/usr/bin:/bin\n")
    _run([*buildah, "build", "--isolation", "chroot", "--tag", "localhost/base", folder])
    return "localhost/base"


@pytest.fixture(scope="module")
def pip_configuration(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return the local pip configuration as a build secret, and mounts of the folders that it names."""
    config = _run([sys.executable, "-m", "pip", "config", "list"])
    options = dict(re.findall(r"^[\w:]+\.(cert|find-links|index-url|proxy|trusted-host)='(.*)'$", config, re.MULTILINE))
    file = tmp_path_factory.mktemp("pip") / "pip.conf"
    file.write_text("\n".join([f"# {CANARY}", "[global]", *(f"{name} = {value}" for name, value in options.items())]))
    paths = [Path(word) for value in options.values() for word in value.split() if word.startswith("/")]
    folders = {path if path.is_dir() else path.parent for path in paths}
    return file, [f"--volume={folder}:{folder}:ro" for folder in sorted(folders)]


def _build(name: str, request: pytest.FixtureRequest) -> Iterator[Image]:
    if name not in SELECTED:
        pytest.skip(f"BUILD_IMAGES does not name {name}: `make images-check` builds it")
    buildah, base = request.getfixturevalue("buildah"), request.getfixturevalue("base")
    secret, volumes = request.getfixturevalue("pip_configuration")
    tag = f"localhost/{name}"
    arguments = ["--isolation", "chroot", "--layers=false", "--build-arg", f"BASE={base}"]
    arguments += ["--build-arg", f"VERSION={VERSION}"]
    arguments += ["--secret", f"id=pip,src={secret}", *volumes, *IMAGES[name], "--tag", tag]
    # A token in the build environment must not reach an image.
    _run([*buildah, "build", *arguments, ROOT], cwd=ROOT, env=os.environ | {"HF_TOKEN": CANARY})
    described = json.loads(_run([*buildah, "inspect", "--type", "image", tag]))["OCIv1"]
    container = _run([*buildah, "from", tag]).strip()
    root = Path(_run([*buildah, "mount", container]).strip())
    yield Image(root, described["config"], json.dumps(described))
    _run([*buildah, "rm", container])


@pytest.fixture(scope="module")
def storage_initializer(request: pytest.FixtureRequest) -> Iterator[Image]:
    yield from _build("storage_initializer", request)


@pytest.fixture(scope="module")
def prepare(request: pytest.FixtureRequest) -> Iterator[Image]:
    yield from _build("prepare", request)


@pytest.fixture(scope="module")
def predictor(request: pytest.FixtureRequest) -> Iterator[Image]:
    yield from _build("predictor", request)


@pytest.fixture(scope="module")
def ray(request: pytest.FixtureRequest) -> Iterator[Image]:
    yield from _build("ray", request)


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest) -> Image:
    image: Image = request.getfixturevalue(request.param)
    return image


def test_initializer_image_publishes_from_a_hub(storage_initializer: Image, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    os.chown(volume, *map(int, storage_initializer.config["User"].split(":")))
    words = [*storage_initializer.config["Entrypoint"], "hf://demo/arithmetic", "/mnt/models"]
    with processes.local_hub({"demo/arithmetic": DEMO_MODEL}) as hub_url:
        command = storage_initializer.command(words, {volume: "/mnt/models"}, {"HF_ENDPOINT": hub_url})
        _run(command)
    (weights,) = volume.glob("demo--arithmetic/*/model.safetensors")
    assert weights.read_bytes() == (DEMO_MODEL / "model.safetensors").read_bytes()
    assert (weights.stat().st_uid, weights.stat().st_gid) == (1000, 1000)


def test_predictor_image_serves_as_process_one(predictor: Image, tmp_path: Path) -> None:
    log = tmp_path / "log"
    port = processes.free_port()
    words = [*predictor.config["Entrypoint"], "--served_model_name=arithmetic", f"--http_port={port}"]
    command = predictor.command(words, {DEMO_MODEL: "/mnt/models"}, {"HF_HUB_OFFLINE": "1"})
    url = f"http://127.0.0.1:{port}/v2/models/arithmetic"
    with log.open("w") as stderr:
        running = subprocess.Popen(command, stderr=stderr)
    try:
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not _is_ready(client, f"{url}/ready"):
                assert running.poll() is None, log.read_text()
                time.sleep(0.5)
            question = json.dumps([{"role": "user", "content": "What is 17 + 25?"}])
            body = {
                "inputs": [{"name": "messages", "datatype": "BYTES", "shape": [1], "data": [question]}],
                "parameters": {"max_tokens": 64, "temperature": 0},
            }
            answer = client.post(f"{url}/infer", json=body).raise_for_status().json()
        assert "42" in answer["outputs"][0]["data"][0]
        (first,) = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        status = Path(f"/proc/{first}/status").read_text()
        assert re.search(r"^NSpid:\s+\d+\s+1$", status, re.MULTILINE)
        assert re.search(r"^Uid:\s+1000\s+1000\s+1000\s+1000$", status, re.MULTILINE)
        os.kill(int(first), signal.SIGTERM)
        assert running.wait(60) == 0, log.read_text()
    finally:
        running.kill()
        running.wait()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the C code is compiled for x86_64 only")
def test_predictor_image_has_native_kernels(predictor: Image) -> None:
    code = "from predictor.kernels.cpu import ops; print(ops.LIBRARY.is_file(), not ops.unavailable_reason())"
    assert _run(predictor.command(["python", "-c", code], {}, {})).split() == ["True", "True"]


def test_prepare_image_has_torch_and_transformers(prepare: Image) -> None:
    _run(prepare.command(["python", "-c", "import accelerate, bitsandbytes, safetensors, torch, transformers"], {}, {}))
    assert "hf://" in _run(prepare.command([*prepare.config["Entrypoint"], "--help"], {}, {}))


def test_ray_image_has_the_application_and_the_commands_of_kuberay(ray: Image) -> None:
    _run(ray.command(["python", "-c", "from predictor.entrypoints.ray_serve import app; app({})"], {}, {}))
    for command in ("ray", "serve"):
        assert "Usage" in _run(ray.command([command, "--help"], {}, {}))
    assert ray.environment["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize("name", IMAGES)
def test_image_holds_exactly_its_lock_torch_and_the_project(name: str, request: pytest.FixtureRequest) -> None:
    image: Image = request.getfixturevalue(name)
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / LOCKS[name]).read_text(), re.MULTILINE))
    code = "import importlib.metadata as m; print(*(package.name for package in m.distributions()))"
    installed = {canonicalize_name(name) for name in _run(image.command(["python", "-c", code], {}, {})).split()}
    assert installed - locked == {"kserve-llm"} | (set() if name == "storage_initializer" else {"torch"})
    # Packages for other systems.
    assert locked - installed <= {"colorama", "httpx2-jsfetch"}


def test_image_has_labels_and_the_version(image: Image) -> None:
    labels = image.config["Labels"]
    words = ("title", "description", "licenses", "version", "revision")
    assert all(labels[f"org.opencontainers.image.{word}"] for word in words)
    assert labels["org.opencontainers.image.version"] == VERSION
    code = "import importlib.metadata; print(importlib.metadata.version('kserve-llm'))"
    assert _run(image.command(["python", "-c", code], {}, {})).strip() == VERSION
    assert image.config["StopSignal"] == "SIGTERM"


def test_image_has_no_pip_and_no_compiler(image: Image) -> None:
    for tool in ("pip", "cc", "gcc"):
        assert shutil.which(tool, path=":".join(f"{image.root}{folder}" for folder in _path(image))) is None
    failing = subprocess.run(
        image.command(["python", "-m", "pip"], {}, {}), capture_output=True, text=True, check=False
    )
    assert "No module named pip" in failing.stderr


def test_image_has_no_weights_and_no_writable_code(image: Image) -> None:
    assert not list((image.root / "opt").rglob("*.safetensors"))
    assert not list((image.root / "opt").rglob("pytorch_model*.bin"))
    writable = [
        path for path in (image.root / "opt").rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022
    ]
    assert not writable
    assert not [path for path in (image.root / "opt").rglob("*") if path.lstat().st_uid]


def test_image_contains_no_secret(image: Image) -> None:
    assert not TOKEN.search(image.history.encode())
    assert CANARY not in image.history
    leaks = {
        str(path.relative_to(image.root)): tokens
        for path in image.root.rglob("*")
        if path.is_file() and not path.is_symlink() and (tokens := _tokens(path))
    }
    assert not leaks


def test_secret_search_finds_a_planted_token(tmp_path: Path) -> None:
    for name in ("config.json", "testing_utils.py"):
        file = tmp_path / name
        file.write_text(f"token={CANARY}")
        assert _tokens(file) == {CANARY.encode()}


def _tokens(path: Path) -> set[bytes]:
    tokens = set(TOKEN.findall(path.read_bytes()))
    # transformers publishes the token of its own test account with its source.
    return tokens & {CANARY.encode()} if path.name.startswith("testing_utils.") else tokens


def _path(image: Image) -> list[str]:
    return image.environment["PATH"].split(":")


def _is_ready(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        # The port is not open yet.
        return False


def _run(command: Sequence[object], cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return its output; fail with the end of it."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=BUILD_SECONDS, cwd=cwd, env=env)
    assert done.returncode == 0, (
        f"{' '.join(words[:8])} … exited with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    )
    return done.stdout
