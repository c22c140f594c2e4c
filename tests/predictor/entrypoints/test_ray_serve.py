"""Application builder: settings by name, and the deployment's options that follow from them."""

import asyncio
import pickle
from typing import Any

import pytest

from devtools.paths import DEMO_MODEL
from predictor import settings
from predictor.entrypoints import ray_serve
from predictor.entrypoints.ray_serve import ProxyMiddleware
from predictor.entrypoints.ray_settings import RaySettings
from predictor.errors import InvalidSettings


def _options(**arguments: Any) -> dict[str, Any]:
    return ray_serve.deployment_options(settings.from_arguments(arguments, RaySettings))


def test_app_binds_the_settings_to_a_deployment() -> None:
    # Values are text with `serve run`.
    application = ray_serve.app({"model_dir": str(DEMO_MODEL), "max_num_seqs": "8", "num_cpus": "2", "tracing": "true"})
    deployment = application._bound_deployment
    [parsed] = deployment.init_args
    assert (parsed.model_dir, parsed.max_num_seqs, parsed.num_cpus, parsed.tracing) == (DEMO_MODEL, 8, 2.0, True)
    assert pickle.loads(pickle.dumps(parsed)) == parsed  # noqa: S301, our own
    assert (deployment.name, deployment.num_replicas, deployment.max_ongoing_requests) == ("predictor", 1, 236)


def test_options_follow_from_the_settings() -> None:
    options = _options(
        max_num_seqs=10,
        max_queued_requests=20,
        shutdown_grace_seconds=60,
        shutdown_delay_seconds=5,
        num_replicas=3,
        num_cpus=4,
        num_gpus=1,
    )
    assert options == {
        "num_replicas": 3,
        "max_ongoing_requests": 130,
        "max_queued_requests": -1,
        "graceful_shutdown_wait_loop_s": 5,
        "graceful_shutdown_timeout_s": 65,
        "ray_actor_options": {"num_cpus": 4, "num_gpus": 1},
        "logging_config": {"enable_access_log": False},
    }


def test_options_of_a_default_replica_leave_it_as_long_as_its_requests_may_take() -> None:
    options = _options()
    assert options["graceful_shutdown_timeout_s"] > RaySettings().request_timeout_seconds
    assert (options["graceful_shutdown_wait_loop_s"], options["num_replicas"]) == (2, 1)
    assert "max_replicas_per_node" not in options


def test_options_with_max_replicas_scale_by_load() -> None:
    options = _options(max_num_seqs=20, min_replicas=0, max_replicas=4, upscale_delay_s=1, downscale_delay_s=2)
    assert options["autoscaling_config"] == {
        "min_replicas": 0,
        "max_replicas": 4,
        "target_ongoing_requests": 16,
        "upscale_delay_s": 1,
        "downscale_delay_s": 2,
    }
    assert "num_replicas" not in options


def test_options_with_a_metrics_port_place_one_replica_on_a_node() -> None:
    assert _options(metrics_port=8080)["max_replicas_per_node"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num_seq": 8}, "Unknown setting: max_num_seq. Did you mean max_num_seqs?"),
        ({"num_cpu": 8}, "Unknown setting: num_cpu. Did you mean num_cpus?"),
        ({"max_num_seqs": "no"}, "Invalid value of --max_num_seqs (PREDICTOR_MAX_NUM_SEQS): 'no'. "),
        ({"num_replicas": 0}, "Invalid value of --num_replicas (PREDICTOR_NUM_REPLICAS): 0. "),
        ({"num_replicas": 2, "max_replicas": 3}, "num_replicas: max_replicas sets the number by load. "),
        ({"min_replicas": 2}, "min_replicas: without max_replicas the number does not follow the load. "),
        ({"num_gpus": 4}, "num_gpus: 4 GPUs, but tensor_parallel_size is 1. Set both to the same number."),
        ({"num_gpus": 4, "tensor_parallel_size": 2}, "num_gpus: 4 GPUs, but tensor_parallel_size is 2. "),
        ({"num_gpus": 0.5, "tensor_parallel_size": 2}, "num_gpus: 0.5 GPUs, but tensor_parallel_size is 2. "),
        ({"enable_grpc": "true"}, "enable_grpc: not possible with Ray Serve: "),
        ({"enable_admin_routes": True}, "enable_admin_routes: not possible with Ray Serve: "),
        ({"hold_while_loading": 5}, "hold_while_loading: not possible with Ray Serve: "),
        ({"adapter_reference": "hf://a/b"}, "--adapter_reference: "),
    ],
)
def test_app_refuses_what_cannot_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettings) as refused:
        ray_serve.app(arguments)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "threads"),
    [
        ({}, 1),
        ({"num_cpus": 0.5}, 1),
        ({"num_cpus": 7}, 7),
        ({"num_cpus": 7, "num_threads": 3}, 3),
        ({"num_cpus": 8, "tensor_parallel_size": 2}, 4),
        ({"num_cpus": 8, "num_gpus": 4, "tensor_parallel_size": "auto"}, 2),
    ],
)
def test_replica_settings_divide_the_cpus_among_the_processes(arguments: dict[str, Any], threads: int) -> None:
    replica = ray_serve.replica_settings(settings.from_arguments(arguments | {"max_num_seqs": 5}, RaySettings))
    assert (type(replica), replica.num_threads, replica.max_num_seqs) == (settings.Settings, threads, 5)


