from collections.abc import Iterator

import pytest
import torch

from predictor.resources import cgroup, threads


@pytest.fixture
def cores() -> Iterator[int]:
    """Number of torch threads, restored afterwards."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_configure_threads_follows_the_cpu_limit(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    monkeypatch.setattr(cgroup, "cpu_limit", lambda _: limit)
    threads.configure_threads(None)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("limit", [100.0, None])
def test_configure_threads_without_tighter_limit_takes_all_cores(
    cores: int, monkeypatch: pytest.MonkeyPatch, limit: float | None
) -> None:
    monkeypatch.setattr(cgroup, "cpu_limit", lambda _: limit)
    threads.configure_threads(None)
    assert torch.get_num_threads() == cores


@pytest.mark.usefixtures("cores")
def test_configure_threads_with_a_number_overrides_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "cpu_limit", lambda _: 1.0)
    threads.configure_threads(2)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize(("limit", "processes", "expected"), [(8.0, 2, 4), (7.5, 4, 2), (2.0, 4, 1)])
def test_configure_threads_of_several_processes_share_the_limit(
    monkeypatch: pytest.MonkeyPatch, limit: float, processes: int, expected: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(cgroup, "cpu_limit", lambda _: limit)
    threads.configure_threads(None, processes)
    assert chosen == [expected]
