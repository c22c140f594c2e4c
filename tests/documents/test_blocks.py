"""Every fenced block of the documents works: the site's pages, the READMEs and the files at the top.

What a writer must know:

- ```` ```sh ````: commands that a reader pastes. All blocks of a document run in one bash with `set -euo pipefail`, in
  a copy of the checkout: an earlier block may write files and set variables that a later one needs. Paths are relative
  to the checkout. `HF_TOKEN`, `API_KEY`, `tls.crt`, `tls.key` and `ca.crt` exist.
- `curl` is sent, to the demo model or to a tiny model that embeds or reranks, whatever the host's name (127.0.0.1,
  localhost, *.example.com) on the ports 80, 443, 8000 and 8080. A response other than 2xx fails. The model may be named
  llm, demo, arithmetic, model, embedder or reranker.
- Other programs are recorded instead of run, and `tests/documents/commands.py` checks their arguments with the
  programs' own parsers: a program that is missing there fails. `kubectl kustomize` prints its rendering.
- A placeholder is an UPPER CASE word, never `<name>` or `…`. A command that must fail, and output, are `text`.
- ```` ```yaml ````: a kustomization or some of its fields (rendered on base, next to the files of overlay `dev`), an
  object (validated), or fields of an InferenceService below `spec.predictor` (validated). An excerpt with `…`, and
  anything else, is parsed. A fence with title="FILE" writes FILE next to the kustomization of a later block.
- ```` ```json ```` (one or several documents, or a member of one) and ```` ```python ```` are parsed. `text`,
  `console`, `diff` and `mermaid` are not checked.
"""

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from devtools import tiny_poolers
from tests.documents import commands, manifests
from tests.documents.fences import DOCUMENTS, Block, blocks, documents_with
from tests.documents.shell import Checkout
from tests.predictor import servers

# One worker has the servers and the copy.
pytestmark = [
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]

