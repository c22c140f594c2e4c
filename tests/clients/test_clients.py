"""Client libraries against a running predictor, in the virtual environment of `make clients`.

Each module in `uses` has the tests of one library, or of one feature in all of them. Their interpreter has none of this
project's packages.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools import tiny_poolers
from devtools.paths import DEMO_MODEL, ROOT
from tests.predictor import servers

FOLDER = ROOT / "tests" / "clients"
USES = FOLDER / "uses"
CLIENTS = ROOT / ".venv-clients" / "bin" / "python"
MODULES = sorted(path.name for path in USES.glob("use_*.py"))
BASE_URL = os.environ.get("BASE_URL")
SERVERS = {
    "use_embeddings.py": "embedder_url",
    "use_reasoning.py": "reasoning_url",
    "use_rerank.py": "reranker_url",
}
"""Fixtures of the modules whose server does not have the demo model as it is."""
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}
"""What keeps the libraries from requests to other servers."""
REASONING = {
    "start_anchor_pattern": "(?!)",
    "fields": {"reasoning_content": {"open_pattern": r"\d\+\d=\d+ ", "close": " "}, "content": {}},
}
"""A response template for the demo model, in whose `7+5=12 1+2+1=4 42` the last number is the content."""


@pytest.fixture(scope="session")
def predictor_url() -> Iterator[str]:
    """A predictor of the demo model as `arithmetic`, or the running one at BASE_URL."""
    if BASE_URL:
        yield BASE_URL
        return
    with servers.in_process(model_name="arithmetic") as server:
        yield server.url


@pytest.fixture(scope="session")
def reasoning_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that returns the second step of a sum as reasoning."""
    weights = tmp_path_factory.mktemp("reasoning")
    for file in DEMO_MODEL.iterdir():
        (weights / file.name).write_bytes(file.read_bytes())
    configuration = weights / "tokenizer_config.json"
    configuration.write_text(json.dumps({**json.loads(configuration.read_text()), "response_template": REASONING}))
    flags = ["--model_dir", str(weights), "--tool_call_format", "hermes"]
    with servers.in_process(*flags, model_name="reasoning") as server:
        yield server.url


@pytest.fixture
def embedder_url(tmp_path: Path) -> Iterator[str]:
    directory = tiny_poolers.make_bert(tmp_path)
    with servers.in_process("--model_dir", str(directory), model_name="embedder") as server:
        yield server.url


@pytest.fixture
def reranker_url(tmp_path: Path) -> Iterator[str]:
    directory = tiny_poolers.make_classifier(tmp_path)
    with servers.in_process("--model_dir", str(directory), model_name="reranker") as server:
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
def test_library_uses_the_predictor(request: pytest.FixtureRequest, module: str) -> None:
    if not CLIENTS.exists():
        pytest.skip("the clients are not installed; `make clients` installs them into a separate environment")
    run_uses(CLIENTS, module, request.getfixturevalue(SERVERS.get(module, "predictor_url")))


@pytest.mark.slow
@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("use_openai_sdk")])
def test_openai_sdk_of_the_development_environment_uses_the_predictor(predictor_url: str, module: str) -> None:
    # Other clients hold the release in their environment to an older major version.
    run_uses(Path(sys.executable), module, predictor_url)


def test_documentation_has_the_installed_versions() -> None:
    required = re.findall(r"^[a-z-]+", (FOLDER / "requirements.txt").read_text(), re.MULTILINE)
    installed = dict(re.findall(r"^(\S+)==(\S+)$", (FOLDER / "constraints.txt").read_text(), re.MULTILINE))
    documented = re.findall(r"^\| (\S+) \| (\d\S*) \|", (ROOT / "docs" / "clients.md").read_text(), re.MULTILINE)
    assert dict(documented) == {name: installed[name] for name in required if name != "pytest"}
