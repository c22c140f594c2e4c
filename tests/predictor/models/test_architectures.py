"""Architectures that the engine cannot run, by config.json alone: the directories have no weights."""

from pathlib import Path

import pytest
import transformers

from devtools.architectures import CASES, save_config
from predictor.errors import UnsupportedModel
from predictor.models import architectures, load_plan


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bloom", "holds a BloomForCausalLM, .* not use transformers' attention interface.* which runs vLLM"),
        ("falcon, alibi", r"holds a FalconForCausalLM, .* \(ALiBi\).* which runs vLLM"),
        ("qwen3_next", "holds a Qwen3NextForCausalLM, .* layers of type linear_attention.* which runs vLLM"),
        ("lfm2", "holds a Lfm2ForCausalLM, .* layers of type conv.* which runs vLLM"),
        ("jamba", "holds a JambaForCausalLM, .* layers of type linear_attention.* which runs vLLM"),
        ("deepseek_v3", "holds a DeepseekV3ForCausalLM, .*multi-head latent attention.* which runs vLLM"),
        ("t5", "holds a t5, .* an encoder-decoder model.* with --backend=huggingface"),
        ("bert", "holds a BertLMHeadModel, .*attention is bidirectional.* with --backend=huggingface"),
    ],
)
def test_plan_refuses_an_architecture_by_name_with_a_remedy(tmp_path: Path, name: str, expected: str) -> None:
    save_config(CASES[name], tmp_path)
    with pytest.raises(UnsupportedModel, match=expected):
        load_plan.make_plan(tmp_path, device="cpu", task="generate")


def test_plan_refuses_encoder_decoder_also_with_remote_code(tmp_path: Path) -> None:
    config = CASES["t5"].config()
    config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    config.save_pretrained(tmp_path)
    (tmp_path / "modeling.py").touch()
    with pytest.raises(UnsupportedModel, match="an encoder-decoder model"):
        load_plan.make_plan(tmp_path, device="cpu", trust_remote_code=True)


def test_refusal_is_none_for_decoders_with_the_field_of_encoders() -> None:
    assert architectures.refusal(transformers.GPTNeoXConfig()) is None
    assert architectures.refusal(transformers.BertConfig(is_decoder=True)) is None
