"""The examples that are clients: each prints the demo model's answer."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from devtools.paths import ROOT
from tests.predictor import servers
from tests.predictor.servers import HANG_SECONDS, InProcessServer

SUM = "7+5=12 1+2+1=4 42"
NAME = "I am the demo model of kserve-llm, a tiny language model."
OUTPUTS = {
    "grpc/infer.py": f"{SUM}\n",
    "kserve-client/infer.py": f"{SUM}\n{NAME}\n",
    "openai-sdk/chat.py": f"{SUM}\n32 tokens\n",
    "streaming/stream.py": f"{NAME}\n30 tokens\n",
    "structured-output/extract.py": "working='7+5=12 1+2+1=4' result=42\n",
    "tools/loop.py": 'calculator({"expression": "17 + 25"})\n17 + 25 = 42\n',
}


@pytest.fixture(scope="module")
def arithmetic() -> Iterator[InProcessServer]:
    with servers.in_process("--enable_grpc", model_name="arithmetic") as running:
        yield running


def test_examples_every_folder_is_listed_and_tested() -> None:
    scripts = {str(path.relative_to(ROOT / "examples")) for path in (ROOT / "examples").glob("*/*.py")}
    assert scripts == OUTPUTS.keys()
    listed = re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", (ROOT / "examples/README.md").read_text(), re.MULTILINE)
    folders = {f"{path.parent.name}/README.md" for path in (ROOT / "examples").glob("*/README.md")}
    assert set(listed) == folders | {"deploy.py"}
    for script in scripts:
        assert f"python examples/{script}" in (ROOT / "examples" / script).parent.joinpath("README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", OUTPUTS)
def test_example_prints_the_answer(arithmetic: InProcessServer, script: str) -> None:
    variables = {"SERVER": arithmetic.url, "GRPC_SERVER": f"127.0.0.1:{arithmetic.grpc_port}", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / script],
        capture_output=True,
        text=True,
        env=os.environ | variables,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.stdout == OUTPUTS[script], done.stderr
