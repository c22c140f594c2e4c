"""The demo model on Ray Serve, offline: two local nodes, a question by every protocol, replicas that follow the load.

`make demo-ray` runs it and stops everything.
"""

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from ray import serve

from demo.__main__ import step
from devtools import ray_cluster
from devtools.paths import DEMO_MODEL
from devtools.processes import DemoError
from predictor.entrypoints import ray_serve

MODEL = "arithmetic"
QUESTION = "What is 17 + 25?"
ANSWER = "42"
CHAT = [{"role": "user", "content": QUESTION}]
TENSOR = {"name": "messages", "datatype": "BYTES", "shape": [1], "data": [json.dumps(CHAT)]}
SETTINGS = {
    "model_dir": DEMO_MODEL,
    "served_model_name": MODEL,
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_replicas": 2,
    "upscale_delay_s": 1,
    "downscale_delay_s": 1,
    # More than half of a node: each replica gets a node of its own.
    "num_cpus": ray_cluster.NODE_CPUS - 1,
    "log_level": "WARNING",
}
CLIENTS = 12
SCALE_SECONDS = 300

Read = Callable[[Any], str]
PROTOCOLS: dict[str, tuple[str, dict[str, Any], Read]] = {
    "Open Inference Protocol v2": (
        f"/v2/models/{MODEL}/infer",
        {"inputs": [TENSOR], "parameters": {"max_tokens": 64}},
        lambda body: str(body["outputs"][0]["data"][0]),
    ),
    "its generate extension": (
        f"/v2/models/{MODEL}/generate",
        {"text_input": "17+25=", "parameters": {"temperature": 0}},
        lambda body: str(body["text_output"]),
    ),
    "OpenAI chat": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": CHAT},
        lambda body: str(body["choices"][0]["message"]["content"]),
    ),
    "OpenAI Responses": (
        "/v1/responses",
        {"model": MODEL, "input": QUESTION},
        lambda body: str(body["output"][0]["content"][0]["text"]),
    ),
    "Anthropic": (
        "/v1/messages",
        {"model": MODEL, "max_tokens": 64, "messages": CHAT},
        lambda body: str(body["content"][0]["text"]),
    ),
    "KServe v1": (
        f"/v1/models/{MODEL}:predict",
        {"instances": [CHAT]},
        lambda body: str(body["predictions"][0]),
    ),
}


def ask(client: httpx.Client) -> None:
    """Print and check the answer of every protocol, and the events of a stream."""
    for name, (path, body, read) in PROTOCOLS.items():
        response = client.post(path, json=body)
        if response.is_error:
            raise DemoError(f"{name}: {response.status_code} {response.text}")
        answer = read(response.json())
        print(f"    {name:<28} {answer}")
        if ANSWER not in answer:
            raise DemoError(f"{name}: the answer is wrong.")
    path, body, _ = PROTOCOLS["OpenAI chat"]
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        events = sum(line.startswith("data: ") for line in response.iter_lines())
    print(f"    {'OpenAI chat, as a stream':<28} {events} events")


def follow_load(client: httpx.Client) -> None:
    """Send requests until there are two replicas, and then one client's until there is one again."""
    path, body, _ = PROTOCOLS["OpenAI chat"]
    statuses: Counter[int] = Counter()
    light, done = threading.Event(), threading.Event()

    def send(stop: threading.Event) -> None:
        while not stop.is_set():
            statuses[client.post(path, json=body).status_code] += 1
            time.sleep(0.2 if light.is_set() else 0)

    with ThreadPoolExecutor(CLIENTS) as pool:
        senders = [pool.submit(send, light if number else done) for number in range(CLIENTS)]
        try:
            for event, replicas in ((light, 2), (done, 1)):
                _wait_for(replicas)
                print(f"    replicas: {replicas}, after {statuses.total()} requests", flush=True)
                event.set()
        finally:
            light.set()
            done.set()
        for sender in senders:
            sender.result()
    print(f"    responses by status: {dict(statuses)}")
    if statuses.keys() != {200}:
        raise DemoError("A request failed.")


def _wait_for(replicas: int) -> None:
    deadline = time.monotonic() + SCALE_SECONDS
    states: dict[str, int] = {}
    while states != {"RUNNING": replicas}:
        if time.monotonic() > deadline:
            raise DemoError(f"The replicas did not become {replicas} within {SCALE_SECONDS} s: {states}.")
        time.sleep(0.5)
        deployment = serve.status().applications["default"].deployments["predictor"]
        states = {state: number for state, number in deployment.replica_states.items() if number}


def main() -> int:
    """Run the demo and return the exit code."""
    try:
        step("Ray with two local nodes")
        with ray_cluster.running(nodes=2) as url, httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            step("serve.run(predictor.entrypoints.ray_serve:app)")
            serve.run(ray_serve.app(SETTINGS))
            step(f"{QUESTION} by every protocol, through the proxy at {url}")
            ask(client)
            step(f"{CLIENTS} clients, then one")
            follow_load(client)
            step("Stopping")
    except DemoError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
