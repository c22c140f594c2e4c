"""Attention of our own on a CPU, against the manager's: the same tokens, exactly, in float32."""

import asyncio
from dataclasses import replace

import pytest
import transformers

from devtools.processes import ROOT
from predictor.engine.engine import Engine
from predictor.kernels.cpu import attention, ops
from predictor.models import loader
from predictor.types import SamplingParams

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, top_p=1.0, top_k=0)


def answers(
    prompts: list[str],
    *,
    own: bool = True,
    max_num_batched_tokens: int = 2048,
    dtype: str = "float32",
    quantization: str = "none",
    alone: bool = False,
) -> list[list[int]]:
    """Greedy tokens of all prompts, one by one or at once; and again, when prefixes are known."""
    loaded = loader.load(
        ROOT / "demo" / "model", device="cpu", dtype=dtype, trust_remote_code=False, quantization=quantization
    )
    with pytest.MonkeyPatch.context() as patch:
        if not own:
            patch.setattr(attention, "use", lambda _: False)
        engine = Engine.from_model(
            loaded.model,
            eos_token_ids=loaded.eos_token_ids,
            context_tokens=loaded.context_tokens,
            max_num_seqs=32,
            max_queued_requests=32,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_tokens=16384,
        )
    assert (loaded.model.config._attn_implementation == attention.NAME) is own
    engine.start()

    async def read(number: int, prompt: str) -> list[int]:
        ids = loaded.tokenizer.encode(prompt)
        # Of different lengths, so that those that decode and those that begin meet in one step.
        [stream] = engine.submit([(ids, replace(GREEDY, max_tokens=8 + 5 * (number % 7)))])
        try:
            return [token_id async for step in stream for token_id in step.token_ids]
        finally:
            stream.close()

    async def everything() -> list[list[int]]:
        reading = [read(number, prompt) for number, prompt in [*enumerate(prompts)] * 2]
        if alone:
            return [await one for one in reading]
        half = len(prompts)
        return [*await asyncio.gather(*reading[:half]), *await asyncio.gather(*reading[half:])]

    try:
        return asyncio.run(everything())
    finally:
        engine.stop()


PROMPTS = [f"{a}+{a * b}=" * (1 + 6 * (b % 4)) for a in range(2, 6) for b in range(1, 5)] + ["4"]


@pytest.mark.parametrize("max_num_batched_tokens", [2048, 16], ids=["whole prompts", "chunks of prompts"])
def test_gives_the_tokens_that_the_managers_own_gives(max_num_batched_tokens: int) -> None:
    ours = answers(PROMPTS, max_num_batched_tokens=max_num_batched_tokens)
    theirs = answers(PROMPTS, own=False)
    assert ours == theirs
    assert any(len(tokens) > 1 for tokens in ours)


@pytest.mark.skipif(ops.level is None, reason="nothing is computed in C here")
@pytest.mark.parametrize("max_num_batched_tokens", [2048, 16], ids=["whole prompts", "chunks of prompts"])
def test_in_c_gives_the_tokens_that_torch_gives(max_num_batched_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_c = answers(PROMPTS, max_num_batched_tokens=max_num_batched_tokens, dtype="bfloat16")
    monkeypatch.setattr(ops, "attends", lambda *_: False)
    assert in_c == answers(PROMPTS, max_num_batched_tokens=max_num_batched_tokens, dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_thirty_two_prompts_alone_and_together_give_the_same_tokens_in_8bit(dtype: str) -> None:
    prompts = [f"{a}+{b}=" for a in range(10, 18) for b in range(20, 24)]
    assert len(prompts) == 32
    together = answers(prompts, dtype=dtype, quantization="8bit")
    assert together == answers(prompts, dtype=dtype, quantization="8bit", alone=True)


def test_models_with_a_sliding_window_stay_with_the_managers_own() -> None:
    config = transformers.MistralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=99,
        sliding_window=8,
    )
    model = transformers.MistralForCausalLM(config)
    assert not attention.use(model)
    assert model.config._attn_implementation == "sdpa"
