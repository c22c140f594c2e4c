"""Many at once, killed, stopped, taken for dead: always one complete snapshot, and readers never see less."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from devtools.local_hub import LocalHub, Request, Response
from devtools.paths import ROOT
from tests.storage_initializer.conftest import (
    FIRST_USER,
    GROUP,
    SECOND_USER,
    Run,
    Start,
    finish,
    make_model,
    problems,
)

KILLS = 50


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


@pytest.mark.slow
def test_fifty_random_kills_are_recovered_by_next_run(start: Start, hub: LocalHub, tmp_path: Path) -> None:
    commits: list[str] = []
    for number in range(KILLS):
        # A repository for each volume, so that the Hub counts each by itself.
        model = make_model(tmp_path / f"sharded-{number}", shards=4, shard_bytes=40_000, seed=number)
        commits.append(hub.add(f"demo/sharded-{number}", model))
    # Two files at a time, a quarter of a second each: about 0.6 s between the lease and the rename.
    hub.bytes_per_second = 160_000
    env = {"STORAGE_INITIALIZER_PARALLEL_FILES": "2", "STORAGE_INITIALIZER_LOCK_STALE_SECONDS": "0.5"}
    moments = random.Random(20261124)
    volumes = [tmp_path / f"volume-{number}" for number in range(KILLS)]
    # One whole run gives the scale of the moments, from the start of the interpreter to after the last step:
    # resolving, planning, the lease and all that follows. Later runs are slower, since four run at a time.
    hub.add("demo/whole", make_model(tmp_path / "whole", shards=4, shard_bytes=40_000, seed=KILLS))
    began = time.monotonic()
    assert finish(start("hf://demo/whole", tmp_path / "volume-whole", env=env)).code == 0
    longest_seconds = 2 * (time.monotonic() - began)
    delays_seconds = [moments.uniform(0.0, longest_seconds) for _ in volumes]
    whole: dict[str, set[str]] = {}
    begun: dict[str, dict[str, int]] = {}
    asked_before: dict[str, int] = {}
    published: dict[str, bool] = {}

    def requests(repository: str) -> list[Request]:
        return [one for one in hub.requests if one.repository == repository and one.kind == "resolve"]

    def kill_and_start_again(number: int) -> tuple[int, int]:
        volume, repository = volumes[number], f"demo/sharded-{number}"
        reference = f"hf://{repository}"
        first = start(reference, volume, env=env)
        time.sleep(delays_seconds[number])
        first.kill()
        first.wait()
        whole[repository] = {path.name for path in volume.glob(".staging/*@*/*.*")}
        begun[repository] = {
            path.name: path.stat().st_size for path in volume.glob(".staging/*@*/.partial/*") if path.stat().st_size
        }
        asked_before[repository] = len(requests(repository))
        published[repository] = (volume / f"demo--sharded-{number}" / commits[number]).is_dir()
        again = finish(start(reference, volume, env=env))
        return finish(first).code, again.code

    with reader(volumes) as seen, ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(kill_and_start_again, range(KILLS)))

    assert seen == []
    assert [again for _, again in codes] == [0] * KILLS
    # Some moments must lie before the end, and some files must have been whole by then.
    assert any(first == -signal.SIGKILL for first, _ in codes)
    assert any(whole.values())
    assert any(begun.values())
    for number, (volume, commit) in enumerate(zip(volumes, commits, strict=True)):
        assert problems(volume / f"demo--sharded-{number}" / commit) == []
        assert (volume / f"demo--sharded-{number}" / "refs" / "main").read_text() == f"{commit}\n"
        assert list((volume / ".staging").glob("*@*.????????????????")) == []
        # Killed between the rename and the release, a lease stays: the next one finds all done, and takes nothing over.
        if not published[f"demo/sharded-{number}"]:
            assert list((volume / ".locks").glob("*.lease")) == []
    for repository, before in asked_before.items():
        again = requests(repository)[before:]
        # The plan reads the index in every run.
        assert {request.file for request in again}.isdisjoint(whole[repository] - {"model.safetensors.index.json"})
        sizes = {name: blob.size for name, blob in hub.blobs(repository).items()}
        cut_off = {name: size for name, size in begun[repository].items() if size < sizes[name]}
        ranges = {(request.file, request.headers.get("range")) for request in again}
        assert {(name, f"bytes={size}-") for name, size in cut_off.items()} <= ranges


@pytest.mark.slow
def test_crash_at_every_file_operation_is_recovered_by_next_run(
    run: Run, environment: dict[str, str], hub: LocalHub, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.programs.crash_points", str(tmp_path), "hf://demo/arithmetic"]
    crashes = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert crashes.returncode == 0, crashes.stderr
    volumes = sorted((path for path in tmp_path.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    assert len(volumes) > 20
    commit = hub.commit("demo/arithmetic")
    published = []
    for volume in volumes:
        snapshot, ref = volume / "demo--arithmetic" / commit, volume / "demo--arithmetic" / "refs" / "main"
        published.append(snapshot.exists())
        assert not snapshot.exists() or problems(snapshot) == []
        assert not ref.exists() or snapshot.exists()
        result = run("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_LOCK_STALE_SECONDS": "0.1"})
        assert result.code == 0, (volume.name, result.stderr)
        assert problems(snapshot) == []
        assert ref.read_text() == f"{commit}\n"
        assert list((volume / ".staging").glob("*@*.????????????????")) == []
    assert published == sorted(published)
    assert published.count(False) > 10


def test_eight_processes_download_once(start: Start, hub: LocalHub, volume: Path) -> None:
    hub.bytes_per_second = 20_000
    processes = [start("hf://demo/arithmetic", volume) for _ in range(8)]
    results = [finish(process) for process in processes]
    assert [result.code for result in results] == [0] * 8, [result.reason for result in results]
    assert sorted(result.stdout.split()[0] for result in results) == ["already"] * 7 + ["published"]
    assert set(hub.downloads().values()) == {1}
    assert problems(volume / "demo--arithmetic" / hub.commit("demo/arithmetic")) == []


def test_lease_held_until_timeout_ends_the_run(run: Run, hub: LocalHub, volume: Path) -> None:
    lease = volume / ".locks" / f"demo--arithmetic@{hub.commit('demo/arithmetic')}.lease"
    lease.parent.mkdir(parents=True)
    lease.write_text(json.dumps({"token": "0" * 16, "name": "other:7"}))
    result = run("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_LOCK_TIMEOUT_SECONDS": "0.2"})
    assert result.code == 1
    assert result.reason.startswith("other:7 has been publishing demo--arithmetic@")
    assert "waiting for other:7" in result.stderr
    assert lease.exists()


def test_lease_of_other_snapshot_is_ignored(run: Run, hub: LocalHub, volume: Path, tmp_path: Path) -> None:
    lease = volume / ".locks" / f"demo--arithmetic@{hub.commit('demo/arithmetic')}.lease"
    lease.parent.mkdir(parents=True)
    lease.write_text(json.dumps({"token": "0" * 16, "name": "other:7"}))
    newer = hub.add("demo/arithmetic", make_model(tmp_path / "newer", seed=1))
    result = run("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_LOCK_TIMEOUT_SECONDS": "0"})
    assert result.code == 0, result.stderr
    assert problems(volume / "demo--arithmetic" / newer) == []
    assert lease.exists()


def test_stale_lease_is_taken_over(run: Run, hub: LocalHub, volume: Path) -> None:
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


def test_evicted_holder_cannot_write_into_published_snapshot(
    run: Run, hub: LocalHub, model: Path, volume: Path
) -> None:
    commit = hub.commit("demo/arithmetic")
    unfinished = volume / ".staging" / f"demo--arithmetic@{commit}.{'0' * 16}" / ".partial" / "model.safetensors"
    unfinished.parent.mkdir(parents=True)
    with unfinished.open("ab", buffering=0) as held_open:
        held_open.write((model / "model.safetensors").read_bytes()[:5_000])

        def write_on(request: Request, response: Response) -> Response:
            if request.file == "model.safetensors":
                held_open.write(b"of the one that lives on")
            return response

        hub.fault = write_on
        result = run("hf://demo/arithmetic", volume)
        held_open.write(b"and on")
    assert result.code == 0, result.stderr
    assert [r.headers["range"] for r in hub.requests if r.file == "model.safetensors"] == ["bytes=5000-"]
    assert problems(volume / "demo--arithmetic" / commit) == []


def test_interrupted_adoption_keeps_partial_files(run: Run, hub: LocalHub, model: Path, volume: Path) -> None:
    commit = hub.commit("demo/arithmetic")
    staging = volume / ".staging" / f"demo--arithmetic@{commit}.{'0' * 16}"
    weights = (model / "model.safetensors").read_bytes()
    for folder, size_bytes in ((".adopted", 5_000), (".partial", 2_000)):
        (staging / folder).mkdir(parents=True)
        (staging / folder / "model.safetensors").write_bytes(weights[:size_bytes])
    result = run("hf://demo/arithmetic", volume)
    assert result.code == 0, result.stderr
    assert [r.headers["range"] for r in hub.requests if r.file == "model.safetensors"] == ["bytes=5000-"]
    assert problems(volume / "demo--arithmetic" / commit) == []


def test_lost_lease_ends_the_run(start: Start, hub: LocalHub, volume: Path) -> None:
    hub.bytes_per_second = 1_000
    lease = volume / ".locks" / f"demo--arithmetic@{hub.commit('demo/arithmetic')}.lease"
    process = start("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_LOCK_STALE_SECONDS": "1"})
    until_exists(volume / ".staging", process)
    lease.write_text(json.dumps({"token": "0" * 16, "name": "other:7"}))
    result = finish(process)
    assert result.code == 1
    assert "another initializer took over" in result.reason
    assert lease.exists()
    assert not (volume / "demo--arithmetic").exists()


@pytest.mark.parametrize(
    ("kind", "pace"), [("info", "silent"), ("tree", "silent"), ("resolve", "silent"), ("resolve", "slow")]
)
def test_sigterm_ends_the_run_while_the_hub_stalls(
    run: Run, start: Start, hub: LocalHub, volume: Path, kind: str, pace: str
) -> None:
    reached, released = threading.Event(), threading.Event()

    def dawdle(request: Request, response: Response) -> Response:
        if request.kind == kind and request.method == "GET":
            reached.set()
            response.bytes_per_second = 50
            if pace == "silent":
                released.wait()
        return response

    hub.fault = dawdle
    process = start("hf://demo/arithmetic", volume)
    try:
        assert reached.wait(60)
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
        # Kubernetes waits for 30 s before it kills; the Hub stalls until this has ended.
        result = finish(process)
    finally:
        released.set()
    assert result.code == 1
    assert result.reason == "Stopped by SIGTERM. Run the same command again to resume."
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
    assert list(volume.glob(".locks/*")) == []
    assert not (volume / "demo--arithmetic").exists()

    hub.fault = None
    assert run("hf://demo/arithmetic", volume).code == 0
    assert list((volume / ".staging").iterdir()) == []


def test_second_sigterm_ends_the_run_while_the_volume_hangs(start: Start, hub: LocalHub, volume: Path) -> None:
    hub.bytes_per_second = 1_000
    lease = volume / ".locks" / f"demo--arithmetic@{hub.commit('demo/arithmetic')}.lease"
    process = start("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_LOCK_STALE_SECONDS": "0.5"})
    until_exists(volume / ".staging", process)
    # A reader of this lease blocks until there is a writer, as on a file server that went away.
    os.mkfifo(volume / "fifo")
    (volume / "fifo").rename(lease)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    result = finish(process)
    assert result.code == 1
    assert result.reason == "Stopped by SIGTERM. Run the same command again to resume."
    assert "Traceback" not in result.stderr


def test_ctrl_c_reports_how_to_resume(start: Start, hub: LocalHub, volume: Path) -> None:
    hub.bytes_per_second = 1_000
    process = start("hf://demo/arithmetic", volume)
    until_exists(volume / ".staging", process)
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result.code == 1
    assert result.reason == "Stopped by Ctrl-C. Run the same command again to resume."
    assert list((volume / ".locks").iterdir()) == []


def test_signal_during_logging_is_not_swallowed(
    run: Run, model: Path, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(io.StringIO):
        """The signal comes while a log line is written, where logging forgives every `Exception`."""

        def write(self, text: str) -> int:
            if "INFO verified" in text:
                signal.raise_signal(signal.SIGTERM)
            return super().write(text)

    stderr = Interrupting()
    monkeypatch.setattr("sys.stderr", stderr)
    assert run(f"file://{model}", volume).code == 1
    assert stderr.getvalue().splitlines()[-1] == "Stopped by SIGTERM. Run the same command again to resume."
    assert not (volume / "file--model").exists()
    assert list((volume / ".locks").iterdir()) == []


def test_other_user_of_the_group_takes_over_and_updates_ref(
    start: Start, hub: LocalHub, public: Path, tmp_path: Path, others_can_run: bool
) -> None:
    if not others_can_run:
        pytest.skip("only root can be two other users, and both must be able to read the repository")
    volume = public / "volume"
    volume.mkdir()
    os.chown(volume, 0, GROUP)
    volume.chmod(0o2775)
    env = {"STORAGE_INITIALIZER_LOCK_STALE_SECONDS": "0.5", "STORAGE_INITIALIZER_PARALLEL_FILES": "1"}

    def leave_halfway(_request: Request, response: Response) -> Response:
        response.bytes_per_second = 1_000
        return response

    hub.fault = leave_halfway
    dead = start("hf://demo/arithmetic", volume, env=env, user=FIRST_USER)
    while not list(volume.glob(".staging/*/.partial/*")) and dead.poll() is None:
        time.sleep(0.005)
    dead.kill()
    dead.wait()
    hub.fault = None
    first = hub.commit("demo/arithmetic")
    taken_over = finish(start("hf://demo/arithmetic", volume, env=env, user=SECOND_USER))
    assert taken_over.code == 0, taken_over.stderr
    assert "taking over" in taken_over.stderr
    assert problems(volume / "demo--arithmetic" / first) == []
    assert {path.stat().st_uid for path in (volume / "demo--arithmetic" / first).rglob("*")} == {SECOND_USER}
    assert list((volume / ".staging").iterdir()) == list((volume / ".locks").iterdir()) == []

    second = hub.add("demo/arithmetic", make_model(tmp_path / "newer", seed=1))
    result = finish(start("hf://demo/arithmetic", volume, env=env, user=FIRST_USER))
    assert result.code == 0, result.stderr
    assert problems(volume / "demo--arithmetic" / second) == []
    assert (volume / "demo--arithmetic" / "refs" / "main").read_text() == f"{second}\n"
