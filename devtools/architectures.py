"""Serve tiny random models of many architectures, and write docs/architectures.md from the results.

In float32 the engine's tokens are compared with those of transformers' `generate`; with 8-bit weights each token is
compared with the logits of a forward pass of the same model.

`python -m devtools.architectures` writes the table, `--check` only fails if it is out of date.
"""

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from devtools import tiny_poolers
from devtools.paths import DEMO_MODEL, ROOT
from devtools.tiny_poolers import CAUSAL
from predictor.engine import warm_up
from predictor.engine.engine import Engine
from predictor.engine.pooling_model import PoolingInput, PoolingModel
from predictor.errors import UnsupportedModel
from predictor.kernels.cpu.layer_table import LAYERS
from predictor.models import architectures, load_plan, loader, sharding
from predictor.models.loader import LoadedModel
from predictor.settings import Settings
from predictor.types import SamplingParams, Task

DOCUMENT = ROOT / "docs" / "architectures.md"
MARK = "<!-- The rest of this page is written by `python -m devtools.architectures`. -->\n"
POOLING_TITLE = """## Results of models that embed or classify

Rows of one batch of five texts are those of transformers' forward passes of each text alone, within 1e-5.
"""
VOCABULARY = 512
PROMPT_TOKENS = (1, 7, 20, 45, 90)
"""Prompts of one batch; a step computes 32 tokens, so that long ones are computed in chunks."""
NEW_TOKENS = 24
TOLERANCE_8BIT = 0.05
"""Rounding causes a shortfall of 0.023 at most, in `llama, llama3 rope`."""

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_ROPE = {"rope_theta": 10000.0}


@dataclass(frozen=True, slots=True)
class Case:
    """One architecture, or one variant of it."""

    model_type: str
    """As in config.json."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Of config.json, in addition to sizes."""
    base: dict[str, Any] = field(default_factory=lambda: _DECODER)

    def config(self) -> Any:
        """Return the transformers config."""
        return transformers.AutoConfig.for_model(self.model_type, **self.base | self.fields)


