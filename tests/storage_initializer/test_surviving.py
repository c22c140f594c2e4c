"""Many at once, killed, stopped, taken for dead: always one complete snapshot, and readers never see less."""

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.local_hub import LocalHub
from tests.storage_initializer.conftest import Run, Start, finish, make_model, problems

KILLS = 10


def until_exists(path: Path, process: "subprocess.Popen[str]") -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


@contextmanager
def reader(volumes: list[Path]) -> Iterator[list[str]]:
    """What a predictor could see meanwhile: every snapshot that appears, looked at again and again."""
    seen: list[str] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            for volume in volumes:
                for path in volume.glob("*--*/*"):
                    if path.name != "refs":
                        seen.extend(f"{path}: {problem}" for problem in problems(path))
                seen.extend(
                    f"{ref} leads nowhere"
                    for ref in volume.glob("*--*/refs/*")
                    if not (ref.parents[1] / ref.read_text().strip()).is_dir()
                )
            time.sleep(0.01)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def test_killed_at_ten_random_moments_and_started_again_it_always_ends_complete(
    start: Start, hub: LocalHub, tmp_path: Path
) -> None:
    commit = hub.add("demo/sharded", make_model(tmp_path / "sharded", shards=4, shard_bytes=40_000))
    # Two files at a time, a quarter of a second each: about 0.6 s between the lease and the rename.
    hub.bytes_per_second = 160_000
    env = {"STORAGE_INITIALIZER_PARALLEL_FILES": "2", "STORAGE_INITIALIZER_LOCK_STALE_SECONDS": "0.5"}
    moments = random.Random(20261124)
    volumes = [tmp_path / f"volume-{number}" for number in range(KILLS)]
    delays_seconds = [moments.uniform(0.0, 0.8) for _ in volumes]

    def kill_and_start_again(volume: Path, delay_seconds: float) -> tuple[int, int]:
        first = start("hf://demo/sharded", volume, env=env)
        until_exists(volume / ".locks", first)
        time.sleep(delay_seconds)
        first.kill()
        again = finish(start("hf://demo/sharded", volume, env=env))
        return finish(first).code, again.code

    with reader(volumes) as seen, ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(kill_and_start_again, volumes, delays_seconds))

    assert seen == []
    assert [again for _, again in codes] == [0] * KILLS
    assert any(first == -signal.SIGKILL for first, _ in codes)
    for volume in volumes:
        assert problems(volume / "demo--sharded" / commit) == []
        assert (volume / "demo--sharded" / "refs" / "main").read_text() == f"{commit}\n"
        assert list((volume / ".staging").glob("*@*.????????????????")) == []
        assert list((volume / ".locks").glob("*.lease")) == []


def test_of_two_at_once_one_downloads_and_both_succeed(start: Start, hub: LocalHub, volume: Path) -> None:
    hub.bytes_per_second = 40_000
    processes = [start("hf://demo/arithmetic", volume) for _ in range(2)]
    results = [finish(process) for process in processes]
    assert [result.code for result in results] == [0, 0]
    assert sorted(result.stdout.split()[0] for result in results) == ["already", "published"]
    assert set(hub.downloads().values()) == {1}
    assert problems(volume / "demo--arithmetic" / hub.commit("demo/arithmetic")) == []


def test_waits_for_a_living_holder_no_longer_than_told(run: Run, hub: LocalHub, volume: Path) -> None:
    lease = volume / ".locks" / f"demo--arithmetic@{hub.commit('demo/arithmetic')}.lease"
    lease.parent.mkdir(parents=True)
    lease.write_text(json.dumps({"token": "0" * 16, "name": "other:7"}))
    result = run("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_LOCK_TIMEOUT_SECONDS": "0.2"})
    assert result.code == 1
    assert result.reason.startswith("other:7 has been publishing demo--arithmetic@")
    assert "waiting for other:7" in result.stderr
    assert lease.exists()


def test_takes_over_from_a_dead_holder_at_once_when_its_heartbeat_is_old(run: Run, hub: LocalHub, volume: Path) -> None:
    commit = hub.commit("demo/arithmetic")
    lease = volume / ".locks" / f"demo--arithmetic@{commit}.lease"
    lease.parent.mkdir(parents=True)
    lease.write_text("")
    os.utime(lease, (0, time.time() - 3600))
    left = volume / ".staging" / f"demo--arithmetic@{commit}.{'0' * 16}"
    left.mkdir(parents=True)
    (left / "config.json").write_text("half of a fi")
    (left / "stranger.json").write_text("{}")

    result = run("hf://demo/arithmetic", volume)

    assert result.code == 0
    assert "taking over" in result.stderr
    assert problems(volume / "demo--arithmetic" / commit) == []
    assert list((volume / ".staging").iterdir()) == []


def test_gives_way_when_another_has_taken_its_lease(start: Start, hub: LocalHub, volume: Path) -> None:
    hub.bytes_per_second = 10_000
    lease = volume / ".locks" / f"demo--arithmetic@{hub.commit('demo/arithmetic')}.lease"
    process = start("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_LOCK_STALE_SECONDS": "1"})
    until_exists(volume / ".staging", process)
    lease.write_text(json.dumps({"token": "0" * 16, "name": "other:7"}))
    result = finish(process)
    assert result.code == 1
    assert "another initializer took over" in result.reason
    assert lease.exists()
    assert not (volume / "demo--arithmetic").exists()


def test_sigterm_frees_the_lease_and_says_how_to_go_on(start: Start, hub: LocalHub, volume: Path) -> None:
    hub.bytes_per_second = 10_000
    process = start("hf://demo/arithmetic", volume)
    until_exists(volume / ".staging", process)
    process.terminate()
    result = finish(process)
    assert result.code == 1
    assert result.reason == "stopped by SIGTERM: run the same command again to go on"
    assert "Traceback" not in result.stderr
    assert list((volume / ".locks").iterdir()) == []
    assert not (volume / "demo--arithmetic").exists()
