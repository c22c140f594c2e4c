"""The list of models."""

from openai.types import Model

from predictor.protocols.openai import models
from tests.predictor.protocols.openai.helpers import (
    assert_conforms,
)


def test_model_list_conforms_to_the_clients_type() -> None:
    listed = models.model_list(["m"], created=5, context_tokens=None, lineage={})
    assert listed == {"object": "list", "data": [models.model_card("m", created=5, context_tokens=None, lineage={})]}
    assert_conforms(Model, listed["data"][0])
    assert models.model_card("m", created=5, context_tokens=4096, lineage={}) == {
        **listed["data"][0],
        "max_model_len": 4096,
    }


def test_model_card_with_adapter_has_its_root_and_parent() -> None:
    lineage = {"root": "hf://owner/adapter", "parent": "hf://owner/model"}
    card = models.model_card("m", created=5, context_tokens=None, lineage=lineage)
    assert card == {**models.model_card("m", created=5, context_tokens=None, lineage={}), **lineage}
