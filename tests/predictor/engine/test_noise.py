"""Noise from a counter."""

import pytest
import torch

from predictor.engine import noise

COUNT = 200_000
CELLS = 64
COUNTERS = {
    "positions": (torch.tensor(3), torch.arange(COUNT), torch.tensor(-7)),
    "seeds": (torch.arange(-COUNT // 2, COUNT // 2), torch.tensor(5), torch.tensor(-7)),
    "indices": (torch.tensor(3), torch.tensor(5), torch.arange(COUNT)),
}
"""Neighbours in each of the arguments."""


def exponential(seeds: torch.Tensor, positions: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return noise.exponential(noise.keys(seeds, positions), indices)


def uniform(name: str) -> torch.Tensor:
    """The distribution function of each number at itself, which is uniform in (0, 1)."""
    return (-exponential(*COUNTERS[name])).exp()


@pytest.mark.parametrize("name", COUNTERS)
def test_noise_is_exponentially_distributed(name: str) -> None:
    counts = torch.histc(uniform(name), CELLS, 0, 1)
    expected = COUNT / CELLS
    # The chi-square distribution of 63 degrees of freedom exceeds 104 with probability 0.001.
    assert float(((counts - expected) ** 2 / expected).sum()) < 104


@pytest.mark.parametrize("name", COUNTERS)
@pytest.mark.parametrize("distance", [1, 2, 128])
def test_noise_of_neighbours_is_independent(name: str, distance: int) -> None:
    first, second = uniform(name)[:-distance], uniform(name)[distance:]
    cells = (first * 8).long() * 8 + (second * 8).long()
    expected = len(first) / 64
    counts = torch.bincount(cells, minlength=64)
    assert float(((counts - expected) ** 2 / expected).sum()) < 104


def test_noise_is_finite_and_positive_for_any_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = torch.tensor([0, -1])
    monkeypatch.setattr(noise, "_mix", lambda values: extremes)  # noqa: ARG005, the parameter of the original
    largest, smallest = noise.exponential(extremes, extremes).tolist()
    assert 36 < largest < 37
    assert 0 < smallest < 1e-15


def test_noise_has_known_values() -> None:
    # Other numbers would change what a seed gives. Those of SplitMix64 with the seed 0 begin with these.
    state = torch.tensor([1, 2, 3]) * noise._INCREMENT
    mixed = [value % 2**64 for value in noise._mix(state).tolist()]
    assert mixed == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 0), (2**63, -(2**63)), (2**63 + 127, -(2**63) + 127), (-1, -1), (2**64 + 5, 5)]
)
def test_to_int64_keeps_the_last_64_bits(value: int, expected: int) -> None:
    assert noise.to_int64(value) == expected
