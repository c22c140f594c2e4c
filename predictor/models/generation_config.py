"""Read a model's generation config: tokens that end a completion, and sampling defaults."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from predictor.errors import UnsupportedModel
from predictor.models.checkpoint import read_json
from predictor.types import SamplingParams
from snapshot_format.model_files import CONFIG

logger = logging.getLogger(__name__)

_WITHOUT_EFFECT: Mapping[str, Collection[object]] = {
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "token_healing": (False,),
    "watermarking_config": (),
}
"""Fields of transformers that change completions and are not supported, with the values that change nothing."""
_WITHOUT_EFFECT_ON_SAMPLING: Mapping[str, Collection[object]] = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "typical_p": (1,),
}
"""Likewise, of fields that matter only to a model that samples."""


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


_TokenIds = Annotated[tuple[int, ...], BeforeValidator(_as_list)]


class GenerationConfig(BaseModel):
    """The fields that are supported, by transformers' names; one that is absent or null has the default here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    eos_token_id: _TokenIds = ()
    stop_strings: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    max_new_tokens: int | None = Field(default=None, ge=1)
    min_new_tokens: int = Field(default=0, ge=0)
    do_sample: bool = False
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    suppress_tokens: _TokenIds = ()
    begin_suppress_tokens: _TokenIds = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()

    model_eos_token_id: _TokenIds = ()
    """`eos_token_id` of config.json."""

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read generation_config.json, or the same fields of config.json if there is none, and log unsupported fields.

        Raises:
            UnsupportedModel: the file is not a JSON object, or a field has a value that it cannot have.
        """
        path = directory / "generation_config.json"
        model_fields = _read_fields(directory / CONFIG)
        if path.is_file():
            fields = _read_fields(path)
        else:
            path, fields = directory / CONFIG, model_fields
        try:
            config = cls.model_validate({**fields, "model_eos_token_id": model_fields.get("eos_token_id", [])})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise UnsupportedModel(
                f"{path} cannot be used ({name}: {first['msg']}). Correct it, or download the model again."
            ) from error
        _warn_about_unsupported(path, fields, do_sample=config.do_sample)
        return config

    def eos_token_ids(self, tokenizer: Any, vocabulary_tokens: int) -> frozenset[int]:
        """Return the tokens that end a completion: those declared here and the tokenizer's end of sequence.

        That of config.json counts if it is a special token, since old ones name the default of their class.

        Args:
            tokenizer: the model's.
            vocabulary_tokens: ids are below it; others cannot be generated.
        """
        added = tokenizer.added_tokens_decoder
        ids = {token_id for token_id in self.model_eos_token_id if token_id in added and added[token_id].special}
        ids.update(self.eos_token_id)
        if tokenizer.eos_token_id is not None:
            ids.add(tokenizer.eos_token_id)
        return frozenset(token_id for token_id in ids if 0 <= token_id < vocabulary_tokens)

    def sampling_params(self, eos_token_ids: Collection[int], vocabulary_tokens: int) -> SamplingParams:
        """Return the sampling defaults; greedy unless `do_sample` is set.

        Args:
            eos_token_ids: a bad word that is one of them is ignored, as transformers does.
            vocabulary_tokens: ids are below it; others cannot be generated.
        """

        def known(token_ids: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(token_id for token_id in token_ids if 0 <= token_id < vocabulary_tokens)

        return SamplingParams(
            max_tokens=self.max_new_tokens,
            min_tokens=self.min_new_tokens,
            temperature=self.temperature if self.do_sample else 0.0,
            top_p=self.top_p if self.do_sample else 1.0,
            top_k=max(0, self.top_k) if self.do_sample else 0,
            min_p=self.min_p if self.do_sample else 0.0,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(filter(None, self.stop_strings)),
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            suppress_tokens=known(self.suppress_tokens),
            begin_suppress_tokens=known(self.begin_suppress_tokens),
            bad_words_ids=tuple(
                word
                for word in self.bad_words_ids
                if word and known(word) == word and not (len(word) == 1 and word[0] in eos_token_ids)
            ),
        )


def _read_fields(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON object that are not null, of the text model first if it has a config of its own."""
    content = read_json(path)
    nested = content.get("text_config")
    merged = {**(nested if isinstance(nested, dict) else {}), **content}
    return {name: value for name, value in merged.items() if value is not None}


def _warn_about_unsupported(path: Path, fields: Mapping[str, Any], *, do_sample: bool) -> None:
    without_effect = {**_WITHOUT_EFFECT, **(_WITHOUT_EFFECT_ON_SAMPLING if do_sample else {})}
    unsupported = [
        f"{name}={value!r}"
        for name, value in sorted(fields.items())
        if name in without_effect and value not in ([], {}, *without_effect[name])
    ]
    if unsupported:
        logger.warning(
            "%s has fields that are not supported: %s; completions ignore them and may differ from those of "
            "transformers' generate",
            path,
            ", ".join(unsupported),
        )
