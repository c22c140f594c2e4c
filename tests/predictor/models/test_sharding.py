"""Models divided among two ranks, against one process; and those that cannot be."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from devtools.architectures import (
    CASES,
    Case,
    generate_with_engine,
    make_prompts,
    rows_in_document,
    save_config,
    save_model,
)
from predictor.engine.engine import Engine
from predictor.errors import InvalidSettings, RankLost, StartupError, UnsupportedModel
from predictor.kernels import shards, tensor_parallel
from predictor.kernels.cpu import gemm, linear
from predictor.kernels.cpu.decoder_layer import DecoderLayer
from predictor.kernels.cpu.linear import Int8Linear
from predictor.kernels.fp8 import Fp8Linear
from predictor.models import adapter as adapters
from predictor.models import load_plan, loader, placement, quantization
from predictor.models.fp8_quantizer import Fp8Config
from predictor.models.int8_quantizer import Int8Config
from predictor.models.loader import LoadedModel
from predictor.settings import Settings
from snapshot_format.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SINGLE
from tests.predictor import ranks
from tests.sizes import IS_NIGHTLY

FUSED = ("llama, biases", "qwen3", "phi3")
"""Cases whose decoder layers are fused."""
EXPERTS = "mixtral"
"""Whose decoder layers are fused in one process; ranks share experts as transformers does."""
UNFUSED = ("starcoder2", EXPERTS)
MORE = tuple(name for name, row in rows_in_document().items() if "| yes |" in row and name not in (*FUSED, *UNFUSED))
"""All of them are tested every night, else every fourth."""
SLOW = MORE if IS_NIGHTLY else MORE[::4]
PRECISIONS = (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "8bit"))
CUDA, GIB = torch.device("cuda", 0), 2**30


@dataclass(frozen=True)
class Computed:
    """What a rank computes with a model."""

    logits: torch.Tensor
    fused_layers: int


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans be made for two ranks, without a group."""
    monkeypatch.setattr(tensor_parallel, "size", lambda: 2)


# What each rank runs


def fail_alone(directory: Path) -> str:
    """Quantize a model on one rank while the other has failed, and return the error."""
    if tensor_parallel.rank():
        return ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_parallel, "EXCHANGE_SECONDS", 1.0)
        with pytest.raises(RankLost) as lost:
            load(directory, "bfloat16", "8bit")
    return str(lost.value)


def load(directory: Path, dtype: str, mode: str) -> LoadedModel:
    return loader.load(directory, device="cpu", dtype=dtype, quantization=mode)


def _load_adapted(directory: Path, adapter: Path) -> LoadedModel:
    return loader.load(directory, device="cpu", dtype="float32", adapter_dir=adapter)


def _load_fp8(directory: Path) -> Any:
    """Load a model in fp8, which the kernels need no GPU for."""
    plan = load_plan.make_plan(directory, device="cpu", dtype="bfloat16")
    model = loader.execute(replace(plan, quantization="fp8", quantization_config=Fp8Config())).model
    assert sum(isinstance(module, Fp8Linear) for module in model.modules()) == 3 * 7
    return model


def compute(model: Any) -> Computed:
    with torch.inference_mode():
        input_ids = torch.tensor([make_prompts()[3]], device=model.device)
        logits = model(input_ids, use_cache=False).logits[0].float().cpu()
    return Computed(logits, sum(isinstance(module, DecoderLayer) for module in model.modules()))


def compute_on_gpu(directory: Path, mode: str) -> Computed:
    return compute(loader.load(directory, device="cuda", dtype="bfloat16", quantization=mode).model)


def compute_all(directories: Sequence[Path]) -> list[list[Computed]]:
    return [[compute(load(directory, dtype, mode).model) for dtype, mode in PRECISIONS] for directory in directories]


