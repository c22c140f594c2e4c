"""Run the whole pipeline offline: Hub -> storage initializer -> volume -> predictor -> completions over v2.

`python -m demo` runs it once and stops all processes. `--serve` keeps the server running. `make demo` and `make serve`
call it.
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from demo import exam
from devtools import processes
from devtools.paths import DEMO_MODEL, ROOT
from devtools.processes import DemoError, Predictor

REFERENCE = "hf://demo/arithmetic"
SYSTEM = "You are a careful calculator."
SHOWN_QUESTIONS = 5


def step(text: str) -> None:
    """Print a heading."""
    print(f"\n==> {text}", flush=True)


def infer(server: Predictor, questions: list[str]) -> tuple[list[str], int, float]:
    """Send the questions in one v2 request; return the answers, the token count and the seconds."""
    chats = [
        json.dumps([{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}])
        for question in questions
    ]
    started = time.monotonic()
    response = httpx.post(
        f"{server.url}/v2/models/{server.model_name}/infer",
        json={
            "inputs": [{"name": "messages", "datatype": "BYTES", "shape": [len(chats)], "data": chats}],
            "outputs": [{"name": "text_output"}, {"name": "completion_tokens"}],
        },
        timeout=120,
        trust_env=False,
    )
    seconds = time.monotonic() - started
    if response.is_error:
        raise DemoError(f"The predictor answered {response.status_code}: {response.text}")
    answers, tokens = (output["data"] for output in response.json()["outputs"])
    return answers, sum(tokens), seconds


def print_answers(server: Predictor) -> None:
    """Print and check the answers to held-out sums and to a question about the server."""
    sums = exam.held_out_questions(SHOWN_QUESTIONS, seed=3)
    questions = [question for question, _ in sums] + ["Who are you?"]
    answers, tokens, seconds = infer(server, questions)
    for question, answer in zip(questions, answers, strict=True):
        print(f"    {question:<28} {answer}")
    print(f"    {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s, all questions in one batch")
    correct = sum(exam.final_number(answer) == result for answer, (_, result) in zip(answers, sums, strict=False))
    if correct < len(sums) - 1:
        raise DemoError(f"Only {correct} of {len(sums)} sums are correct; the weights in demo/model are damaged.")


def render_overlay() -> None:
    """Render the overlay that deploys both programs on a cluster."""
    overlay = Path("kustomize/overlays/prod")
    if shutil.which("kubectl") is None:
        print(f"    kubectl is not installed; the overlay is not rendered: {overlay}")
        return
    rendered = subprocess.run(["kubectl", "kustomize", str(overlay)], cwd=ROOT, capture_output=True, text=True)
    if rendered.returncode:
        raise DemoError(f"{overlay} does not render: {rendered.stderr.strip()}")
    target = ROOT / "build" / "prod.yaml"
    target.parent.mkdir(exist_ok=True)
    target.write_text(rendered.stdout)
    objects = sum(line.startswith("kind:") for line in rendered.stdout.splitlines())
    print(f"    {target.relative_to(ROOT)}, {objects} objects, rendered from {overlay}")


def print_commands(server: Predictor) -> None:
    """Print one curl command for each protocol."""
    model, question = f"{server.url}/v2/models/{server.model_name}", "What is 17 + 25?"
    chat = [{"role": "user", "content": question}]
    tensor = {"name": "messages", "datatype": "BYTES", "shape": [1], "data": [json.dumps(chat)]}
    bodies: dict[str, dict[str, object]] = {
        f"{model}/infer": {"inputs": [tensor], "parameters": {"max_tokens": 64}},
        f"{model}/generate": {"text_input": "17+25=", "parameters": {"max_tokens": 64, "temperature": 0}},
        f"{server.url}/v1/chat/completions": {"model": server.model_name, "messages": chat},
        f"{server.url}/v1/models/{server.model_name}:predict": {"instances": [chat]},
    }
    for url, body in bodies.items():
        print(f"curl -s {url} -H 'Content-Type: application/json' -d '{json.dumps(body)}'")
    print(f"curl -s {model}")
    print(f"curl -s {server.url}/v2/health/ready")


@contextmanager
def served(reference: str | None, root: Path, port: int, log_level: str) -> Iterator[tuple[Predictor, str, str | None]]:
    """Publish and serve a model; yield the server, the reference and the local Hub's URL, if any."""
    with ExitStack() as stack:
        hub_url = None
        if reference is None:
            step("Hub on loopback with the demo model")
            hub_url = stack.enter_context(processes.local_hub({"demo/arithmetic": DEMO_MODEL}))
            print(f"    {hub_url}")
        reference = reference or REFERENCE
        step(f"Storage initializer: {reference} -> {root}")
        processes.initialize(reference, root, hub_url)
        step(f"Predictor on port {port}")
        match = re.match(r"hf://[^/]+/([^/:@]+)", reference)
        server = stack.enter_context(
            processes.predictor(
                ["--model_dir", str(root), "--model_reference", reference, "--log_level", log_level],
                model_name=match[1] if match else "model",
                port=port,
                on_wait=lambda reason: print(f"    {reason}", flush=True),
                timeout_seconds=600,
            )
        )
        yield server, reference, hub_url


def demonstrate(root: Path) -> None:
    """Run the pipeline once."""
    with served(None, root, processes.free_port(), "WARNING") as (server, reference, hub_url):
        step("Questions over the Open Inference Protocol v2")
        print_answers(server)
        step("Storage initializer again: already published")
        print(f"    {processes.initialize(reference, root, hub_url):.2f} s, including Python's start")
        step("The overlay for a cluster")
        render_overlay()
    print("\nDone. All processes have been stopped.")


def serve(reference: str | None, root: Path, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    with served(reference, root, port, "INFO") as (server, _, _):
        step(f"Ready: {server.url}/ is a page to talk to the model. Stop with Ctrl-C. In another terminal:")
        print_commands(server)
        sys.stdout.flush()
        if exit_code := server.process.wait():
            raise DemoError(f"The predictor exited with code {exit_code}; see its log.")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="Run the whole pipeline offline.")
    parser.add_argument("--serve", action="store_true", help="keep serving until Ctrl-C")
    parser.add_argument("--model", help="serve hf://owner/name from the Hub instead of the demo model")
    parser.add_argument("--root", type=Path, default=Path("models"), help="volume folder (default: ./%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="HTTP port of --serve (default: %(default)s)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments.serve or arguments.model:
            serve(arguments.model, arguments.root, arguments.port)
        else:
            demonstrate(arguments.root)
    except DemoError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
