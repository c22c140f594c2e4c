"""A rank other than 0 of a tensor-parallel model: loads its part, and takes part in rank 0's steps."""

import logging

from predictor.engine.engine import Engine
from predictor.errors import StartupError
from predictor.generation import model_load
from predictor.kernels import tensor_parallel
from predictor.kernels.tensor_parallel import Rank
from predictor.settings import Settings

logger = logging.getLogger(__name__)


def follow(settings: Settings, rank: Rank) -> None:
    """Load this rank's part, and take part in the steps until rank 0 ends; the phases are those of `LLMService.load`.

    An error of a step ends the process.

    Raises:
        RankFailed: the load failed on some rank; all ranks know it.
        StartupError: the device is not available.
    """
    model_load.join_ranks(settings, rank)
    model_snapshot, adapter = tensor_parallel.share()
    with tensor_parallel.together("weights"):
        loaded = model_load.load_weights(
            settings,
            model_snapshot,
            adapter,
            time_phase=tensor_parallel.together,
            report_weights=lambda _: None,
        )
    with tensor_parallel.together("kv_cache"):
        engine, _ = model_load.create_engine(loaded, settings)
        if not isinstance(engine, Engine):
            raise StartupError("--tensor_parallel_size: a model that embeds or classifies runs on one device. Use 1.")
        engine.start()
    logger.info("rank %d follows rank 0", rank.number)
    engine.follow()
