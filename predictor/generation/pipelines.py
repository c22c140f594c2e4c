"""The parts that answer requests once a model is loaded, and how they are made of it."""

from dataclasses import dataclass
from typing import ClassVar

from predictor.engine.engine import Engine
from predictor.engine.pooling_engine import PoolingEngine
from predictor.generation import output_notations
from predictor.generation.chat_template import ChatTemplate
from predictor.generation.pooling import PoolingInputs
from predictor.generation.prompt_encoder import Encoder, PromptEncoder
from predictor.generation.prompts import Prompts
from predictor.generation.self_check import SelfCheck
from predictor.generation.structured_output import GrammarCompiler
from predictor.models.loader import LoadedModel
from predictor.settings import Settings
from predictor.types import Pooling, Task


@dataclass(frozen=True, slots=True)
class GenerationPipeline:
    """The parts of a model that generates."""

    prompts: Prompts
    encoder: PromptEncoder
    engine: Engine
    self_check: SelfCheck
    task: ClassVar = Task.GENERATE


@dataclass(frozen=True, slots=True)
class PoolingPipeline:
    """The parts of a model that embeds or classifies."""

    source: PoolingInputs
    encoder: Encoder[PoolingInputs]
    engine: PoolingEngine
    self_check: SelfCheck

    @property
    def task(self) -> Task:
        """EMBED or CLASSIFY."""
        return self.source.pooling.task


def create_generation(
    loaded: LoadedModel, engine: Engine, settings: Settings
) -> tuple[GenerationPipeline, dict[str, str]]:
    """Return the parts, and their properties for the model's metadata; the engine has been warmed up."""
    chat_template = ChatTemplate(loaded.tokenizer, settings.template_variables)
    output_format, format_names = output_notations.choose(
        loaded.tokenizer, settings.tool_call_format, settings.reasoning_format
    )
    prompts = Prompts(
        loaded.tokenizer,
        chat_template,
        GrammarCompiler(loaded.tokenizer, loaded.vocabulary_tokens, loaded.eos_token_ids),
        engine.context_tokens,
        loaded.vocabulary_tokens,
        loaded.defaults,
        settings.default_max_tokens,
        loaded.unembedded_tokens,
        output_format,
    )
    self_check = SelfCheck(engine, settings.self_check_interval_seconds)
    properties = {
        "kv_cache_tokens": str(engine.cache_tokens),
        "chat_template": chat_template.status,
        **format_names,
    }
    return GenerationPipeline(prompts, PromptEncoder(prompts), engine, self_check), properties


def create_pooling(
    loaded: LoadedModel, configured: Pooling, engine: PoolingEngine, settings: Settings
) -> tuple[PoolingPipeline, dict[str, str]]:
    """Return the same of a model that embeds or classifies."""
    # The first call sets the state of the tokenizer, which threads share, to that of all later calls.
    loaded.tokenizer("")
    inputs = PoolingInputs(
        loaded.tokenizer,
        configured,
        engine.num_outputs,
        engine.context_tokens,
        loaded.vocabulary_tokens,
        loaded.unembedded_tokens,
    )
    self_check = SelfCheck(engine, settings.self_check_interval_seconds)
    properties = {**configured.properties, "outputs": str(engine.num_outputs)}
    return PoolingPipeline(inputs, Encoder(inputs), engine, self_check), properties
