"""The examples with the demo model: the commands of their READMEs, as a reader pastes them."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools.paths import ROOT
from kserve_llm import cli
from predictor import settings
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


def blocks(folder: str, *, serving: bool = False) -> list[str]:
    """The `sh` blocks of a README that start a server, or the others, without `make`, in their order."""
    text = (EXAMPLES / folder / "README.md").read_text()
    found = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found = [re.sub(r"^make .*\n", "", block, flags=re.MULTILINE) for block in found]
    return [block for block in found if bool(re.search(r"kserve-llm serve|-m predictor", block)) == serving]


def run(block: str, tmp_path: Path, *, replaced: str = "", **variables: str) -> str:
    """Run a block from the repository's root, with folders below `tmp_path`, and return its output.

    Args:
        block: shell commands.
        tmp_path: replaces SCRATCH.
        variables: of the environment.
        replaced: URL in the block that is replaced by $SERVER.
    """
    for name, remedy in ENVIRONMENTS.items():
        if f"{name}/" in block and not (ROOT / name).exists():
            pytest.skip(f"{name} does not exist; {remedy}")
    block = block.replace(SCRATCH, f"{tmp_path}/").replace(".venv/bin", str(Path(sys.executable).parent))
    if replaced:
        assert replaced in block
        block = block.replace(replaced, variables["SERVER"])
    done = subprocess.run(
        ["bash", "-ec", block],
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


@pytest.mark.parametrize("folder", FOLDERS)
def test_example_commands_name_files_and_targets_that_exist(folder: str) -> None:
    text = (EXAMPLES / folder / "README.md").read_text()
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for block in blocks(folder):
        for path in re.findall(r"(?<=\s)(?:examples|demo|manifests|kustomize)/[\w./-]+", block):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if blocks(folder, serving=True)])
def test_example_servers_have_known_flags(folder: str) -> None:
    for block in blocks(folder, serving=True):
        [program, *words] = shlex.split(block)
        if program.endswith("kserve-llm"):
            _, flags = cli.make_parser().parse_known_args(words)
            flags = ["--model_dir", "/mnt/models", *flags]
        else:
            flags = words[words.index("predictor") + 1 :]
        settings.read(flags)


@pytest.mark.slow
@pytest.mark.parametrize("folder", OUTPUTS)
def test_example_prints_the_answer(arithmetic: InProcessServer, folder: str, tmp_path: Path) -> None:
    [block] = blocks(folder)
    grpc = f"127.0.0.1:{arithmetic.grpc_port}"
    assert run(block, tmp_path, SERVER=arithmetic.url, GRPC_SERVER=grpc) == OUTPUTS[folder]


@pytest.mark.slow
def test_rag_finds_the_passage_that_answers(arithmetic: InProcessServer, tmp_path: Path) -> None:
    ask, make = blocks("rag")
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
    train, ask = blocks("own-model")
    assert run(train, tmp_path).splitlines()[-1].startswith("epoch 59: loss 0.0")
    with servers.in_process("--model_dir", str(tmp_path / "my-model"), model_name="my-model") as server:
        answer = json.loads(run(ask, tmp_path, replaced="http://127.0.0.1:8084", SERVER=server.url))
    assert answer["choices"][0]["message"]["content"] == "The code word is heron."


@pytest.mark.slow
def test_lm_eval_scores_the_demo_model(arithmetic: InProcessServer, tmp_path: Path) -> None:
    [block] = blocks("lm-eval")
    output = run(block, tmp_path, replaced=DEFAULT_SERVER, SERVER=arithmetic.url, HF_HOME=str(tmp_path))
    scores = dict(re.findall(r"\|(demo_sums_\w+)\s*\|.*?\|\s*(\d\.\d+)\|", output))
    assert set(scores) == {"demo_sums_choice", "demo_sums_generate"}
    assert all(float(score) > 0.9 for score in scores.values()), output


@pytest.mark.slow
def test_load_test_completes_every_request(arithmetic: InProcessServer, tmp_path: Path) -> None:
    _, block = blocks("load-test")
    run(block, tmp_path, replaced=DEFAULT_SERVER, SERVER=arithmetic.url, HF_HOME=str(tmp_path))
    report = json.loads((tmp_path / "load-test.json").read_text())
    totals = [benchmark["metrics"]["request_totals"] for benchmark in report["benchmarks"]]
    assert [(total["successful"], total["errored"]) for total in totals] == [(16, 0)] * 2
