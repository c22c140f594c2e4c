"""Rope whose frequencies depend on the length: one length for every sequence of a batch."""

from pathlib import Path

import pytest
import torch
import transformers

from devtools import architectures
from devtools.architectures import CASES, Case, generate_with_engine, make_prompts, save_model
from predictor.engine.pooling_model import PoolingInput, PoolingModel
from predictor.errors import UnsupportedModel
from predictor.models import loader, rope

LONG = ["llama, dynamic rope", "phi3, longrope"]


def crossing(name: str) -> Case:
    """A case whose longest sequences, of 90 to 114 tokens, cross the original length."""
    case = CASES[name]
    parameters = case.fields["rope_parameters"]
    if "original_max_position_embeddings" in parameters:
        parameters = parameters | {"original_max_position_embeddings": 64}
        return Case(
            case.model_type,
            case.fields | {"rope_parameters": parameters, "original_max_position_embeddings": 64},
        )
    return Case(case.model_type, case.fields | {"max_position_embeddings": 64})


@pytest.mark.parametrize("name", LONG)
def test_rope_beyond_its_original_length_does_not_depend_on_neighbors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save_model(crossing(name), tmp_path)
    loaded = loader.load(tmp_path, device="cpu", dtype="float32", max_model_len=128)
    *_, short, long = make_prompts()
    batched = generate_with_engine(loaded)
    monkeypatch.setattr(architectures, "make_prompts", lambda: [short])
    assert generate_with_engine(loaded) == [batched[-2]]
    # A prompt beyond the original length has the long factors of longrope with `generate`, too.
    if name == "phi3, longrope":
        monkeypatch.setattr(architectures, "make_prompts", lambda: [long])
        assert architectures.generate_with_transformers(tmp_path) == batched[-1:]


@pytest.mark.parametrize("name", LONG)
def test_rope_with_max_model_len_has_the_frequencies_of_that_length(tmp_path: Path, name: str) -> None:
    save_model(crossing(name), tmp_path)
    fixed = loader.load(tmp_path, device="cpu", dtype="float32", max_model_len=128).model
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    x, positions = torch.zeros(1, 1), torch.arange(128)[None]
    expected = reference.model.rotary_emb(x, positions)
    for length in (16, 128):  # transformers would change the frequencies between the two
        for part, of_whole in zip(fixed.model.rotary_emb(x, positions[:, :length]), expected, strict=True):
            torch.testing.assert_close(part, of_whole[:, :length])


def test_embedding_beyond_the_original_length_does_not_depend_on_neighbors(tmp_path: Path) -> None:
    save_model(crossing("llama, dynamic rope"), tmp_path)
    loaded = loader.load(tmp_path, device="cpu", dtype="float32", max_model_len=128, task="embed")
    assert loaded.pooling is not None
    model = PoolingModel(loaded.model, loaded.pooling)
    short, long = (PoolingInput(prompt) for prompt in make_prompts()[-2:])
    [alone], [together, _] = model([short]), model([short, long])
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), atol=1e-5, rtol=0)


def test_rope_in_code_of_the_models_own_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="in code of its own"):
        rope.fix_length(torch.nn.Linear(2, 2), 128)