@pytest.mark.parametrize("ranks", [4, "auto"])
def test_app_with_a_gpu_for_each_rank_is_accepted(ranks: int | str) -> None:
    application = ray_serve.app({"num_gpus": 4, "tensor_parallel_size": ranks})
    assert application._bound_deployment.ray_actor_options["num_gpus"] == 4


def test_app_reads_variables_and_prefers_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("PREDICTOR_MAX_REPLICAS", "3")
    parsed = settings.from_arguments({"max_replicas": 4}, RaySettings)
    assert (parsed.max_num_seqs, parsed.max_replicas) == (7, 4)


def test_app_refuses_unknown_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_MAX_REPLICA", "7")
    with pytest.raises(InvalidSettings, match=r"Unknown variable: PREDICTOR_MAX_REPLICA\. Did you mean "):
        ray_serve.app({})


def _scope(path: str, root: str) -> dict[str, Any]:
    return {"type": "http", "path": path, "root_path": root, "headers": []}


@pytest.mark.parametrize(
    ("path", "root", "expected"), [("/llm/v1/x", "/llm", "/v1/x"), ("/v1", "", "/v1"), ("/a", "/a", "/")]
)
def test_proxy_middleware_removes_the_prefix_and_our_request_id(path: str, root: str, expected: str) -> None:
    sent: list[Any] = []

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        assert (scope["path"], scope["root_path"]) == (expected, "")
        headers = [(b"x-request-id", b"1"), (b"retry-after", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(ProxyMiddleware(app)(_scope(path, root), None, send))  # type: ignore[arg-type]
    assert [message["headers"] for message in sent] == [[(b"retry-after", b"2")]]


@pytest.mark.parametrize(("root", "location"), [("/cpu", b"cpu/"), ("/a/b", b"b/")])
def test_proxy_middleware_redirects_a_browser_from_the_bare_prefix(root: str, location: bytes) -> None:
    """The page's links are relative, and without the slash they are those of another application."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = _scope(root, root) | {"headers": [(b"accept", b"text/html,*/*;q=0.8")]}
    asyncio.run(ProxyMiddleware(None)(scope, None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 307
    assert (b"location", location) in sent[0]["headers"]


def test_proxy_middleware_turns_a_cancellation_into_a_disconnect() -> None:
    received: list[Any] = []

    async def run() -> None:
        disconnected = asyncio.Event()

        async def app(_scope: Any, receive: Any, _send: Any) -> None:
            received.append(await receive())
            # Still not cancelled.
            await asyncio.sleep(0)
            received.append("end")

        async def receive() -> dict[str, str]:
            await disconnected.wait()
            return {"type": "http.disconnect"}

        request = asyncio.create_task(ProxyMiddleware(app)(_scope("/", ""), receive, None))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        request.cancel()
        await asyncio.sleep(0)
        disconnected.set()
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(run())
    assert received == [{"type": "http.disconnect"}, "end"]