def generate(directories: Sequence[Path]) -> list[list[list[int]]]:
    """Return rank 0's tokens; the others follow it."""
    tokens: list[list[list[int]]] = []
    for directory in directories:
        loaded = load(directory, "float32", "none")
        if tensor_parallel.rank() == 0:
            tokens.append(generate_with_engine(loaded))
        else:
            _follow(loaded)
    return tokens


def _follow(loaded: LoadedModel) -> None:
    settings = Settings(max_num_seqs=8, max_num_batched_tokens=32, kv_cache_tokens=4096)
    engine = Engine.from_model(
        loaded.model, settings, eos_token_ids=loaded.eos_token_ids, context_tokens=loaded.context_tokens
    )
    engine.start()
    while not engine.has_ended:
        time.sleep(0.01)


def int8_parameters(directory: Path, quantize: bool) -> dict[str, torch.Tensor]:
    """Return this rank's part of int8 weights and scales, before they are packed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        **({"quantization_config": Int8Config()} if quantize else {}),
        **placement.place(torch.device("cpu"), "8bit", 0, 0, lambda: 0).arguments(),
    )
    return {
        f"{name}.{part}": shards.local(getattr(module, part))
        for name, module in model.named_modules()
        if isinstance(module, Int8Linear)
        for part in ("weight", "scale")
    }


def read_bytes(directory: Path, adapter: Path | None = None) -> int:
    """Load a model and return the bytes that were read of its weights."""
    count = 0

    class CountingSlice:
        def __init__(self, weights: Any) -> None:
            self._weights = weights

        def __getattr__(self, name: str) -> Any:
            return getattr(self._weights, name)

        def __getitem__(self, index: Any) -> torch.Tensor:
            nonlocal count
            tensor: torch.Tensor = self._weights[index]
            count += tensor.nbytes
            return tensor

    class CountingFile:
        def __init__(self, *args: Any, **options: Any) -> None:
            self._file: Any = safetensors.safe_open(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Any:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def get_slice(self, name: str) -> CountingSlice:
            return CountingSlice(self._file.get_slice(name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_open", CountingFile)
        patch.setattr(adapters, "safe_open", CountingFile)
        loader.load(directory, device="cpu", dtype="float32", adapter_dir=adapter)
    return count


def run_default_tier(directories: Sequence[Path], quantized: Path, adapter: Path) -> dict[str, Any]:
    """Everything of the default tier: starting two ranks takes most of the time."""
    return {
        "computed": compute_all(directories),
        "tokens": generate(directories),
        "int8": int8_parameters(directories[0], quantize=True),
        "prepared": int8_parameters(quantized, quantize=False),
        "prepared logits": compute(load(quantized, "bfloat16", "none").model),
        "fp8": compute(_load_fp8(directories[0])),
        "adapted": compute(_load_adapted(directories[0], adapter).model),
        "read_bytes": (read_bytes(directories[0]), read_bytes(directories[0], adapter)),
        "device_map": load(directories[0], "float32", "none").device_map,
        "gathered": tensor_parallel.all_gather(torch.arange(5).chunk(2)[tensor_parallel.rank()], 5).tolist(),
        "lost": fail_alone(directories[0]),  # last: it breaks the group
    }


# Two ranks against one process


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: _save(name, tmp_path_factory.mktemp("model")) for name in (*FUSED, *UNFUSED)}


@pytest.fixture(scope="module")
def quantized(directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first model, quantized as the storage initializer does it."""
    directory, source = tmp_path_factory.mktemp("int8"), directories[FUSED[0]]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=Int8Config()
    )
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the first model, of layers that are divided by outputs and by inputs."""
    directory = tmp_path_factory.mktemp("adapter")
    (directory / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, "r": 2}))
    prefix, generator = "base_model.model.model.layers.0.", torch.Generator().manual_seed(5)
    shapes = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 128)}
    tensors = {}
    for name, (outputs, inputs) in shapes.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator)
    save_file(tensors, directory / ADAPTER_WEIGHTS)
    return directory


@pytest.fixture(scope="module")
def divided(directories: dict[str, Path], quantized: Path, adapter: Path) -> list[dict[str, Any]]:
    """What two ranks computed."""
    return ranks.run(2, run_default_tier, [*directories.values()], quantized, adapter)


def _save(name: str, directory: Path) -> Path:
    save_model(CASES[name], directory)
    return directory


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Median over tokens: rounding changes the experts of a few tokens."""
    return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def check_logits(ours: Sequence[Computed], other: Sequence[Computed], single: Sequence[Computed]) -> None:
    """Compare the logits of both ranks with those of one process, in each of `PRECISIONS`."""
    exact = single[0].logits
    for rank_0, rank_1, alone in zip(ours, other, single, strict=True):
        assert torch.equal(rank_0.logits, rank_1.logits)
        # The sums of two ranks are rounded once more, and layers that are not fused round activations as well.
        limit = 1.15 if rank_0.fused_layers == alone.fused_layers else 1.7
        assert relative_error(rank_0.logits, exact) < limit * relative_error(alone.logits, exact) + 1e-5
    assert relative_error(ours[0].logits, exact) < 1e-5
    assert relative_error(ours[1].logits, single[1].logits) < 0.03
    # Activations are quantized with a scale for each rank's inputs.
    assert relative_error(ours[2].logits, single[2].logits) < 0.06


