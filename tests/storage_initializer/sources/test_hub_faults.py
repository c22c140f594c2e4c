"""Faults of the Hub: transient ones are retried, permanent ones end the run."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from devtools.local_hub import LocalHub, Request, Response
from tests.storage_initializer.conftest import Run, make_model, problems

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

Change = Callable[[Response], Response]


class Once:
    """A fault that befalls the first answers to one question, and counts all of them."""

    def __init__(self, kind: str, change: Change, times: int = 1, file: str = WEIGHTS) -> None:
        self.requests: list[Request] = []
        self._kind, self._change, self._times, self._file = kind, change, times, file

    def __call__(self, request: Request, response: Response) -> Response:
        if request.kind != self._kind or (self._kind == "resolve" and request.file != self._file):
            return response
        self.requests.append(request)
        return self._change(response) if len(self.requests) <= self._times else response


def answer(status: int, **headers: str) -> Change:
    return lambda _response: Response(status, {name.replace("_", "-"): value for name, value in headers.items()})


def cut(in_order: bool) -> Change:
    def change(response: Response) -> Response:
        response.cut_after_bytes, response.ends_in_order = 7_000, in_order
        return response

    return change


def overwrite(response: Response) -> Response:
    response.body = bytes(response.length)
    return response


@pytest.fixture
def snapshot(hub: LocalHub, volume: Path) -> Path:
    return volume / "demo--arithmetic" / hub.commit("demo/arithmetic")


@pytest.mark.parametrize(
    ("kind", "status"),
    [(kind, status) for kind in ("info", "tree", "resolve") for status in (408, 429, 500, 502, 503, 504)],
)
def test_transient_hub_error_is_retried(
    run: Run, hub: LocalHub, volume: Path, snapshot: Path, kind: str, status: int
) -> None:
    hub.fault = fault = Once(kind, answer(status), times=2)
    result = run("hf://demo/arithmetic", volume)
    assert result.code == 0, result.stderr
    assert len(fault.requests) == 3
    assert "attempt 2 of 3 failed" in result.stderr
    assert f"hf://demo/arithmetic:main at {hub.url} returned {status}" in result.stderr
    assert problems(snapshot) == []


@pytest.mark.parametrize("kind", ["info", "tree", "resolve"])
def test_retry_after_sets_the_wait(run: Run, hub: LocalHub, volume: Path, kind: str) -> None:
    hub.fault = fault = Once(kind, answer(429, Retry_After="1"))
    result = run("hf://demo/arithmetic", volume)
    assert result.code == 0
    assert len(fault.requests) == 2
    assert "attempt 1 of 3 failed, retrying" in result.stderr
    assert "retrying in 1.0 s" in result.stderr


@pytest.mark.parametrize("kind", ["info", "tree", "resolve"])
def test_long_retry_after_ends_the_run(run: Run, hub: LocalHub, volume: Path, kind: str) -> None:
    hub.fault = fault = Once(kind, answer(429, Retry_After="7200"), times=9)
    result = run("hf://demo/arithmetic", volume)
    assert result.code == 1
    assert "returned 429" in result.reason
    assert len(fault.requests) == 1


@pytest.mark.parametrize("kind", ["info", "tree", "resolve"])
def test_last_attempt_ends_the_run(run: Run, hub: LocalHub, volume: Path, kind: str) -> None:
    hub.fault = fault = Once(kind, answer(500), times=9)
    result = run("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_ATTEMPTS": "2"})
    assert result.code == 1
    assert "returned 500" in result.reason
    assert len(fault.requests) == 2
    assert not (volume / "demo--arithmetic").exists()


def test_truncated_body_is_resumed(run: Run, hub: LocalHub, volume: Path, snapshot: Path, model: Path) -> None:
    hub.fault = fault = Once("resolve", cut(in_order=True))
    result = run("hf://demo/arithmetic", volume)
    assert result.code == 0, result.stderr
    assert [request.headers.get("range") for request in fault.requests] == [None, "bytes=7000-"]
    assert hub.sent_bytes()[WEIGHTS] == (model / WEIGHTS).stat().st_size
    assert problems(snapshot) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (answer(503), "returned 503"),
        (cut(in_order=True), "is unreachable"),
        (overwrite, "sent wrong bytes of " + INDEX),
    ],
    ids=["status", "cut", "bytes"],
)
def test_index_for_the_plan_is_read_again_after_a_fault(
    run: Run, hub: LocalHub, volume: Path, tmp_path: Path, change: Change, reason: str
) -> None:
    model = make_model(tmp_path / "sharded", shards=2)
    index = json.loads((model / INDEX).read_text()) | {"metadata": {"padding": "x" * 10_000}}
    (model / INDEX).write_text(json.dumps(index))
    commit = hub.add("demo/sharded", model)
    hub.fault = Once("resolve", change, file=INDEX)
    result = run("hf://demo/sharded", volume)
    assert result.code == 0, result.stderr
    assert "attempt 1 of 3 failed" in result.stderr
    assert reason in result.stderr
    assert problems(volume / "demo--sharded" / commit) == []


def test_connection_reset_is_resumed(run: Run, hub: LocalHub, volume: Path, snapshot: Path, model: Path) -> None:
    hub.fault = fault = Once("resolve", cut(in_order=False))
    result = run("hf://demo/arithmetic", volume)
    assert result.code == 0, result.stderr
    assert len(fault.requests) == 2
    # What was under way when the reset came is lost.
    assert hub.sent_bytes()[WEIGHTS] <= (model / WEIGHTS).stat().st_size + 7_000
    assert problems(snapshot) == []


def test_next_run_resumes_incomplete_file(run: Run, hub: LocalHub, volume: Path, snapshot: Path, model: Path) -> None:
    hub.fault = Once("resolve", cut(in_order=True))
    assert run("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_ATTEMPTS": "1"}).code == 1
    result = run("hf://demo/arithmetic", volume)
    assert result.code == 0, result.stderr
    assert "resuming from the files of an earlier run" in result.stderr
    assert hub.sent_bytes()[WEIGHTS] == (model / WEIGHTS).stat().st_size
    assert problems(snapshot) == []


def test_mirror_without_ranges_restarts_the_file(run: Run, hub: LocalHub, volume: Path, snapshot: Path) -> None:
    first = Once("resolve", cut(in_order=True))

    def no_ranges(request: Request, response: Response) -> Response:
        if request.file == WEIGHTS and request.headers.get("range"):
            blob = hub.blobs("demo/arithmetic")[WEIGHTS]
            return Response(200, body=blob.source, length=blob.size)
        return first(request, response)

    hub.fault = no_ranges
    assert run("hf://demo/arithmetic", volume).code == 0
    assert problems(snapshot) == []


def test_body_shorter_than_listed_is_not_published(run: Run, hub: LocalHub, volume: Path) -> None:
    def shorten(response: Response) -> Response:
        response.length = 7_000
        return response

    hub.fault = Once("resolve", shorten)
    result = run("hf://demo/arithmetic", volume)
    assert result.code == 1
    assert f"{WEIGHTS} has 7000 bytes instead of" in result.reason
    assert not (volume / "demo--arithmetic").exists()
    assert run("hf://demo/arithmetic", volume).code == 0


def test_oversized_partial_file_is_restarted(run: Run, hub: LocalHub, volume: Path) -> None:
    commit = hub.commit("demo/arithmetic")
    left = volume / ".staging" / f"demo--arithmetic@{commit}.{'0' * 16}" / ".partial"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_bytes(b"x" * 100)
    (left / "config.json").write_bytes(b"x" * 100_000)

    result = run("hf://demo/arithmetic", volume)

    assert result.code == 1
    assert f"1 of its files are wrong: {WEIGHTS} has sha256" in result.reason
    assert run("hf://demo/arithmetic", volume).code == 0
    assert problems(volume / "demo--arithmetic" / commit) == []


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
def test_listing_takes_precedence_over_headers(
    run: Run, hub: LocalHub, volume: Path, snapshot: Path, header: str
) -> None:
    def mislead(_request: Request, response: Response) -> Response:
        if header in response.headers:
            response.headers[header] = '"' + "0" * 40 + '"'
        return response

    hub.fault = mislead
    assert run("hf://demo/arithmetic", volume).code == 0
    assert problems(snapshot) == []


@pytest.mark.parametrize("kind", ["info", "tree", "resolve"])
@pytest.mark.parametrize("times", [1, 9])
def test_silent_connection_is_replaced(
    run: Run, hub: LocalHub, volume: Path, snapshot: Path, times: int, kind: str
) -> None:
    released = threading.Event()

    def fall_silent(response: Response) -> Response:
        released.wait(60)
        return response

    hub.fault = fault = Once(kind, fall_silent, times)
    env = {"STORAGE_INITIALIZER_STALL_SECONDS": "0.2", "STORAGE_INITIALIZER_ATTEMPTS": "2"}
    try:
        result = run("hf://demo/arithmetic", volume, env=env)
    finally:
        released.set()
    assert len(fault.requests) == 2
    assert "stalled" in result.stderr
    if times == 1:
        assert result.code == 0
        assert problems(snapshot) == []
    else:
        assert result.code == 1
        assert "stalled. Check the network" in result.reason


def test_slow_connection_is_replaced(run: Run, hub: LocalHub, volume: Path, snapshot: Path) -> None:
    def trickle(response: Response) -> Response:
        response.bytes_per_second = 1_000
        return response

    hub.fault = fault = Once("resolve", trickle)
    env = {"STORAGE_INITIALIZER_STALL_SECONDS": "0.3", "STORAGE_INITIALIZER_STALL_BYTES_PER_SECOND": "100000"}
    result = run("hf://demo/arithmetic", volume, env=env)
    assert result.code == 0, result.stderr
    assert "stalled at" in result.stderr
    assert len(fault.requests) == 2
    assert fault.requests[1].headers["range"].startswith("bytes=")
    assert problems(snapshot) == []


def test_listing_with_several_pages_is_complete(run: Run, hub: LocalHub, volume: Path, snapshot: Path) -> None:
    def one_entry_a_page(request: Request, response: Response) -> Response:
        if request.kind == "tree":
            assert isinstance(response.body, bytes)
            path, _, page = request.path.partition("&page=")
            number, entries = int(page or 0), json.loads(response.body)
            if number + 1 < len(entries):
                response.headers["Link"] = f'<{hub.url}{path}&page={number + 1}>; rel="next"'
            response.body = json.dumps(entries[number : number + 1]).encode()
            response.length = len(response.body)
        return response

    hub.fault = one_entry_a_page
    assert run("hf://demo/arithmetic", volume).code == 0
    assert problems(snapshot) == []
    assert sorted(path.name for path in snapshot.iterdir()) == [
        ".snapshot.json",
        "README.md",
        "config.json",
        WEIGHTS,
        "tokenizer.json",
    ]


def test_redirect_to_other_host_does_not_send_the_token(
    run: Run, hub: LocalHub, model: Path, volume: Path, snapshot: Path
) -> None:
    with LocalHub({"demo/arithmetic": model}) as network:
        hub.fault = fault = Once(
            "resolve", lambda _response: Response(302, {"Location": network.url + fault.requests[-1].path}), times=9
        )
        result = run("hf://demo/arithmetic", volume, env={"HF_TOKEN": "hf_s3cr3t"})
    assert result.code == 0, result.stderr
    assert problems(snapshot) == []
    assert fault.requests[0].headers["authorization"] == "Bearer hf_s3cr3t"
    assert [request.file for request in network.requests] == [WEIGHTS]
    assert "authorization" not in network.requests[0].headers


def test_listed_file_without_content_is_worth_a_retry(run: Run, hub: LocalHub, volume: Path) -> None:
    hub.fault = fault = Once("resolve", answer(404, X_Error_Code="EntryNotFound"))
    result = run("hf://demo/arithmetic", volume)
    assert result.code == 1
    assert "does not have a file of its own listing. Run again later" in result.reason
    assert len(fault.requests) == 1
    assert not (volume / "demo--arithmetic").exists()


@pytest.mark.parametrize("kind", ["info", "tree", "resolve"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (answer(401), ("401", "set HF_TOKEN")),
        (answer(403), ("403", "set HF_TOKEN")),
        (answer(403, X_Error_Code="GatedRepo"), ("is gated", "Accept its license at", "set HF_TOKEN")),
    ],
    ids=["401", "403", "403-gated"],
)
def test_hub_auth_error_is_not_retried(
    run: Run, hub: LocalHub, volume: Path, kind: str, change: Change, words: tuple[str, ...]
) -> None:
    hub.fault = fault = Once(kind, change, times=9)
    result = run("hf://demo/arithmetic", volume)
    assert result.code == 2, result.stderr
    assert [word for word in words if word not in result.reason] == []
    assert len(fault.requests) == 1
    assert not (volume / "demo--arithmetic").exists()