CASES: dict[str, Case] = {
    "llama": Case("llama"),
    "llama, biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied embeddings": Case("llama", {"tie_word_embeddings": True}),
    "llama, linear rope": Case("llama", {"rope_parameters": _ROPE | {"rope_type": "linear", "factor": 2.0}}),
    "llama, dynamic rope": Case(
        "llama",
        {"max_position_embeddings": 128, "rope_parameters": _ROPE | {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama, yarn": Case(
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": _ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    "llama, llama3 rope": Case(
        "llama",
        {
            "rope_parameters": _ROPE
            | {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "gpt2": Case("gpt2", {"n_positions": 512, "n_embd": 64, "n_layer": 3, "n_head": 4}, _GPT),
    "gpt_neox": Case("gpt_neox", {"num_key_value_heads": 4, "rotary_pct": 0.25}),
    "gpt_neo": Case(
        "gpt_neo",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 4,
            "max_position_embeddings": 512,
            "window_size": 16,
        },
        _GPT,
    ),
    "opt": Case(
        "opt",
        {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "init_std": 0.2,
        },
        _GPT,
    ),
    "bloom": Case("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4}, _GPT),
    "falcon": Case(
        "falcon",
        {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        },
        _GPT,
    ),
    "falcon, new decoder": Case(
        "falcon",
        {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
        },
        _GPT,
    ),
    "falcon, alibi": Case(
        "falcon", {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": True}, _GPT
    ),
    "phi": Case("phi", {"num_key_value_heads": 4}),
    "phi3": Case("phi3"),
    "phi3, sliding window": Case("phi3", {"sliding_window": 16}),
    "phi3, partial rotary": Case("phi3", {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5}}),
    "phi3, longrope": Case(
        "phi3",
        {
            "original_max_position_embeddings": 128,
            "rope_parameters": _ROPE
            | {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "gemma": Case("gemma", {"head_dim": 16}),
    "gemma2": Case("gemma2", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3_text": Case(
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 16, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16},
    ),
    "mistral": Case("mistral", {"sliding_window": None}),
    "mistral, sliding window": Case("mistral", {"sliding_window": 16}),
    "mixtral": Case("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": Case("qwen2"),
    "qwen2, sliding window": Case("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": Case("qwen3", {"head_dim": 16}),
    "qwen2_moe": Case("qwen2_moe", _EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": Case("qwen3_moe", _EXPERTS | {"head_dim": 16, "moe_intermediate_size": 32}),
    "qwen3_next": Case(
        "qwen3_next",
        _EXPERTS
        | {
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_hidden_layers": 4,
        },
    ),
    "stablelm": Case("stablelm", {"num_key_value_heads": 4}),
    "starcoder2": Case("starcoder2", {"sliding_window": None}),
    "starcoder2, sliding window": Case("starcoder2", {"sliding_window": 16}),
    "olmo2": Case("olmo2"),
    "olmo3": Case("olmo3", {"sliding_window": 16}),
    "olmoe": Case("olmoe", _EXPERTS),
    "cohere": Case("cohere"),
    "cohere2": Case("cohere2", {"sliding_window": 16, "head_dim": 16}),
    "granite": Case(
        "granite",
        {
            "attention_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
        },
    ),
    "granitemoe": Case("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": Case(
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
    ),
    "gpt_oss": Case(
        "gpt_oss", {"head_dim": 16, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "gpt_oss, full attention": Case(
        "gpt_oss",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention"] * 3,
        },
    ),
    "smollm3": Case("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "glm": Case("glm", {"head_dim": 16}),
    "glm4": Case("glm4", {"head_dim": 16}),
    "exaone4": Case("exaone4", {"sliding_window": 16}),
    "nemotron": Case("nemotron"),
    "lfm2": Case("lfm2", {"num_hidden_layers": 4, "full_attn_idxs": [1, 3]}),
    "mamba": Case("mamba", {"hidden_size": 64, "num_hidden_layers": 2}, _GPT),
    "jamba": Case("jamba", {"num_hidden_layers": 4, "num_experts": 2, "mamba_d_state": 8, "use_mamba_kernels": False}),
    "t5": Case("t5", {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}, _GPT),
    "bert": Case(
        "bert",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
        _GPT,
    ),
}


_DEBERTA: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_MODERNBERT: dict[str, Any] = {"global_attn_every_n_layers": 2, "local_attention": 8}
_EMBEDDERS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "bert": {},
    "deberta-v2": _DEBERTA,
    "distilbert": {"hidden_dim": 64, "n_layers": 2, "n_heads": 2, "dim": 32},
    "electra": {"embedding_size": 16},
    "eurobert": CAUSAL,
    "gemma3_text": CAUSAL | {"use_bidirectional_attention": True, "sliding_window": 8},
    "llama": CAUSAL,
    "mistral": CAUSAL | {"sliding_window": None},
    "modernbert": _MODERNBERT,
    "mpnet": {},
    "nomic_bert": {"head_dim": 16},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": CAUSAL,
    "roberta": {},
    "xlm-roberta": {},
}
_CLASSIFIERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "deberta-v2": _DEBERTA,
    "modernbert": _MODERNBERT,
    "qwen3": CAUSAL,
    "xlm-roberta": {},
}
POOLING_CASES: dict[str, tuple[Task, str, dict[str, Any]]] = {
    **{f"{name}, embeddings": (Task.EMBED, name, fields) for name, fields in _EMBEDDERS.items()},
    **{
        f"{name}, classifier": (Task.CLASSIFY, name, {"num_labels": 1, **fields})
        for name, fields in _CLASSIFIERS.items()
    },
}
"""Task, `model_type` and fields of config.json of models that embed or classify, by name of their row."""
POOLING_TOLERANCE = 1e-5
POOLING_LENGTHS = (1, 4, 9, 23, 40)


def save_config(case: Case, directory: Path) -> None:
    """Save config.json and the demo model's tokenizer, without weights."""
    config = case.config()
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    config.architectures = [model_class.__name__] if model_class else None
    config.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, directory)


def save_model(case: Case, directory: Path) -> None:
    """Save a model with random weights and the demo model's tokenizer."""
    save_config(case, directory)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(case.config(), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in name and "ln" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory)


def make_prompts() -> list[list[int]]:
    """Return the prompts, of random tokens that are not special."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, VOCABULARY, (count,), generator=generator).tolist() for count in PROMPT_TOKENS]


def generate_with_transformers(directory: Path) -> list[list[int]]:
    """Return `generate`'s greedy tokens for each prompt, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    completions: list[list[int]] = []
    for prompt in make_prompts():
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        completions.append(output[0, len(prompt) :].tolist())
    return completions


def generate_with_engine(loaded: LoadedModel) -> list[list[int]]:
    """Return the engine's greedy tokens for each prompt, all of them in one batch."""
    engine = Engine.from_model(
        loaded.model,
        Settings(max_num_seqs=8, max_num_batched_tokens=32, kv_cache_tokens=4096),
        eos_token_ids=loaded.eos_token_ids,
        context_tokens=loaded.context_tokens,
    )
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, top_p=1.0, top_k=0, ignore_eos=True)

    async def generate() -> list[list[int]]:
        streams = engine.submit([(prompt, sampling) for prompt in make_prompts()])
        return [[token async for step in stream for token in step.token_ids] for stream in streams]

    engine.start()
    try:
        return asyncio.run(generate())
    finally:
        engine.stop()


def compare_8bit(directory: Path) -> float:
    """Return the largest shortfall of the engine's tokens with 8-bit weights, as `warm_up.shortfall`.

    In bfloat16 the forward pass without a cache rounds attention otherwise than the engine, and tokens near the border
    between two experts get others.
    """
    options: load_plan.LoadOptions = {"device": "cpu", "dtype": "float32", "quantization": "8bit"}
    completions = generate_with_engine(loader.load(directory, **options))
    model = loader.load(directory, **options).model
    shortfalls: list[float] = []
    for prompt, completion in zip(make_prompts(), completions, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        shortfalls.append(warm_up.shortfall(logits, completion))
    return max(shortfalls)


def decoder_layer_class(case: Case) -> str:
    """Return the name of the class of transformers' decoder layers."""
    model_class: str = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(case.model_type, "")
    return model_class.replace("ForCausalLM", "DecoderLayer")


def has_fused_layers(case: Case) -> bool:
    """Whether the decoder layers are fused on a CPU."""
    return decoder_layer_class(case) in LAYERS


def describe(name: str) -> str:
    """Serve the case, or find that it is refused before its weights are read, and return its row of the table."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        save_config(case, directory)
        refused = architectures.refusal(case.config())
        if refused is not None:
            result = "refused" if refused.reason in _error_without_weights(directory) else "DIFFERS"
            return _row(name, case.model_type, result, result, "", "", f"{refused.reason}; use {refused.remedy}")
        save_model(case, directory)
        is_exact = generate_with_engine(loader.load(directory, device="cpu", dtype="float32")) == (
            generate_with_transformers(directory)
        )
        is_close = compare_8bit(directory) <= TOLERANCE_8BIT
    return _row(
        name,
        case.model_type,
        "exact" if is_exact else "DIFFERS",
        "exact" if is_close else "DIFFERS",
        "fused" if has_fused_layers(case) else "plain",
        "no" if sharding.refusal(case.config()) else "yes",
        "",
    )


def describe_pooling(name: str) -> str:
    """Compare rows of one batch with forward passes of each text alone, and return the case's row of the table."""
    task, model_type, fields = POOLING_CASES[name]
    model_class = getattr(transformers, architectures.AUTO_CLASSES[task])
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        tiny_poolers.save_model(directory, model_class, model_type, **fields)
        tiny_poolers.save_tokenizer(directory)
        loaded = loader.load(directory, device="cpu", dtype="float32", task=task)
        assert loaded.pooling is not None
        model = model_class.from_pretrained(directory, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(5, 200, (count,), generator=generator) for count in POOLING_LENGTHS]
    rows = PoolingModel(loaded.model, loaded.pooling)([PoolingInput(text.tolist()) for text in texts])
    differences = []
    for row, text in zip(rows, texts, strict=True):
        with torch.no_grad():
            output = model(input_ids=text[None], attention_mask=torch.ones_like(text)[None])
        expected = output.logits[0].sigmoid() if task is Task.CLASSIFY else _pool(output, loaded.pooling.modes)
        differences.append(float((torch.tensor(row) - expected).abs().amax()))
    result = "exact" if max(differences) <= POOLING_TOLERANCE else "DIFFERS"
    return _row(name, model_type, task, "+".join(loaded.pooling.modes) or loaded.pooling.activation, result)


def _pool(output: Any, modes: Sequence[str]) -> torch.Tensor:
    states = output.last_hidden_state[0]
    embedding: torch.Tensor = states.mean(0) if modes == ("mean",) else states[-1]
    return embedding / embedding.norm()


def rows_in_document() -> dict[str, str]:
    """Return the documented rows by the names of their cases."""
    lines = DOCUMENT.read_text().partition(MARK)[2].splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}


def _error_without_weights(directory: Path) -> str:
    try:
        load_plan.make_plan(directory, device="cpu", task="generate")
    except UnsupportedModel as error:
        return str(error)
    raise AssertionError("a plan was made without weights")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("  |", " |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the document; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m devtools.architectures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the table is out of date")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    head = [
        _row("Model", "`model_type`", "float32", "8 bit", "Layers on a CPU", "Ranks", "Refused because"),
        _row("---", "---", "---", "---", "---", "---", "---"),
    ]
    pooling_head = [
        _row("Model", "`model_type`", "Task", "By default", "float32"),
        _row("---", "---", "---", "---", "---"),
    ]
    tables = [[*head, *map(describe, CASES)], [*pooling_head, *map(describe_pooling, POOLING_CASES)]]
    table = f"\n{POOLING_TITLE}\n".join("\n".join(lines) + "\n" for lines in tables)
    prose, _, documented = DOCUMENT.read_text().partition(MARK)
    if options.check:
        return int(documented.strip() != table.strip())
    DOCUMENT.write_text(f"{prose}{MARK}\n{table}")
    return int("DIFFERS" in table)


if __name__ == "__main__":
    sys.exit(main())