LANGUAGES = {"sh", "yaml", "json", "python", "text", "console", "diff", "mermaid"}
ABSOLUTE_TARGET = re.compile(r">\s*[/~](?!dev/)")
Servers = Callable[[str], Mapping[str, tuple[int, str]]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Return the ports and names of the models to which commands send requests, by task; each starts on first use."""
    directories: dict[str, Callable[[Path], Path] | None] = {
        "generate": None,
        "embed": tiny_poolers.make_bert,
        "classify": tiny_poolers.make_classifier,
    }
    started: dict[str, tuple[int, str]] = {}
    with ExitStack() as stack:

        def start(task: str) -> None:
            make = directories[task]
            flags = ("--model_dir", str(make(tmp_path_factory.mktemp(task)))) if make else ("--enable_admin_routes",)
            server = stack.enter_context(servers.in_process(*flags, model_name=f"documented-{task}"))
            started[task] = int(server.url.rpartition(":")[2]), server.model_name

        def get(script: str) -> Mapping[str, tuple[int, str]]:
            words = {"generate": "curl", "embed": "/v1/embeddings", "classify": "/rerank|/score"}
            for task, pattern in words.items():
                if task not in started and re.search(pattern, script):
                    start(task)
            return started

        yield get


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Checkout]:
    """Return a copy of the checkout that no document has changed."""
    copies: list[Checkout] = []

    def get() -> Checkout:
        if not copies or copies[-1].is_changed:
            copies.append(Checkout(tmp_path_factory.mktemp("documents") / "checkout", commands.PROGRAM_NAMES))
        return copies[-1]

    return get


@pytest.mark.parametrize("document", documents_with("sh"), ids=str)
def test_commands_of_a_document_work(running: Servers, checkout: Callable[[], Checkout], document: Path) -> None:
    found = blocks(document, "sh")
    copy = checkout()
    problems = [
        f"line {block.line}: writes to an absolute path" for block in found if ABSOLUTE_TARGET.search(block.text)
    ]
    assert not problems
    calls, reason = copy.run(found, running("\n".join(block.text for block in found)))
    for call in calls:
        try:
            commands.check(call)
        except AssertionError as error:
            problems.append(f"{call}: {error}")
    assert not [*problems, *filter(None, [reason])]


@pytest.mark.parametrize("document", documents_with("yaml"), ids=str)
def test_yaml_of_a_document_is_valid(checkout: Callable[[], Checkout], document: Path) -> None:
    copy = checkout()
    folder = copy.folder / manifests.DOCUMENTED
    problems = []
    try:
        for block in blocks(document, "yaml"):
            if block.title:
                folder.mkdir(exist_ok=True)
                (folder / Path(block.title).name).write_text(block.text)
            try:
                manifests.check(block.text, copy.folder)
            except AssertionError as error:
                problems.append(f"line {block.line}: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert not problems


def parse_json(text: str) -> None:
    """Parse one or several documents, or a member of one."""
    rest = text.strip()
    if re.match(r'"\w+": ', rest):
        rest = f"{{{rest}}}"
    while rest:
        _, end = json.JSONDecoder().raw_decode(rest)
        rest = rest[end:].strip()


@pytest.mark.parametrize("document", documents_with("json", "python"), ids=str)
def test_json_and_python_of_a_document_are_parsed(document: Path) -> None:
    parsers: dict[str, Callable[[str], object]] = {"json": parse_json, "python": ast.parse}
    for block in blocks(document, *parsers):
        try:
            parsers[block.language](block.text)
        except (SyntaxError, ValueError) as error:
            raise AssertionError(f"line {block.line}: {error}") from error


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_fences_have_a_known_language(document: Path) -> None:
    assert [block for block in blocks(document) if block.language not in LANGUAGES] == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("make no-such-target", "No rule to make target"),
        ("make serve PORTS=1", "no variable PORTS"),
        ("python -m predictor --no_such_flag 1", "Unknown flag: --no_such_flag"),
        ("PREDICTOR_PORTS=1 python -m predictor", "Unknown variable: PREDICTOR_PORTS"),
        ("python -m storage_initializer hf://owner/model", "do not make pairs"),
        ("python -m preflight kustomize/overlays/none", "is not an overlay"),
        ("python -m benchmarks.throughput --no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("python -m benchmarks.none", "there is no module benchmarks.none"),
        ("kserve-llm serve owner/model --quantisation 8bit", "Unknown flag: --quantisation"),
        ("kserve-llm bake owner/model", "invalid choice: 'bake'"),
        ("pip install 'kserve-llm[all]'", "has no extra all"),
        ("kubectl apply -k kustomize/overlays/none", "does not exist"),
        ("kubectl get inferenceservices --no-such-flag", "unknown flag: --no-such-flag"),
        ("kubectl get inferenceservers", "unknown kind: inferenceservers"),
        ("kubectl frobnicate pods", 'unknown command "frobnicate"'),
        ("kubectl create secret generic keys --from-file=none.txt", "none.txt"),
        (
            "printf 'apiVersion: v1\\nkind: Pod\\nspec: {}\\n' | kubectl apply -f -",
            "'containers' is a required property",
        ),
        ("serve run predictor.entrypoints.ray_serve:app model_dirs=x", "Unknown setting: model_dirs"),
        ("curl -s http://localhost:8080/v1/none", "404"),
        ("no-such-program --help", "unknown program: no-such-program"),
        ("echo $NO_SUCH_VARIABLE", "unbound variable"),
        ("docker build --file images/none/Dockerfile .", "images/none/Dockerfile does not exist"),
        ("helm install <name>", "syntax error"),
    ],
)
def test_wrong_command_is_found(running: Servers, checkout: Callable[[], Checkout], text: str, problem: str) -> None:
    calls, reason = checkout().run([Block(1, "sh", text)], running(text))
    for call in calls:
        try:
            commands.check(call)
        except AssertionError as error:
            reason += str(error)
    assert problem in reason


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("components: [../../components/none]", "none"),
        ("a: [", "expected the node content"),
        ("{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {port: 1}}", "'port' was unexpected"),
    ],
)
def test_wrong_yaml_is_found(checkout: Callable[[], Checkout], text: str, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        manifests.check(text, checkout().folder)