@pytest.mark.slow
def test_logits_of_two_ranks_are_those_of_one(directories: dict[str, Path], divided: list[dict[str, Any]]) -> None:
    single = compute_all([*directories.values()])
    for index, name in enumerate(directories):
        check_logits(divided[0]["computed"][index], divided[1]["computed"][index], single[index])
        assert single[index][2].fused_layers == (3 if name in (*FUSED, EXPERTS) else 0)
        assert divided[0]["computed"][index][2].fused_layers == (3 if name in FUSED else 0)


@pytest.mark.slow
def test_tokens_of_two_ranks_are_those_of_one(directories: dict[str, Path], divided: list[dict[str, Any]]) -> None:
    assert divided[0]["tokens"] == generate([*directories.values()])


@pytest.mark.parametrize("source", ["int8", "prepared"])
@pytest.mark.slow
def test_int8_parts_make_the_weights_of_one_rank(
    directories: dict[str, Path], divided: list[dict[str, Any]], source: str
) -> None:
    whole = int8_parameters(directories[FUSED[0]], quantize=True)
    assert len(whole) == 3 * 7 * 2
    for name, expected in whole.items():
        has_some_inputs = any(layer in name for layer in ("o_proj", "down_proj"))
        parts = [rank[source][name] for rank in divided]
        if has_some_inputs and name.endswith("scale"):
            assert torch.equal(parts[0], expected)
            assert torch.equal(parts[1], expected)
        else:
            assert torch.equal(torch.cat(parts, 1 if has_some_inputs else 0), expected)


@pytest.mark.slow
def test_prepared_int8_weights_have_the_logits_of_those_quantized_while_loading(divided: list[dict[str, Any]]) -> None:
    assert torch.equal(divided[0]["prepared logits"].logits, divided[0]["computed"][0][2].logits)


@pytest.mark.slow
def test_fp8_logits_of_two_ranks_are_close_to_those_of_one(
    directories: dict[str, Path], divided: list[dict[str, Any]]
) -> None:
    directory = directories[FUSED[0]]
    exact, alone = compute(load(directory, "float32", "none").model).logits, compute(_load_fp8(directory)).logits
    logits = divided[0]["fp8"].logits
    assert torch.equal(logits, divided[1]["fp8"].logits)
    assert relative_error(logits, exact) < 1.15 * relative_error(alone, exact)
    assert relative_error(logits, alone) < relative_error(alone, exact)


