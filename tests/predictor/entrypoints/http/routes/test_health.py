"""Liveness and answers of a server whose steps fail."""

import asyncio
import json
from dataclasses import replace

import pytest
import torch

from predictor.generation.self_check import SelfCheck
from tests.predictor.servers import HANG_SECONDS, OPENAI, PROTOCOLS, Call, InProcessServer


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_failed_step_is_an_internal_error_and_the_server_stays_live(server: InProcessServer, protocol: str) -> None:
    call = Call(server, protocol, 8)
    before, failed = call.post().json(), server.metric("engine_failed_steps_total")
    server.hold.error = ZeroDivisionError()
    response = call.post()
    server.hold.open()
    # 424 is the status of the generate protocol's failures.
    assert response.status_code == (424 if protocol == "generate" else 500)
    assert "Generation failed for this request" in response.text
    assert server.metric("engine_failed_steps_total") == failed + 1
    assert server.client.get("/v2/health/live").status_code == 200
    assert server.client.get("/v2/health/ready").status_code == 200
    assert text(call.post().json()) == text(before)
    server.wait_until_idle()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_step_out_of_memory_asks_for_a_later_retry(server: InProcessServer, protocol: str) -> None:
    server.hold.error = torch.OutOfMemoryError("CUDA out of memory.")
    response = Call(server, protocol, 8).post()
    server.hold.open()
    assert response.status_code == (424 if protocol == "generate" else 503)
    assert int(response.headers["retry-after"]) > 0
    assert "Out of memory: a step did not fit" in response.text
    assert server.client.get("/v2/health/ready").status_code == 200
    server.wait_until_idle()


def test_model_whose_self_checks_fail_is_not_live_until_one_succeeds(
    server: InProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = server.service._pipeline
    assert pipeline
    check = SelfCheck(pipeline.engine, HANG_SECONDS)
    monkeypatch.setattr(server.service, "_pipeline", replace(pipeline, self_check=check))
    server.hold.error = RuntimeError("no memory")
    for expected in (200, 200, 503):
        asyncio.run(check.check_once())
        assert server.client.get("/v2/health/live").status_code == expected
    assert server.client.get("/v2/health/ready").status_code == 503
    server.hold.open()
    asyncio.run(check.check_once())
    assert server.client.get("/v2/health/live").status_code == 200
    assert Call(server, OPENAI, 8).post().status_code == 200


def text(response: dict[str, object]) -> str:
    """The response without its id and times."""
    return json.dumps(response.get("choices") or response.get("outputs") or response.get("text_output"))
