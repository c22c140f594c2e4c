from typing import Literal

import pytest
import torch

from predictor.errors import InvalidSettings, RankFailed, StartupError
from predictor.kernels import tensor_parallel
from tests.predictor import ranks


@pytest.mark.parametrize(
    ("size", "device", "gpus", "expected"),
    [
        ("auto", "auto", 0, 1),
        ("auto", "auto", 4, 4),
        ("auto", "cuda", 4, 4),
        ("auto", "cuda:2", 4, 1),
        ("auto", "cpu", 4, 1),
        (1, "mps", 0, 1),
        (1, "cuda:2", 4, 1),
        (2, "auto", 0, 2),
        (2, "cpu", 4, 2),
        (2, "cuda", 4, 2),
    ],
)
def test_resolve_size_counts_gpus_only_if_the_model_is_on_them(
    monkeypatch: pytest.MonkeyPatch, size: int | Literal["auto"], device: str, gpus: int, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert tensor_parallel.resolve_size(size, device) == expected


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mps", "mps has one device. Use 1, or --device cpu."),
        ("cuda:1", "--device names one GPU, cuda:1. Use --device cuda: rank r takes the visible GPU r."),
        ("cuda", "torch finds 2 GPUs. Request as many GPUs for the container, or use auto."),
    ],
)
def test_resolve_size_of_devices_that_are_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidSettings) as raised:
        tensor_parallel.resolve_size(3, device)
    assert str(raised.value) == f"--tensor_parallel_size is 3, but {message}"


def test_phase_of_one_rank_raises_its_own_error() -> None:
    with pytest.raises(ZeroDivisionError), tensor_parallel.together("weights"):
        raise ZeroDivisionError


def outcome(error: Exception | None) -> tuple[str, str, int] | None:
    """Type, text and exit code of the error of a phase within a phase."""
    failures = {1: error} if error else {}
    try:
        with tensor_parallel.together("load"), tensor_parallel.together("weights"):
            if failure := failures.get(tensor_parallel.rank()):
                raise failure
    except RankFailed as failed:
        return type(failed).__name__, str(failed), failed.exit_code
    return None


def outcomes() -> list[tuple[str, str, int] | None]:
    """Of three phases, with what rank 0 shares."""
    errors = [StartupError("No space."), InvalidSettings("No such dtype."), ValueError("odd")]
    assert outcome(None) is None
    found = [outcome(error) for error in errors]
    assert tensor_parallel.share(("a", tensor_parallel.rank())) == ("a", 0)
    tokens = tensor_parallel.broadcast(torch.tensor([5 + tensor_parallel.rank()]))
    assert tokens.tolist() == [5]
    return found


@pytest.mark.slow
def test_failure_of_one_rank_is_that_of_all() -> None:
    first, second = ranks.run(2, outcomes)
    texts = ["No space.", "No such dtype.", "Loading the model failed: odd"]
    codes = [1, 2, 1]
    assert first == [("RankFailed", f"Rank 1: {text}", code) for text, code in zip(texts, codes, strict=True)]
    assert second == [("RankFailed", text, code) for text, code in zip(texts, codes, strict=True)]
