"""Deletion and replacement of servers under load, behind proxies that learn of it late: no request is lost."""

import asyncio
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from devtools import processes
from devtools.paths import DEMO_MODEL
from predictor.entrypoints.lifecycle import State
from tests.predictor.proxies import ConnectionProxy, PoolingProxy, Upstreams
from tests.predictor.servers import HANG_SECONDS, ThreadServer
from tests.sizes import IS_NIGHTLY

WORKERS = 4
"""Of each proxy."""
LATE_REQUESTS = 40
"""Requests after a SIGTERM until the proxies remove the server."""
FLAGS = ("--model_dir", str(DEMO_MODEL), "--dtype", "float32")
# The test ends the delay by a second signal, once both proxies have learned of the removal. So no clock decides.
DELAY = ("--shutdown_delay_seconds", str(HANG_SECONDS))
NAME = "drain"
"""Not that of other servers of this process, whose metrics would be mixed up."""
COMPLETION = {"model": NAME, "prompt": "1+1=", "max_tokens": 6, "temperature": 0.0, "ignore_eos": True}


@dataclass(frozen=True)
class Pod:
    """A predictor that serves at `url`."""

    url: str
    signal: Callable[[], object]
    """Send SIGTERM."""
    wait: Callable[[], int]
    """Wait for the end and return the exit code."""


@contextmanager
def pod_process(folder: Path) -> Iterator[Pod]:
    with (
        (folder / "log").open("a") as log,
        processes.predictor(
            [*FLAGS, *DELAY], model_name=NAME, port=processes.free_port(), stderr=log, timeout_seconds=HANG_SECONDS
        ) as running,
    ):
        process = running.process
        yield Pod(running.url, lambda: process.send_signal(signal.SIGTERM), lambda: process.wait(HANG_SECONDS))


@contextmanager
def pod_thread(folder: Path) -> Iterator[Pod]:
    """The same servers and lifecycle in a thread."""
    del folder
    server = ThreadServer(*FLAGS, *DELAY, "--served_model_name", NAME)

    def wait() -> int:
        server.join()
        return 0 if server.lifecycle.state is State.STOPPED else 1

    with server.running():
        server.wait_until(State.SERVING)
        yield Pod(server.url, server.signal, wait)


class Load:
    """Clients that send completions, every second one as a stream, within `running`; at least `minimum`.

    Each of the URLs has `WORKERS` clients, which keep their connections.
    """

    def __init__(self, urls: Sequence[str], minimum: int) -> None:
        self.lost: list[str] = []
        """What went wrong, for each lost request."""
        self.sent = 0
        self._urls = urls
        self._minimum = minimum
        self._text = ""
        self._stopped = False
        self._changed = threading.Condition()

    def wait(self, requests: int) -> None:
        """Wait until this many requests have ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.sent >= requests, timeout=HANG_SECONDS)

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=asyncio.run, args=(self._run(),), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped = True
            thread.join(HANG_SECONDS)
            assert not thread.is_alive()

    async def _run(self) -> None:
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=HANG_SECONDS, trust_env=False))
                for url in self._urls
            ]
            response = await clients[0].post("/v1/completions", json=COMPLETION)
            self._text = response.json()["choices"][0]["text"]
            await asyncio.gather(*(self._work(client) for client in clients for _ in range(WORKERS)))

    async def _work(self, client: httpx.AsyncClient) -> None:
        streamed = False
        while not self._stopped or self.sent < self._minimum:
            streamed = not streamed
            problem = await (self._stream(client) if streamed else self._complete(client))
            with self._changed:
                self.sent += 1
                if problem:
                    self.lost.append(problem)
                self._changed.notify_all()

    async def _complete(self, client: httpx.AsyncClient) -> str:
        try:
            response = await client.post("/v1/completions", json=COMPLETION)
        except httpx.TransportError as error:
            return repr(error)
        if response.status_code != 200:
            return f"{response.status_code} {response.text}"
        return self._difference(response.json()["choices"][0]["text"])

    async def _stream(self, client: httpx.AsyncClient) -> str:
        try:
            async with client.stream("POST", "/v1/completions", json={**COMPLETION, "stream": True}) as response:
                if response.status_code != 200:
                    return f"stream: {response.status_code} {(await response.aread()).decode()}"
                events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
        except httpx.TransportError as error:
            return f"stream: {error!r}"
        if events.pop() != "[DONE]":
            return "stream: without an end"
        return self._difference("".join(json.loads(event)["choices"][0]["text"] for event in events))

    def _difference(self, text: str) -> str:
        return "" if text == self._text else f"{text!r} instead of {self._text!r}"


def delete(pod: Pod, proxies: Sequence[Upstreams], load: Load) -> None:
    """Delete a pod: SIGTERM, of which the proxies learn late."""
    pod.signal()
    load.wait(load.sent + LATE_REQUESTS)
    for proxy in proxies:
        proxy.remove(pod.url)
    pod.signal()
    assert pod.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "requests"),
    [(pod_thread, 100), (pod_process, 1000 if IS_NIGHTLY else 200)],
    ids=["threads", "processes"],
)
def test_drain_during_a_deletion_and_a_rollout_loses_no_request(
    start: Callable[[Path], AbstractContextManager[Pod]], requests: int, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        proxies = PoolingProxy(), ConnectionProxy()
        old, deleted = (stack.enter_context(start(tmp_path)) for _ in range(2))
        for proxy in proxies:
            proxy.add(old.url)
            proxy.add(deleted.url)
        load = Load([stack.enter_context(proxy.running()) for proxy in proxies], requests)
        with load.running():
            load.wait(requests // 4)
            delete(deleted, proxies, load)
            new = stack.enter_context(start(tmp_path))
            for proxy in proxies:
                proxy.add(new.url)
            load.wait(load.sent + requests // 4)
            delete(old, proxies, load)
        print(f"{len(load.lost)} of {load.sent} requests lost")  # noqa: T201, shown where the test fails
        assert load.sent >= requests
        assert load.lost == []
