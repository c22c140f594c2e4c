"""Replicas in a real Ray cluster of a head and two workers, behind Serve's proxy."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from devtools.paths import DEMO_MODEL, ROOT
from devtools.processes import free_port
from predictor import settings
from predictor.entrypoints import ray_serve
from predictor.entrypoints.ray_settings import RaySettings
from tests.predictor.servers import GENERATE_STREAM, HANG_SECONDS, OPENAI, Call, Orders, Server, StreamReader

pytestmark = pytest.mark.slow

QUESTION = "What is 17 + 25?"
CHAT = [{"role": "user", "content": QUESTION}]
ANSWER = "7+5=12 1+2+1=4 42"
DEMO = {"model_dir": DEMO_MODEL, "dtype": "float32", "served_model_name": "demo"}


@dataclass(frozen=True)
class App:
    """An application of the cluster: a server whose path begins with the application's prefix."""

    name: str
    server: Server
    orders: Orders

    def num_replicas(self) -> int:
        """Number of replicas that run."""
        from ray import serve

        deployment = serve.status().applications[self.name].deployments["predictor"]
        return int(deployment.replica_states.get("RUNNING", 0))


@pytest.fixture(scope="module")
def cluster_url() -> Iterator[str]:
    from devtools import ray_cluster

    with ray_cluster.running(nodes=3, head_cpus=0) as url:
        yield url


Deploy = Callable[..., App]


@pytest.fixture(scope="module")
def deploy(cluster_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deploy]:
    """Deploy an application with these settings, below a prefix of its name."""
    from ray import serve

    from tests.predictor.held_replica import HeldReplica

    clients = []

    def deploy(name: str, headers: dict[str, str] | None = None, **arguments: Any) -> App:
        parsed = settings.from_arguments(DEMO | arguments, RaySettings)
        options = ray_serve.deployment_options(parsed)
        # The defaults take a minute each.
        options |= {"health_check_period_s": 0.5, "max_constructor_retry_count": 1}
        orders = Orders(tmp_path_factory.mktemp(name) / "order")
        deployment = serve.deployment(serve.ingress()(HeldReplica), name="predictor", **options)
        serve.run(deployment.bind(parsed, orders.path), name=name, route_prefix=f"/{name}")
        client = httpx.Client(base_url=f"{cluster_url}/{name}", timeout=HANG_SECONDS, trust_env=False, headers=headers)
        clients.append(client)
        return App(name, Server(f"{cluster_url}/{name}", "demo", client, str), orders)

    yield deploy
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def app(deploy: Deploy) -> App:
    """One replica."""
    return deploy("one")


@pytest.fixture
def held(app: App) -> Iterator[App]:
    """The same, without orders afterwards."""
    yield app
    app.orders.withdraw()


PROTOCOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "v1": ("/v1/models/demo:predict", {"instances": [CHAT]}),
    "v2": (
        "/v2/models/demo/infer",
        {"inputs": [{"name": "messages", "datatype": "BYTES", "shape": [1], "data": [json.dumps(CHAT)]}]},
    ),
    "generate": ("/v2/models/demo/generate", {"text_input": "17+25=", "parameters": {"temperature": 0}}),
    "completions": ("/v1/completions", {"model": "demo", "prompt": "17+25=", "max_tokens": 64, "temperature": 0}),
    "chat": ("/openai/v1/chat/completions", {"model": "demo", "messages": CHAT}),
    "responses": ("/v1/responses", {"model": "demo", "input": QUESTION}),
    "anthropic": ("/v1/messages", {"model": "demo", "max_tokens": 64, "messages": CHAT}),
}
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "generate_stream": ("/v2/models/demo/generate_stream", PROTOCOLS["generate"][1]),
    **{name: PROTOCOLS[name] for name in ("completions", "chat", "responses", "anthropic")},
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_answers(app: App, protocol: str) -> None:
    path, body = PROTOCOLS[protocol]
    response = app.server.client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert "42" in response.text


@pytest.mark.parametrize("protocol", STREAMS)
def test_every_streaming_protocol_streams(app: App, protocol: str) -> None:
    path, body = STREAMS[protocol]
    with app.server.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = list(response.iter_text())
    assert len(chunks) > 3
    assert "4" in "".join(chunks)


