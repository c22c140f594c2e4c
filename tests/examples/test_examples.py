"""The examples with the demo model: the commands of their READMEs, as a reader pastes them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools.paths import ROOT
from tests.documents import fences
from tests.predictor import servers
from tests.predictor.servers import InProcessServer

EXAMPLES = ROOT / "examples"
FOLDERS = sorted(path.parent.name for path in EXAMPLES.glob("*/README.md"))
ENVIRONMENTS = {
    ".venv-clients": "`make clients` creates it",
    ".venv-guidellm": "examples/load-test/README.md has the commands that create it",
}
"""Environments other than .venv, without which the examples that use them are skipped."""
RUN_SECONDS = 600
"""Guard against an example that hangs."""
SUM = "7+5=12 1+2+1=4 42"
NAME = "I am the demo model of kserve-llm, a tiny language model."
OUTPUTS = {
    "grpc": f"{SUM}\n",
    "kserve-client": f"{SUM}\n{NAME}\n",
    "langchain": "human: What is 17 + 25?\nai: calculator({'expression': '17 + 25'})\ntool: 42\nai: 17 + 25 = 42\n",
    "openai-sdk": f"{SUM}\n32 tokens\n",
    "streaming": f"{NAME}\n30 tokens\n",
    "structured-output": "working='7+5=12 1+2+1=4' result=42\n",
    "tools": 'calculator({"expression": "17 + 25"})\n17 + 25 = 42\n',
}
"""Standard output of the examples that ask the demo model and end."""
DEFAULT_SERVER = "http://127.0.0.1:8080"
SCRATCH = "/tmp/"  # noqa: S108, replaced by a folder of the test
PASSAGES = (EXAMPLES / "rag/passages.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def arithmetic() -> Iterator[InProcessServer]:
    with servers.in_process("--enable_grpc", model_name="arithmetic") as running:
        yield running


def scripts(folder: str) -> list[str]:
    """The `sh` blocks of a README in their order, without `make` and those that start a server.

    `tests/documents` checks that all of them can work.
    """
    found = [block.text for block in fences.blocks(Path("examples", folder, "README.md"), "sh")]
    clients = [text for text in found if not re.search(r"kserve-llm serve|-m predictor", text)]
    return [re.sub(r"^make .*\n", "", text, flags=re.MULTILINE) for text in clients]


def run(script: str, tmp_path: Path, *, replaced: str = "", **variables: str) -> str:
    """Run a script from the repository's root, with folders below `tmp_path`, and return its output.

    Args:
        script: shell commands.
        tmp_path: replaces SCRATCH.
        variables: of the environment.
        replaced: URL in the script that is replaced by $SERVER.
    """
    for name, remedy in ENVIRONMENTS.items():
        if f"{name}/" in script and not (ROOT / name).exists():
            pytest.skip(f"{name} does not exist; {remedy}")
    script = script.replace(SCRATCH, f"{tmp_path}/").replace(".venv/bin", str(Path(sys.executable).parent))
    if replaced:
        assert replaced in script
        script = script.replace(replaced, variables["SERVER"])
    done = subprocess.run(
        ["bash", "-ec", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_PROXY": "*", "HF_HUB_OFFLINE": "1", **variables},
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_examples_every_folder_is_listed() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FOLDERS)
    index, page = (EXAMPLES / "README.md").read_text(), (ROOT / "docs/examples.md").read_text()
    assert sorted(re.findall(r"^\| \[[^]]+\]\(([^)]+)/README.md\)", index, re.MULTILINE)) == FOLDERS
    assert sorted(re.findall(r"^\| \[[^]]+\]\(\.\./examples/([^)]+)/README.md\)", page, re.MULTILINE)) == FOLDERS


@pytest.mark.slow
@pytest.mark.parametrize("folder", OUTPUTS)
def test_example_prints_the_answer(arithmetic: InProcessServer, folder: str, tmp_path: Path) -> None:
    [script] = scripts(folder)
    grpc = f"127.0.0.1:{arithmetic.grpc_port}"
    assert run(script, tmp_path, SERVER=arithmetic.url, GRPC_SERVER=grpc) == OUTPUTS[folder]


@pytest.mark.slow
def test_rag_finds_the_passage_that_answers(arithmetic: InProcessServer, tmp_path: Path) -> None:
    ask, make = scripts("rag")
    run(make, tmp_path)
    with servers.in_process("--model_dir", str(tmp_path / "word-embedder"), model_name="word-embedder") as embedder:
        output = run(ask, tmp_path, SERVER=arithmetic.url, EMBEDDER=embedder.url)
    first, second, answer = output.split("\n", 2)
    [expected] = [passage for passage in PASSAGES if "after SIGTERM" in passage]
    assert first == f"- {expected}"
    assert second.removeprefix("- ") in PASSAGES
    assert answer.strip()


@pytest.mark.slow
def test_own_model_answers_what_it_was_trained_on(tmp_path: Path) -> None:
    train, ask = scripts("own-model")
    assert run(train, tmp_path).splitlines()[-1].startswith("epoch 59: loss 0.0")
    with servers.in_process("--model_dir", str(tmp_path / "my-model"), model_name="my-model") as server:
        answer = json.loads(run(ask, tmp_path, replaced="http://127.0.0.1:8084", SERVER=server.url))
    assert answer["choices"][0]["message"]["content"] == "The code word is heron."


@pytest.mark.slow
def test_lm_eval_scores_the_demo_model(arithmetic: InProcessServer, tmp_path: Path) -> None:
    [script] = scripts("lm-eval")
    output = run(script, tmp_path, replaced=DEFAULT_SERVER, SERVER=arithmetic.url, HF_HOME=str(tmp_path))
    scores = dict(re.findall(r"\|(demo_sums_\w+)\s*\|.*?\|\s*(\d\.\d+)\|", output))
    assert set(scores) == {"demo_sums_choice", "demo_sums_generate"}
    assert all(float(score) > 0.9 for score in scores.values()), output


@pytest.mark.slow
def test_load_test_completes_every_request(arithmetic: InProcessServer, tmp_path: Path) -> None:
    _, script = scripts("load-test")
    run(script, tmp_path, replaced=DEFAULT_SERVER, SERVER=arithmetic.url, HF_HOME=str(tmp_path))
    report = json.loads((tmp_path / "load-test.json").read_text())
    totals = [benchmark["metrics"]["request_totals"] for benchmark in report["benchmarks"]]
    assert [(total["successful"], total["errored"]) for total in totals] == [(16, 0)] * 2
