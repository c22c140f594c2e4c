"""Soak: all kinds of requests at once for SOAK_SECONDS; every valid one gets the right answer."""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from demo import exam
from devtools import processes
from devtools.paths import DEMO_MODEL
from devtools.processes import Predictor

WORKERS = 64
SECONDS = float(os.environ.get("SOAK_SECONDS", "8"))
QUESTIONS = [question for question, _ in exam.held_out_questions(24, seed=3)]
RIGHT = dict(exam.held_out_questions(24, seed=3))
CHAT, COMPLETIONS = "/v1/chat/completions", "/openai/v1/completions"
INFER, GENERATE, PREDICT = "/v2/models/demo/infer", "/v2/models/demo/generate", "/v1/models/demo:predict"
MIB = 2**20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Predictor]:
    log = tmp_path / "log"
    arguments = ["--model_dir", str(DEMO_MODEL), "--dtype", "float32"]
    with (
        log.open("w") as stderr,
        processes.predictor(arguments, model_name="demo", port=processes.free_port(), stderr=stderr) as running,
    ):
        yield running
    assert "Traceback" not in log.read_text()
    assert " ERROR " not in log.read_text()


class Clients:
    """Clients that send all kinds of requests and check the responses."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.sent: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.answers: dict[str, str] = {}
        self.stories: dict[tuple[str, str], str] = {}
        """Greedy continuations of raw prompts, by protocol's path and question."""

    async def learn(self) -> None:
        """Send every question alone; under load, the answers must be the same."""
        for question in QUESTIONS:
            self.answers[question] = await self._chat(question)
        for question in QUESTIONS[:4]:
            self.stories[COMPLETIONS, question] = await self._complete(question)
        right = sum(exam.final_number(answer) == RIGHT[question] for question, answer in self.answers.items())
        assert right >= len(QUESTIONS) - 2, "the demo model can do sums"

    async def work(self, seed: int, until: float) -> None:
        rng = random.Random(seed)
        kinds = [
            self.chat,
            self.streamed_chat,
            self.predict,
            self.infer,
            self.complete,
            self.streamed_generate,
            self.sample,
            self.sample_several,
            self.leave_stream,
            self.leave_answer,
            self.send_invalid,
        ]
        while time.monotonic() < until:
            kind = rng.choice(kinds)
            await kind(rng)
            self.sent[kind.__name__] += 1

    async def chat(self, rng: random.Random) -> None:
        question = rng.choice(QUESTIONS)
        assert await self._chat(question) == self.answers[question]

    async def streamed_chat(self, rng: random.Random) -> None:
        question = rng.choice(QUESTIONS)
        text = ""
        async with self.http.stream("POST", CHAT, json={**self._about(question), "stream": True}) as response:
            assert response.status_code == 200
            events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
        assert events.pop() == "[DONE]"
        for event in events:
            for choice in json.loads(event)["choices"]:
                text += choice["delta"].get("content") or ""
        self.ended["eos_token"] += 1
        assert text == self.answers[question]

    async def predict(self, rng: random.Random) -> None:
        questions = rng.sample(QUESTIONS, 3)
        instances = [[{"role": "user", "content": question}] for question in questions]
        body = {"instances": instances, "parameters": {"temperature": 0.0, "max_tokens": 60}}
        answer = await self._post(PREDICT, body)
        self.ended["eos_token"] += 3
        assert answer["predictions"] == [self.answers[question] for question in questions]

    async def infer(self, rng: random.Random) -> None:
        questions = rng.sample(QUESTIONS, 2)
        chats = [json.dumps([{"role": "user", "content": question}]) for question in questions]
        body = {
            "inputs": [{"name": "messages", "datatype": "BYTES", "shape": [2], "data": chats}],
            "parameters": {"temperature": 0.0, "max_tokens": 60},
        }
        [output] = (await self._post(INFER, body))["outputs"]
        self.ended["eos_token"] += 2
        assert output["data"] == [self.answers[question] for question in questions]

    async def complete(self, rng: random.Random) -> None:
        question = rng.choice(QUESTIONS[:4])
        assert await self._complete(question) == self.stories[COMPLETIONS, question]

    async def streamed_generate(self, rng: random.Random) -> None:
        question = rng.choice(QUESTIONS[:4])
        body = {"text_input": question, "parameters": {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}}
        async with self.http.stream("POST", f"{GENERATE}_stream", json=body) as response:
            assert response.status_code == 200
            lines = [json.loads(line.removeprefix("data: ")) async for line in response.aiter_lines() if line]
        self.ended["length"] += 1
        assert "".join(line["text_output"] for line in lines) == self.stories[COMPLETIONS, question]

    async def sample(self, rng: random.Random) -> None:
        parameters = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 30, "ignore_eos": True, "details": True}
        answer = await self._post(GENERATE, {"text_input": rng.choice(QUESTIONS), "parameters": parameters})
        self.ended["length"] += 1
        assert len(answer["details"]["logprobs"]) == 30

    async def sample_several(self, rng: random.Random) -> None:
        body = {
            **self._about(rng.choice(QUESTIONS)),
            "temperature": 2.0,
            "seed": 11,
            "n": 3,
            "max_completion_tokens": 20,
        }
        answer = await self._post(CHAT, {**body, "ignore_eos": True})
        self.ended["length"] += 3
        assert answer["usage"]["completion_tokens"] == 60

    async def leave_stream(self, rng: random.Random) -> None:
        body = {"model": "demo", "prompt": rng.choice(QUESTIONS), "max_tokens": 900, "ignore_eos": True, "stream": True}
        async with self.http.stream("POST", COMPLETIONS, json=body) as response:
            assert response.status_code == 200
            async for _ in response.aiter_lines():
                break
        self.ended["cancelled"] += 1

    async def leave_answer(self, rng: random.Random) -> None:
        body = {"text_input": rng.choice(QUESTIONS), "parameters": {"max_tokens": 900, "ignore_eos": True}}
        with pytest.raises(httpx.ReadTimeout):
            await self.http.post(GENERATE, json=body, timeout=httpx.Timeout(60, read=0.7))
        self.ended["cancelled"] += 1

    async def send_invalid(self, rng: random.Random) -> None:
        path, body, status = rng.choice(
            [
                (CHAT, {**self._about("1+1"), "temperature": -1}, 400),
                (CHAT, {**self._about("1+1"), "model": "other"}, 404),
                (COMPLETIONS, {"model": "demo", "prompt": "1" * 9000}, 400),
                (COMPLETIONS, {"model": "demo", "prompt": "1", "repeat_penalty": 2}, 400),
                (COMPLETIONS, {"model": "demo", "prompt": [10**6]}, 400),
                (GENERATE, {"text_input": "1", "parameters": {"max_new_tokens": 5}}, 422),
                (GENERATE, [], 422),
                (INFER, {"inputs": [{"name": "text_input", "datatype": "FP32", "shape": [1], "data": [1.0]}]}, 400),
                (PREDICT, {"instances": []}, 400),
                ("/v1/nothing", {}, 404),
            ]
        )
        response = await self.http.post(path, json=body)
        assert (response.status_code, "error" in response.json()) == (status, True), (path, response.text)

    async def _chat(self, question: str) -> str:
        [choice] = (await self._post(CHAT, self._about(question)))["choices"]
        self.ended["eos_token"] += 1
        return str(choice["message"]["content"])

    async def _complete(self, question: str) -> str:
        sampling = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
        [choice] = (await self._post(COMPLETIONS, {"model": "demo", "prompt": question, **sampling}))["choices"]
        self.ended["length"] += 1
        return str(choice["text"])

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        response = await self.http.post(path, json=body)
        assert response.status_code == 200, (path, response.text)
        return response.json()

    @staticmethod
    def _about(question: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}]
        return {"model": "demo", "messages": messages, "temperature": 0, "max_completion_tokens": 60}


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """Ours, by name without prefix; counters of ended sequences by `finished/REASON`."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families((await http.get("/metrics")).text):
        for sample in family.samples:
            name = sample.name.removeprefix("kserve_llm_")
            reason = sample.labels.get("finished_reason")
            found[f"finished/{reason}" if name == "request_finished_total" else name] = sample.value
    return found


@pytest.mark.serial
@pytest.mark.slow
def test_server_under_mixed_load_answers_correctly_and_frees_memory(server: Predictor) -> None:
    process = psutil.Process(server.process.pid)

    async def soak() -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=WORKERS)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False, limits=limits) as http:
            clients = Clients(http)
            before = await metrics(http)
            await clients.learn()
            resident = []
            for third in range(3):
                until = time.monotonic() + SECONDS / 3
                async with asyncio.TaskGroup() as workers:
                    for worker in range(WORKERS):
                        workers.create_task(clients.work(third * WORKERS + worker, until))
                resident.append(process.memory_info().rss)
            async with asyncio.timeout(60):
                while (after := await metrics(http))["num_requests_running"] or after["num_requests_waiting"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            print(dict(clients.sent), [size // MIB for size in resident])  # noqa: T201
            assert min(clients.sent.values()) > 0
            assert len(clients.sent) == 11
            assert after["kv_cache_usage_perc"] == 0
            assert after.get("request_rejected_total", 0) == 0
            ended = {
                reason: after.get(f"finished/{reason}", 0) - before.get(f"finished/{reason}", 0)
                for reason in ("eos_token", "length", "stop_sequence", "cancelled", "deadline", "failed")
            }
            assert ended == {**dict.fromkeys(ended, 0), **clients.ended}
            assert resident[2] < resident[0] + 100 * MIB
            assert (await http.get("/v2/health/live")).is_success
            assert (await http.get("/v2/models/demo/ready")).is_success
            question = QUESTIONS[0]
            assert await clients._chat(question) == clients.answers[question]

    asyncio.run(soak())
