"""The task of a snapshot and its pooling, by its files, and the pooling's values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from devtools import tiny_poolers
from predictor.engine.pooling_model import PoolingInput, PoolingModel
from predictor.errors import InvalidSettings, UnsupportedModel
from predictor.models import load_plan, loader
from predictor.models.pooling import MODES
from predictor.types import Pooling, Task


def save_config(directory: Path, model_type: str, architectures: list[str] | None = None, **fields: Any) -> None:
    """Save config.json and an empty file of weights."""
    config = transformers.AutoConfig.for_model(model_type, **tiny_poolers.SIZES | fields)
    config.architectures = architectures
    config.save_pretrained(directory)
    (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def pooling_of(directory: Path, **options: Any) -> Pooling | None:
    return load_plan.make_plan(directory, device="cpu", **options).pooling


@pytest.mark.parametrize(
    ("model_type", "architectures", "task", "modes"),
    [
        ("llama", ["LlamaForCausalLM"], None, ()),
        ("gpt2", None, None, ()),
        ("bert", ["BertForMaskedLM"], Task.EMBED, ("mean",)),
        ("modernbert", None, Task.EMBED, ("mean",)),
        ("distilbert", ["DistilBertModel"], Task.EMBED, ("mean",)),
        ("xlm-roberta", ["XLMRobertaForSequenceClassification"], Task.CLASSIFY, ()),
        ("qwen3", ["Qwen3ForSequenceClassification"], Task.CLASSIFY, ()),
    ],
)
def test_task_follows_from_the_architecture(
    tmp_path: Path, model_type: str, architectures: list[str] | None, task: Task | None, modes: tuple[str, ...]
) -> None:
    save_config(tmp_path, model_type, architectures)
    pooling = pooling_of(tmp_path)
    assert (pooling and pooling.task) == task
    assert (pooling.modes if pooling else ()) == modes


def test_task_of_the_settings_replaces_that_of_the_architecture(tmp_path: Path) -> None:
    save_config(tmp_path, "qwen3", ["Qwen3ForCausalLM"], **tiny_poolers.CAUSAL)
    pooling = pooling_of(tmp_path, task="embed")
    assert pooling == Pooling(task=Task.EMBED, modes=("lasttoken",), normalize=True)
    save_config(tmp_path, "bert")
    with pytest.raises(UnsupportedModel, match="its attention is bidirectional"):
        pooling_of(tmp_path, task="generate")


def test_decoder_with_sentence_transformers_files_embeds(tmp_path: Path) -> None:
    save_config(tmp_path, "qwen3", ["Qwen3ForCausalLM"], **tiny_poolers.CAUSAL)
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    tiny_poolers.save_sentence_transformer(tmp_path, pooling=pooling, normalize=False, max_seq_length=20)
    read = pooling_of(tmp_path)
    assert read is not None
    assert (read.modes, read.normalize, read.max_tokens) == (("cls", "lasttoken"), False, 20)
    assert read.prompts == tiny_poolers.PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", {}, "modules.json is not a JSON list of objects"),
        ("modules.json", [{"type": "sentence_transformers.models.CLIPModel"}], "has the modules CLIPModel. Only "),
        (
            "modules.json",
            [
                {"type": "a.Transformer", "path": ""},
                {"type": "a.Pooling", "path": "1_Pooling"},
                {"type": "a.Dense", "path": "2_Dense"},
            ],
            "Transformer, Pooling, Dense. Only Transformer, Pooling and then Normalize are supported",
        ),
        (
            "modules.json",
            [{"type": "a.Transformer", "path": "0_Transformer"}, {"type": "a.Pooling", "path": "1_Pooling"}],
            "has the model in '0_Transformer'",
        ),
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "has the pooling mode attention. Supported are cls,"),
        ("1_Pooling/config.json", {}, "has the pooling mode none"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "excludes prompts"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "names the default prompt 'query'"),
    ],
)
def test_files_that_are_damaged_or_not_supported_are_an_error(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    save_config(tmp_path, "bert")
    tiny_poolers.save_sentence_transformer(tmp_path, pooling={"pooling_mode": "mean"})
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UnsupportedModel, match=message.replace("(", r"\(")):
        pooling_of(tmp_path)


def test_missing_pooling_config_is_an_error(tmp_path: Path) -> None:
    save_config(tmp_path, "bert")
    tiny_poolers.save_sentence_transformer(tmp_path, pooling={"pooling_mode": "mean"})
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"1_Pooling/config\.json cannot be read"):
        pooling_of(tmp_path)


@pytest.mark.parametrize(
    ("fields", "activation"),
    [
        ({"num_labels": 1}, "sigmoid"),
        ({"num_labels": 3}, "softmax"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "none"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, "sigmoid"),
    ],
)
def test_activation_of_a_classifier_follows_from_its_config(
    tmp_path: Path, fields: dict[str, Any], activation: str
) -> None:
    save_config(tmp_path, "bert", ["BertForSequenceClassification"], **fields)
    pooling = pooling_of(tmp_path)
    assert pooling is not None
    assert pooling.activation == activation


def test_classifier_with_an_unknown_activation_is_an_error(tmp_path: Path) -> None:
    fields = {"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}
    save_config(tmp_path, "bert", ["BertForSequenceClassification"], **fields)
    with pytest.raises(UnsupportedModel, match=r"activation 'torch\.nn\.Tanh'\. Supported are Sigmoid, Identity"):
        pooling_of(tmp_path)


def test_quantization_of_a_model_that_embeds_is_an_error_unless_it_may_fall_back(tmp_path: Path) -> None:
    save_config(tmp_path, "bert")
    with pytest.raises(InvalidSettings, match="--quantization is 8bit, but a model that embeds or classifies"):
        load_plan.make_plan(tmp_path, device="cpu", quantization="8bit")
    for options in ({"quantization": "auto"}, {"quantization": "8bit", "fallback": True}):
        assert load_plan.make_plan(tmp_path, device="cpu", **options).quantization == "none"


def test_encoder_decoder_cannot_embed(tmp_path: Path) -> None:
    transformers.T5Config(d_model=64).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="holds a t5, an encoder-decoder model, which is not served"):
        load_plan.make_plan(tmp_path, device="cpu", task="embed")


def test_masked_language_model_without_pooler_weights_loads(tmp_path: Path) -> None:
    tiny_poolers.save_model(tmp_path, transformers.AutoModelForMaskedLM, "bert")
    tiny_poolers.save_tokenizer(tmp_path)
    loaded = loader.load(tmp_path, device="cpu")
    assert loaded.model.pooler is None
    assert loaded.context_tokens == 66


def test_context_of_roberta_is_without_the_positions_of_padding(tmp_path: Path) -> None:
    loaded = loader.load(tiny_poolers.make_classifier(tmp_path), device="cpu")
    assert loaded.context_tokens == 64


@pytest.mark.parametrize("mode", MODES)
def test_pooling_mode_ignores_padding_and_has_its_definition(tmp_path: Path, mode: str) -> None:
    tiny_poolers.save_model(tmp_path, transformers.AutoModel, "bert")
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    rows = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
    pooled = PoolingModel(model, Pooling(task=Task.EMBED, modes=(mode,)))([PoolingInput(row) for row in rows])
    for row, vector in zip(rows, pooled, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([row])).last_hidden_state[0]
        positions = torch.arange(1, len(row) + 1)[:, None]
        expected = {
            "cls": states[0],
            "max": states.amax(0),
            "mean": states.mean(0),
            "mean_sqrt_len_tokens": states.sum(0) / len(row) ** 0.5,
            "weightedmean": (states * positions).sum(0) / positions.sum(),
            "lasttoken": states[-1],
        }[mode]
        torch.testing.assert_close(torch.tensor(vector), expected, atol=1e-5, rtol=0)
