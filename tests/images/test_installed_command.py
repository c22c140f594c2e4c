"""`kserve-llm` in a new environment with the built wheel, away from the checkout.

The packages that it needs are those of the environment of the tests; the project itself is only in the wheel.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from devtools import processes
from devtools.paths import DEMO_MODEL, ROOT
from predictor.kernels.cpu import ops
from tests.images.conftest import Environment, build_wheel, copy_sources
from tests.predictor.servers import HANG_SECONDS

MODEL = "demo/arithmetic"
VERSION = "9.8.7"

pytestmark = pytest.mark.packaging


@pytest.fixture(scope="module")
def installed(builder: Environment, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SETUPTOOLS_SCM_PRETEND_VERSION", VERSION)
        wheel = build_wheel(builder, copy_sources(folder / "sources"))
    environment = Environment(folder / "environment")
    environment.pip("install", "--no-deps", "--no-index", wheel)
    # Its own .pth files, as that of the checkout, have no effect here.
    (environment.packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return environment


@contextmanager
def serving(environment: Environment, folder: Path) -> Iterator[str]:
    """Serve the demo model from a Hub on loopback, with an empty cache, and yield the URL."""
    port = processes.free_port()
    with processes.local_hub({MODEL: DEMO_MODEL}) as hub:
        process = subprocess.Popen(
            [environment.python.parent / "kserve-llm", "serve", MODEL, "--port", str(port), "--dtype", "float32"],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "HF_ENDPOINT": hub},
            text=True,
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            output = []
            for line in process.stdout:
                output.append(line)
                if "Ctrl-C" in line:
                    break
            assert process.poll() is None, output
            yield f"http://127.0.0.1:{port}"
        finally:
            assert processes.stop(process) == 0


def python(environment: Environment, code: str, folder: Path) -> str:
    command: list[str | Path] = [environment.python, "-c", code]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_command_serves_a_model_of_a_hub(installed: Environment, tmp_path: Path) -> None:
    assert python(installed, "import kserve_llm; print(kserve_llm.__file__)", tmp_path).startswith(
        str(installed.packages)
    )
    with serving(installed, tmp_path) as url, httpx.Client(timeout=HANG_SECONDS, trust_env=False) as client:
        page = client.get(url, headers={"Accept": "text/html"}).raise_for_status()
        files = re.findall(r'(?:src|href)="([^":]+)"', page.text)
        assert len(files) > 1
        for file in files:
            assert client.get(f"{url}/{file.removeprefix('/')}").is_success, file
        assert client.get(f"{url}/version").json()["version"] == VERSION
        body = {"model": "arithmetic", "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
        answer = client.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()
        assert answer["choices"][0]["message"]["content"].endswith("42")
    assert list((tmp_path / ".cache/kserve-llm/demo--arithmetic").glob("*/model.safetensors"))


@pytest.mark.skipif(ops.cpu_isa is None or not shutil.which("cc"), reason="there is no compiler, or no AVX-512 VNNI")
def test_command_has_the_compiled_kernels(installed: Environment, tmp_path: Path) -> None:
    code = "from predictor.kernels.cpu import ops; print(ops.LIBRARY, ops.unavailable_reason())"
    library = installed.packages / "predictor/kernels/cpu/libnative.so"
    assert python(installed, code, tmp_path) == str(library)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed: it renders")
def test_command_checks_an_overlay(installed: Environment, tmp_path: Path) -> None:
    command: list[str | Path] = [installed.python.parent / "kserve-llm", "check", ROOT / "kustomize/overlays/dev"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