@pytest.mark.slow
def test_adapter_is_merged_into_the_parts_of_ranks(
    directories: dict[str, Path], divided: list[dict[str, Any]], adapter: Path
) -> None:
    merged = compute(_load_adapted(directories[FUSED[0]], adapter).model).logits
    assert relative_error(divided[0]["computed"][0][0].logits, merged) > 0.1
    assert relative_error(divided[0]["adapted"].logits, merged) < 1e-5


@pytest.mark.slow
def test_each_rank_reads_its_part_of_the_weights(directories: dict[str, Path], divided: list[dict[str, Any]]) -> None:
    directory = directories[FUSED[0]]
    size = (directory / SINGLE).stat().st_size
    assert 0.98 * size < read_bytes(directory) <= size
    for rank in divided:
        alone, with_adapter = rank["read_bytes"]
        assert with_adapter == alone
        assert 0.49 * size < alone < 0.53 * size  # norms, and biases after sums, are on both


@pytest.mark.slow
def test_device_map_names_the_ranks(divided: list[dict[str, Any]]) -> None:
    assert divided[0]["device_map"] == {"rank 0": "cpu", "rank 1": "cpu"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_more_architectures_on_two_ranks_are_those_of_one(tmp_path: Path) -> None:
    models = [_save(name, tmp_path / str(index)) for index, name in enumerate(SLOW)]
    computed, single = ranks.run(2, compute_all, models), compute_all(models)
    for index in range(len(SLOW)):
        check_logits(computed[0][index], computed[1][index], single[index])
    assert ranks.run(2, generate, models)[0] == generate(models)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "fp8"])
def test_logits_of_two_gpus_are_close_to_those_of_one(directories: dict[str, Path], mode: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("torch does not find two GPUs")
    directory = directories[FUSED[0]]
    alone = compute_on_gpu(directory, mode)
    for computed in ranks.run_on("cuda", 2, compute_on_gpu, directory, mode):
        assert relative_error(computed.logits, alone.logits) < 0.06


# Layers


@pytest.mark.slow
def test_rank_alone_does_not_wait_for_one_that_failed(divided: list[dict[str, Any]]) -> None:
    assert divided[0]["lost"] == "A rank failed while the weights were quantized. Its log says why."


@pytest.mark.slow
def test_all_gather_joins_parts_of_different_widths(divided: list[dict[str, Any]]) -> None:
    assert [rank["gathered"] for rank in divided] == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.usefixtures("two_ranks")
def test_row_parallel_layer_with_a_norm_raises() -> None:
    layer = nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)
    kernel = linear.fuse_linears([layer], shards.Division.INPUTS, quantize=True)
    assert kernel is not None
    with pytest.raises(ValueError, match="needs all features"):
        kernel.forward(torch.ones(1, 32), norm=gemm.RMSNorm(torch.ones(32), 1e-6))


# Refused before weights are read: the directories have none


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("gpt2", 2, r"GPT2LMHeadModel, which 2 ranks cannot share: transformers has no plan .*_size 1\.$"),
        ("olmo2", 2, r"Olmo2ForCausalLM, .* its plan in transformers does not divide attention .*_size 1\.$"),
        ("doge", 2, r"DogeForCausalLM, which 2 ranks .* its attention masks have all heads .*_size 1\.$"),
        ("gpt_neox", 2, r"GPTNeoXForCausalLM, .* does not divide attention .*_size 1\.$"),
        ("qwen2", 4, r"Qwen2ForCausalLM with 4 attention heads and 2 KV heads, which 4 ranks .*_size 2\.$"),
        ("qwen2", 3, r"with 4 attention heads and 2 KV heads, which 3 ranks cannot share equally\. .*_size 2\.$"),
    ],
)
def test_plan_refuses_what_ranks_cannot_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int, expected: str
) -> None:
    save_config(CASES.get(name, Case(name)), tmp_path)
    (tmp_path / SINGLE).write_bytes((8).to_bytes(8, "little") + b"{}      ")
    monkeypatch.setattr(tensor_parallel, "size", lambda: size)
    with pytest.raises(UnsupportedModel, match=expected):
        load_plan.make_plan(tmp_path, device="cpu")


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(("name", "field"), [("mixtral", "intermediate_size"), ("qwen3_moe", "moe_intermediate_size")])
def test_plan_refuses_experts_whose_parts_cannot_be_multiplied(tmp_path: Path, name: str, field: str) -> None:
    save_config(Case(name, CASES[name].fields | {field: 72}), tmp_path)
    (tmp_path / SINGLE).write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(UnsupportedModel, match=r"with experts of 72 features .* 2 ranks cannot share .*_size 1\.$"):
        load_plan.make_plan(tmp_path, device="cpu")


