"""Attention of our own on a CPU, against the manager's: the same tokens, exactly, in float32."""

import asyncio
from dataclasses import replace

import pytest
import transformers

from demo.processes import ROOT
from predictor import attention, loader
from predictor.engine import Engine
from predictor.generation import SamplingParams

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, top_p=1.0, top_k=0)


def answers(prompts: list[str], *, own: bool, max_batch_tokens: int, quantization: str = "none") -> list[list[int]]:
    """Greedy tokens of all prompts at once, and again, when prefixes are known."""
    loaded = loader.load(
        ROOT / "demo" / "model", device="cpu", dtype="float32", trust_remote_code=False, quantization=quantization
    )
    with pytest.MonkeyPatch.context() as patch:
        if not own:
            patch.setattr(attention, "use", lambda _: False)
        engine = Engine(
            loaded.model,
            eos_token_ids=loaded.eos_token_ids,
            context_tokens=loaded.context_tokens,
            max_running=8,
            max_waiting=64,
            max_batch_tokens=max_batch_tokens,
            kv_cache_tokens=8192,
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
        first = await asyncio.gather(*(read(number, prompt) for number, prompt in enumerate(prompts)))
        return [*first, *await asyncio.gather(*(read(number, prompt) for number, prompt in enumerate(prompts)))]

    try:
        return asyncio.run(everything())
    finally:
        engine.stop()


PROMPTS = [f"{a}+{a * b}=" * (1 + 6 * (b % 4)) for a in range(2, 6) for b in range(1, 5)] + ["4"]


@pytest.mark.parametrize("max_batch_tokens", [2048, 16], ids=["whole prompts", "chunks of prompts"])
def test_gives_the_tokens_that_the_managers_own_gives(max_batch_tokens: int) -> None:
    ours = answers(PROMPTS, own=True, max_batch_tokens=max_batch_tokens)
    theirs = answers(PROMPTS, own=False, max_batch_tokens=2048)
    assert ours == theirs
    assert any(len(tokens) > 1 for tokens in ours)


def test_neighbours_change_no_token_in_8bit_either() -> None:
    prompts = [f"{a}+{b}=" for a in range(10, 18) for b in range(20, 24)]
    together = answers(prompts, own=True, max_batch_tokens=2048, quantization="8bit")
    alone = [
        tokens
        for some in range(0, 32, 4)
        for tokens in [answers(prompts[some : some + 1], own=True, max_batch_tokens=2048, quantization="8bit")[0]]
    ]
    # The n-th of all and the only one have different limits: the shorter is the beginning of the longer.
    for number, tokens in zip(range(0, 32, 4), alone, strict=True):
        among = together[number]
        shorter = min(len(among), len(tokens))
        assert among[:shorter] == tokens[:shorter]


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
