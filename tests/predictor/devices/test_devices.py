"""The same tests on a CPU and on a GPU, for what depends on the device; `make gpu-check` runs those of a GPU."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from benchmarks.gpu_check import load_stage
from demo import exam
from devtools.architectures import CASES, save_model
from devtools.paths import DEMO_MODEL
from predictor.engine.engine import Engine
from predictor.errors import GenerationFailed, OutOfMemory, StartupError
from predictor.generation.service import LLMService
from predictor.kernels import past_key_values
from predictor.models import loader
from predictor.models.loader import LoadedModel
from predictor.settings import Settings
from tests.predictor import servers
from tests.predictor.engine.conftest import (
    GREEDY,
    LONG,
    SAMPLED,
    Generated,
    chat_ids,
    generate,
    generate_all,
    random_ids,
    read,
    started,
    until_idle,
)
from tests.predictor.servers import HANG_SECONDS, OPENAI, Call, Hold, InProcessServer, StreamReader

CROWD = 64
FEW = replace(GREEDY, max_tokens=4, ignore_eos=True)
CACHE = ("--kv_cache_tokens", "8192")
"""The default would take most of a GPU's memory, which several servers share here."""
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
SLOW_CPU = pytest.param("cpu", marks=pytest.mark.slow)


def available(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return device


@pytest.fixture(scope="module", params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return available(request.param)


@pytest.fixture(params=[SLOW_CPU, CUDA])
def process_device(request: pytest.FixtureRequest) -> str:
    return available(request.param)


@pytest.fixture(scope="module")
def loaded(device: str) -> LoadedModel:
    return loader.load(DEMO_MODEL, device=device, dtype="float32")


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[Engine]:
    changes = {"max_num_seqs": CROWD, "max_num_batched_tokens": 512, "kv_cache_tokens": CROWD * 512}
    with started(loaded, max_queued_requests=CROWD, **changes) as running:
        yield running


@pytest.fixture(scope="module")
def server(device: str) -> Iterator[InProcessServer]:
    flags = ("--device", device, *CACHE, "--max_num_seqs", "4", "--max_queued_requests", "4")
    with servers.in_process(*flags, model_name=f"on-{device}") as running:
        yield running


@contextmanager
def failing_once(
    loaded: LoadedModel, fail: Callable[[], Any], *, if_: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Call `fail`, which raises, before the next forward pass for which `if_` holds."""

    def hook(*_: Any) -> None:
        if if_():
            handle.remove()
            fail()

    handle = loaded.model.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


MODES = [
    parameters
    for mode in load_stage.all_modes()
    for parameters in (
        pytest.param("cpu", mode, marks=[] if mode == "float32" else pytest.mark.slow, id=f"cpu-{mode}"),
        pytest.param("cuda", mode, marks=pytest.mark.gpu, id=f"cuda-{mode}"),
    )
]


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_mode_answers_sums_correctly(name: str, mode: str) -> None:
    device_modes = load_stage.modes(available(name))
    if mode not in device_modes:
        pytest.skip(f"this device has no {mode}")
    dtype, quantization = device_modes[mode]
    assert load_stage.measure(name, dtype, quantization, 60)["correct"] >= load_stage.LEAST_CORRECT


def test_greedy_tokens_are_equal_alone_and_in_a_crowd(engine: Engine, loaded: LoadedModel) -> None:
    prompts = [chat_ids(loaded, question) for question, _ in exam.held_out_questions(CROWD)]
    alone = [generate(engine, ids, GREEDY) for ids in prompts[:4]]
    crowd = generate_all(engine, [(ids, GREEDY) for ids in prompts])
    assert crowd[:4] == alone


def test_cancelled_sequence_frees_its_place_within_two_steps(engine: Engine, loaded: LoadedModel) -> None:
    hold = Hold()
    handle = loaded.model.register_forward_pre_hook(hold)

    async def leave() -> int:
        [stream] = engine.submit([(chat_ids(loaded, "What is 17 + 25?"), LONG)])
        await anext(stream)
        hold.close()
        assert await asyncio.to_thread(hold.blocked.wait, HANG_SECONDS)
        assert engine.running == 1
        before = engine.steps
        stream.close()
        hold.open()
        await until_idle(engine)
        return engine.steps - before

    try:
        assert asyncio.run(leave()) <= 2
    finally:
        hold.open()
        handle.remove()
    assert engine.cache_usage == 0.0


@pytest.fixture(scope="module")
def half() -> LoadedModel:
    """In bfloat16, for which CUDA has the attention over block tables that graphs need."""
    return loader.load(DEMO_MODEL, device=available("cuda"), dtype="bfloat16")


def started_half(loaded: LoadedModel, **changes: Any) -> AbstractContextManager[Engine]:
    return started(loaded, max_num_seqs=CROWD, max_queued_requests=CROWD, kv_cache_tokens=CROWD * 512, **changes)


@pytest.mark.gpu
def test_graphs_give_the_tokens_of_eager_steps(half: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [chat_ids(half, question) for question, _ in exam.held_out_questions(CROWD)]
    sampled = replace(SAMPLED, seed=3, temperature=1.0, max_tokens=48)
    alone, crowds = [], []
    for enforce_eager in (True, False):
        caplog.clear()
        with caplog.at_level("INFO"), started_half(half, enforce_eager=enforce_eager) as engine:
            assert ("7 CUDA graphs" in caplog.text) is not enforce_eager
            alone.append([generate(engine, ids, sampling) for ids in prompts[:4] for sampling in (GREEDY, sampled)])
            crowds.append(generate_all(engine, [(ids, GREEDY) for ids in prompts]))
    assert alone[0] == alone[1]
    equal = sum(eager.token_ids == replayed.token_ids for eager, replayed in zip(*crowds, strict=True))
    assert equal >= load_stage.LEAST_CORRECT * CROWD, "up to the rounding of other shapes"


@pytest.mark.gpu
def test_what_cannot_be_captured_is_computed(half: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    ids = chat_ids(half, "What is 17 + 25?")
    with started_half(half, enforce_eager=True) as engine:
        expected = generate(engine, ids, GREEDY)
    handle = half.model.model.norm.register_forward_pre_hook(lambda _, args: args[0].sum().item() and None)
    try:
        with started_half(half) as engine:
            assert "no CUDA graphs" in caplog.text
            assert generate(engine, ids, GREEDY) == expected
            # From torch's own generator, which a failed capture would leave unusable.
            assert len(generate(engine, ids, SAMPLED).token_ids) == SAMPLED.max_tokens
    finally:
        handle.remove()


def raise_error() -> None:
    raise RuntimeError("a kernel failed")


@pytest.mark.parametrize("error", ["failed", "out of memory"])
def test_failed_step_fails_its_sequences_only(engine: Engine, loaded: LoadedModel, device: str, error: str) -> None:
    def allocate() -> torch.Tensor:
        return torch.empty(2**50, dtype=torch.int8, device=device)

    ids = chat_ids(loaded, "What is 17 + 25?")
    expected = generate(engine, ids, GREEDY)
    before = engine.failed_steps
    fail, expected_error = (raise_error, GenerationFailed) if error == "failed" else (allocate, OutOfMemory)
    with failing_once(loaded, fail), pytest.raises(expected_error):
        generate(engine, ids, GREEDY)
    assert engine.failed_steps == before + 1
    assert engine.is_alive
    assert generate(engine, ids, GREEDY) == expected


def test_step_out_of_memory_costs_the_newest_of_a_crowd(engine: Engine, loaded: LoadedModel, device: str) -> None:
    requests = [(chat_ids(loaded, question), GREEDY) for question, _ in exam.held_out_questions(8)]
    expected = generate_all(engine, requests)
    # Set by tests before.
    engine._executor._manager.batch_processor.scheduler.limited_steps = 0  # type: ignore[attr-defined]

    async def together() -> list[Generated | BaseException]:
        return await asyncio.gather(*map(read, engine.submit(requests)), return_exceptions=True)

    def allocate() -> torch.Tensor:
        return torch.empty(2**50, dtype=torch.int8, device=device)

    with failing_once(loaded, allocate, if_=lambda: engine.running == len(requests)):
        *others, newest = asyncio.run(together())
    assert isinstance(newest, OutOfMemory)
    assert others == expected[:-1]


def test_default_kv_cache_leaves_room_for_full_steps(loaded: LoadedModel) -> None:
    sequences, tokens = 16, 128
    limits = {"max_num_seqs": sequences, "max_num_batched_tokens": sequences * tokens, "kv_cache_tokens": None}
    with started(loaded, max_queued_requests=0, **limits) as running:
        generated = generate_all(running, [(random_ids(loaded, tokens, seed), FEW) for seed in range(sequences)])
        assert running.cache_tokens >= 2 * sequences * tokens
        assert running.failed_steps == 0
    assert [len(each.token_ids) for each in generated] == [FEW.max_tokens] * sequences


def wait_for_sequences(server: InProcessServer, number: int) -> None:
    """Wait until `number` sequences run or wait; a blocked step may have begun with one of them."""
    server.wait_for(lambda: server.metric("num_requests_running") + server.metric("num_requests_waiting") == number)


def test_grammar_constrains_its_row_only(server: InProcessServer) -> None:
    free = Call(server, OPENAI, 6)
    alone = free.post().json()["choices"][0]["text"]
    more = {"structured_outputs": {"regex": "[a-c]{5}"}, "ignore_eos": False}
    held = Call(server, OPENAI, 16, more=more)
    server.hold.close()
    with ThreadPoolExecutor(3) as threads:
        posts = [threads.submit(call.post) for call in (held, free, free)]
        wait_for_sequences(server, 3)
        server.hold.open()
        constrained, *others = [post.result().json()["choices"][0]["text"] for post in posts]
    assert len(constrained) == 5
    assert set(constrained) <= set("abc")
    assert others == [alone, alone]


def test_overload_is_refused_with_429(server: InProcessServer) -> None:
    server.hold.close()
    with ThreadPoolExecutor(1) as threads:
        full = threads.submit(Call(server, OPENAI, 4, more={"n": 8}).post)
        wait_for_sequences(server, 8)
        refused = Call(server, OPENAI, 1).post()
        server.hold.open()
        assert full.result().status_code == 200
    assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (429, True)
    server.wait_until_idle()


def test_warm_up_refuses_layers_that_drop_the_cache(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(CASES["nemotron"], tmp_path)
    monkeypatch.setattr(past_key_values, "MODEL_TYPES", frozenset())
    service = LLMService(Settings(model_dir=tmp_path, device=device, max_num_seqs=4, kv_cache_tokens=1024))
    try:
        with pytest.raises(StartupError, match="this NemotronForCausalLM failed"):
            service.load()
    finally:
        service.stop()


def test_process_drains_on_sigterm(process_device: str, tmp_path: Path) -> None:
    with servers.own_process(tmp_path, "--device", process_device, *CACHE) as (server, orders):
        call = Call(server, OPENAI, 300)
        whole = call.post().json()["choices"][0]["text"]
        orders.give("slow")
        stream = StreamReader()
        with ThreadPoolExecutor(1) as threads:
            reader = threads.submit(stream.read, call)
            assert stream.started.wait(HANG_SECONDS)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_status(503, "/v2/health/ready")
            orders.withdraw()
            reader.result(HANG_SECONDS)
        assert (stream.text, stream.finish_reason) == (whole, "length")
        assert server.process.wait(HANG_SECONDS) == 0


def test_process_killed_in_a_step_leaves_the_device_to_the_next(process_device: str, tmp_path: Path) -> None:
    flags = ("--device", process_device, *CACHE)
    with servers.own_process(tmp_path, *flags) as (server, orders):
        whole = Call(server, OPENAI, 20).post().json()["choices"][0]["text"]
        orders.give("slow")
        stream = StreamReader()
        with ThreadPoolExecutor(1) as threads:
            reader = threads.submit(stream.read, Call(server, OPENAI, 900))
            assert stream.started.wait(HANG_SECONDS)
            server.process.kill()
            with pytest.raises(httpx.TransportError):
                reader.result(HANG_SECONDS)
        assert server.process.wait(HANG_SECONDS) == -signal.SIGKILL
    with servers.own_process(tmp_path, *flags) as (server, _):
        assert Call(server, OPENAI, 20).post().json()["choices"][0]["text"] == whole