@pytest.mark.usefixtures("two_ranks")
def test_plan_refuses_embeddings_and_remote_code_on_ranks(tmp_path: Path) -> None:
    save_config(CASES["qwen2"], tmp_path)
    (tmp_path / SINGLE).write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(InvalidSettings, match="embeds or classifies is served by one rank") as refused:
        load_plan.make_plan(tmp_path, device="cpu", task="embed")
    assert refused.value.exit_code == 2
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling.py").touch()
    with pytest.raises(UnsupportedModel, match="a model with its own code is not divided"):
        load_plan.make_plan(tmp_path, device="cpu", trust_remote_code=True)


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("device", "mode", "instead"),
    [("cuda", "8bit", "fp8 or none"), ("cuda", "4bit", "fp8 or none"), ("cpu", "4bit", "8bit or none")],
)
def test_resolve_mode_refuses_what_ranks_cannot_divide(device: str, mode: str, instead: str) -> None:
    expected = f"--quantization {mode} on {device} does not divide weights among 2 tensor-parallel ranks. Use {instead}"
    with pytest.raises(StartupError, match=expected):
        quantization.resolve_mode(mode, torch.device(device), None, 100, 1000)
    assert quantization.resolve_mode(mode, torch.device(device), None, 100, 1000, fallback=True) == "none"


@pytest.mark.usefixtures("two_ranks")
def test_resolve_mode_of_ranks_divides_8bit_on_a_cpu_and_fp8_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantization.resolve_mode("8bit", torch.device("cpu"), None, 100, 1000) == "8bit"
    assert quantization.resolve_mode("auto", torch.device("cpu"), None, 100, 1000) == "8bit"
    assert quantization.resolve_mode("auto", CUDA, None, 100, 10) == "none"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert quantization.resolve_mode("fp8", CUDA, None, 100, 10) == "fp8"
    assert quantization.resolve_mode("none", CUDA, {"quant_method": "fp8"}, 100, 1000) == "none"


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_resolve_mode_refuses_quantized_checkpoints_that_are_not_divided(method: str) -> None:
    with pytest.raises(StartupError, match=rf"quantized by {method}, which is not divided .* original weights.* fp8"):
        quantization.resolve_mode("none", CUDA, {"quant_method": method}, 100, 1000)


@pytest.mark.usefixtures("two_ranks")
def test_place_of_a_rank_offloads_nothing() -> None:
    assert placement.place(CUDA, "none", 14 * GIB, 24 * GIB, lambda: 0).arguments().keys() == {"distributed_config"}
    expected = r"need 30\.0 GiB on each of 2 GPUs .* cuda:0 has room for 20\.4 GiB\. Set a larger --tensor_parallel"
    with pytest.raises(StartupError, match=expected):
        placement.place(CUDA, "none", 30 * GIB, 24 * GIB, lambda: 64 * GIB)


@pytest.mark.usefixtures("two_ranks")
def test_choose_device_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(InvalidSettings, match="the device is mps, which does not support it"):
        placement.choose_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tensor_parallel, "rank", lambda: 1)
    assert placement.choose_device("auto") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(InvalidSettings, match=r"--device is cpu, but .* Set CUDA_VISIBLE_DEVICES= to hide them"):
        placement.choose_device("cpu")
