"""Client libraries against a running predictor, in the virtual environment of `make clients`.

Each module in `uses` has one library's tests. Its interpreter has none of this project's packages.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools.paths import ROOT
from tests.predictor import servers

FOLDER = ROOT / "tests" / "clients"
USES = FOLDER / "uses"
CLIENTS = ROOT / ".venv-clients" / "bin" / "python"
MODULES = sorted(path.name for path in USES.glob("use_*.py"))
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}
"""What keeps the libraries from requests to other servers."""


@pytest.fixture(scope="session")
def predictor_url() -> Iterator[str]:
    with servers.in_process(model_name="arithmetic") as server:
        yield server.url


def run_uses(interpreter: Path, module: str, predictor_url: str) -> None:
    """Run the tests of a module with another interpreter."""
    command: list[str | Path] = [
        interpreter,
        "-m",
        "pytest",
        "-c",
        USES / "pytest.ini",
        "--confcutdir",
        USES,
        USES / module,
    ]
    environment = {**os.environ, **OFFLINE, "PREDICTOR_URL": predictor_url, "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_library_uses_the_predictor(predictor_url: str, module: str) -> None:
    if not CLIENTS.exists():
        pytest.skip("the clients are not installed; `make clients` installs them into a separate environment")
    run_uses(CLIENTS, module, predictor_url)


@pytest.mark.slow
@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("use_openai_sdk")])
def test_openai_sdk_of_the_development_environment_uses_the_predictor(predictor_url: str, module: str) -> None:
    # Other clients hold the release in their environment to an older major version.
    run_uses(Path(sys.executable), module, predictor_url)


def test_documented_versions_equal_the_installed_ones() -> None:
    constraints = (FOLDER / "constraints.txt").read_text()
    documented = re.findall(r"^\| (\S+) \| (\d\S*) \|", (ROOT / "docs" / "clients.md").read_text(), re.MULTILINE)
    assert len(documented) >= len(MODULES)
    assert [f"{name}=={version}" for name, version in documented if f"{name}=={version}\n" not in constraints] == []