def test_errors_have_the_form_of_their_protocol_below_a_prefix(app: App) -> None:
    refused = app.server.client.post("/v1/embeddings", json={"model": "demo", "input": "1+1="})
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "Model demo generates" in refused.json()["error"]["message"]
    unknown = app.server.client.get("/v2/models/other")
    assert unknown.status_code == 404
    assert isinstance(unknown.json()["error"], str)
    anthropic = app.server.client.post("/v1/messages", json={"model": "demo", "messages": CHAT})
    assert (anthropic.status_code, anthropic.json()["type"]) == (400, "error")


def test_page_below_a_prefix_has_links_to_its_own_application(app: App) -> None:
    browser = {"accept": "text/html"}
    page = httpx.get(app.server.url, headers=browser, follow_redirects=True, trust_env=False)
    assert page.url == f"{app.server.url}/"
    assert page.headers["content-type"].startswith("text/html")
    script = page.url.join("playground/playground.js")
    assert httpx.get(script, trust_env=False).status_code == 200
    # Other clients are not redirected.
    assert httpx.get(app.server.url, trust_env=False).json()["status"] == "alive"


def test_request_id_is_the_clients_and_single(app: App) -> None:
    response = app.server.client.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert response.headers.get_list("x-request-id") == ["mine-1"]
    assert len(app.server.client.get("/v1/models").headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_disconnect_frees_the_engine_and_counts_as_the_clients(held: App, stream: bool) -> None:
    server = held.server
    held.orders.give("slow")
    call = Call(server, OPENAI, tokens=500, more={"stream": stream})
    # The replica learns of it in one of several ways, by chance.
    for _ in range(8 if stream else 1):
        before = server.metric("requests_total", protocol="openai", status="499")
        with httpx.Client(base_url=server.url, trust_env=False, timeout=HANG_SECONDS if stream else 0.5) as connection:
            if stream:
                with connection.stream("POST", call.path, json=call.body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    connection.post(call.path, json=call.body)
        server.wait_until_idle()
        server.wait_for_metric("requests_total", before + 1, protocol="openai", status="499")
    assert server.metric("request_finished_total", finished_reason="cancelled") >= 1


def test_keys_overload_and_metrics_are_those_of_the_server(deploy: Deploy, tmp_path: Path) -> None:
    keys, port = tmp_path / "keys", free_port()
    keys.write_text("alice:sk-alice-0123456789\n")
    app = deploy(
        "keys",
        headers={"authorization": "Bearer sk-alice-0123456789"},
        api_keys_file=keys,
        max_num_seqs=1,
        max_queued_requests=0,
        metrics_port=port,
    )
    server, call = app.server, Call(app.server, OPENAI, tokens=5)
    refused = httpx.post(f"{server.url}{call.path}", json=call.body, trust_env=False)
    assert refused.status_code == 401
    # Probes need no key, also below a prefix.
    assert httpx.get(f"{server.url}/v2/health/ready", trust_env=False).status_code == 200

    app.orders.give("block")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call.post)
        server.wait_for_metrics(num_requests_running=1)
        overloaded = call.post()
        assert (overloaded.status_code, overloaded.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(overloaded.headers["retry-after"]) >= 1
        app.orders.withdraw()
        assert running.result().status_code == 200

    metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    assert 'kserve_llm_request_rejected_total{model_name="demo"} 1.0' in metrics
    assert httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", trust_env=False).status_code == 200
    # It serves no model.
    assert httpx.post(f"http://127.0.0.1:{port}{call.path}", json=call.body, trust_env=False).status_code == 404


def test_killed_replica_ends_its_stream_with_an_error_and_is_replaced(held: App) -> None:
    from devtools import ray_cluster

    [replica] = ray_cluster.replicas(held.name)
    held.orders.give("slow")
    reader, call = StreamReader(), Call(held.server, OPENAI, tokens=500)
    with ThreadPoolExecutor(2) as pool:
        reading, waiting = pool.submit(reader.read, call), pool.submit(call.post)
        assert reader.started.wait(HANG_SECONDS)
        held.server.wait_for_metrics(num_requests_running=2)
        replica.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            reading.result()
        assert waiting.result().status_code == 500
    assert reader.finish_reason is None
    held.orders.withdraw()
    # The proxy holds the next request until there is a replica.
    assert Call(held.server, OPENAI, tokens=5).post().status_code == 200


def test_replica_that_generates_no_more_is_replaced(held: App) -> None:
    call = Call(held.server, OPENAI, tokens=5)
    held.orders.give("fail")
    assert call.post().status_code == 503
    held.server.wait_for(lambda: held.num_replicas() == 0)
    held.orders.withdraw()
    held.server.wait_for(lambda: held.num_replicas() == 1)
    assert call.post().status_code == 200


def test_replica_with_a_failed_rank_ends_and_is_replaced(deploy: Deploy) -> None:
    from ray import serve

    from devtools import ray_cluster

    app = deploy("ranks", tensor_parallel_size=2, num_cpus=2)
    call = Call(app.server, OPENAI, tokens=500)
    assert replace(call, tokens=5).post().status_code == 200
    app.orders.give("slow")
    [replica] = ray_cluster.replicas("ranks")
    [follower] = replica.children()
    reader = StreamReader()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(reader.read, call)
        assert reader.started.wait(HANG_SECONDS)
        follower.kill()
        # Its last event is the error, unless the replica ends before the proxy has it.
        with suppress(httpx.RemoteProtocolError):
            reading.result()
    assert reader.finish_reason is None
    assert reader.last != "[DONE]"
    app.orders.withdraw()
    replica.wait(HANG_SECONDS)
    assert replace(call, tokens=5).post().status_code == 200
    serve.delete("ranks")


def test_failed_load_is_named_in_the_status(deploy: Deploy, tmp_path: Path) -> None:
    from ray import serve

    with pytest.raises(RuntimeError, match="Deploying application broken failed"):
        deploy("broken", model_dir=tmp_path)
    message = serve.status().applications["broken"].deployments["predictor"].message
    assert f"{tmp_path} has no config.json" in message
    serve.delete("broken")


def test_deletion_loses_no_stream(deploy: Deploy) -> None:
    from ray import serve

    app = deploy("deleted")
    app.orders.give("block")
    readers = [StreamReader() for _ in range(3)]
    call = Call(app.server, GENERATE_STREAM, tokens=200)
    with ThreadPoolExecutor(4) as pool:
        reading = [pool.submit(reader.read, call) for reader in readers]
        app.server.wait_for_metrics(num_requests_running=1, num_requests_waiting=2)
        deleting = pool.submit(serve.delete, "deleted")
        app.server.wait_for(lambda: serve.status().applications["deleted"].status == "DELETING")
        app.orders.withdraw()
        for future in reading:
            assert future.result().finish_reason == "length"
        deleting.result()
    assert "deleted" not in serve.status().applications


def test_node_of_a_deleted_pod_loses_no_request(deploy: Deploy) -> None:
    import ray

    from devtools import ray_cluster

    # It leaves the cluster, so this test is the last one.
    app = deploy("drained", shutdown_grace_seconds=60)
    [replica] = ray_cluster.replicas("drained")
    app.orders.give("slow")
    reader, call = StreamReader(), Call(app.server, OPENAI, tokens=100)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(reader.read, call)
        assert reader.started.wait(HANG_SECONDS)
        raylet = replica.parent()
        assert raylet is not None
        [node] = [word for word in raylet.cmdline() if word.startswith("--node_id=")]
        here = f"--address={ray.get_runtime_context().gcs_address} {node.replace('_', '-')}"
        script = pre_stop().replace("ray drain-node", f"ray drain-node {here}").replace("900", "90")
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-c", script], env=environment, check=True)
        statuses = set()
        while replica.is_running():
            statuses.add(Call(app.server, OPENAI, tokens=1).post().status_code)
            time.sleep(0.1)
        assert reading.result().finish_reason == "length"
    assert statuses == {200}
    [moved] = ray_cluster.replicas("drained")
    assert moved.pid != replica.pid


def pre_stop() -> str:
    """Return the script that Kubernetes runs before it stops a worker."""
    service = yaml.safe_load((ROOT / "manifests/ray/ray-service.yaml").read_text())
    worker = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    *_, script = worker["lifecycle"]["preStop"]["exec"]["command"]
    return str(script)
