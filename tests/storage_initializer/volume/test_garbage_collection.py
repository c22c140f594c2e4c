"""Commands of administrators: verify, list, gc."""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from devtools.local_hub import LocalHub
from snapshot_format.layout import SnapshotLocation
from snapshot_format.record import FileSelection, Record
from snapshot_format.reference import parse
from storage_initializer.volume.garbage_collection import Policy, Snapshot, select_removable
from tests.storage_initializer.conftest import Result, Run, make_model, problems


@dataclass(frozen=True)
class Volume:
    root: Path
    old: str
    new: str

    @property
    def commits(self) -> set[str]:
        return {path.name for path in (self.root / "demo--arithmetic").iterdir() if path.name != "refs"}


@pytest.fixture
def two(run: Run, hub: LocalHub, volume: Path, tmp_path: Path) -> Volume:
    """A volume with two snapshots of one model: the branch has moved on from the older one."""
    assert run("hf://demo/arithmetic", volume).code == 0
    old = hub.commit("demo/arithmetic")
    new = hub.add("demo/arithmetic", make_model(tmp_path / "newer", seed=1))
    assert run("hf://demo/arithmetic", volume).code == 0
    record = volume / "demo--arithmetic" / old / ".snapshot.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"published_at": "2026-01-01T00:00:00Z"}))
    return Volume(volume, old, new)


@pytest.mark.parametrize("flags", [(), ("--fast",)])
def test_verify_intact_snapshot_succeeds(run: Run, two: Volume, flags: tuple[str, ...]) -> None:
    result = run("verify", *flags, two.root / "demo--arithmetic" / two.new)
    assert result.code == 0, result.stderr
    assert "of 4 files" in result.stdout


def test_verify_damaged_snapshot_reports_all_issues(run: Run, two: Volume) -> None:
    snapshot = two.root / "demo--arithmetic" / two.new
    weights = snapshot / "model.safetensors"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    (snapshot / "README.md").unlink()
    (snapshot / "tokenizer.json").write_text("{} ")
    (snapshot / "stranger.json").write_text("{}")

    result = run("verify", snapshot)
    assert result.code == 2
    assert f"{snapshot} is damaged, 4 files differ" in result.reason
    for word in ("model.safetensors has sha256", "README.md is missing", "tokenizer.json has 3 bytes", "stranger.json"):
        assert word in result.reason
    assert "Remove it and publish hf://demo/arithmetic:main again" in result.reason

    fast = run("verify", "--fast", snapshot)
    assert "3 files differ" in fast.reason
    assert "model.safetensors" not in fast.reason


def test_verify_other_directory_is_rejected(run: Run, tmp_path: Path) -> None:
    result = run("verify", tmp_path)
    assert result.code == 2
    assert "no readable .snapshot.json" in result.reason
    missing = run("verify", tmp_path / "missing")
    assert missing.code == 2
    assert "missing does not exist. Specify the directory of a published snapshot" in missing.reason


def test_list_shows_size_age_refs_and_reference(run: Run, two: Volume) -> None:
    result = run("list", two.root)
    assert result.code == 0
    new, old, total = result.stdout.splitlines()
    assert new.startswith(f"demo--arithmetic/{two.new} ")
    assert "0 min  refs/main  hf://demo/arithmetic:main" in new
    assert old.startswith(f"demo--arithmetic/{two.old} ")
    assert " d  -  hf://demo/arithmetic:main" in old
    assert total.startswith("2 snapshots, ")
    assert f"free on {two.root}" in total


def test_list_empty_volume_has_no_snapshots(run: Run, tmp_path: Path) -> None:
    assert run("list", tmp_path).stdout.startswith("0 snapshots, 0 B, ")
    missing = run("list", tmp_path / "missing")
    assert missing.code == 2
    assert "does not exist. Specify the root of a volume" in missing.reason


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_gc_empty_volume_removes_nothing(run: Run, tmp_path: Path, flags: tuple[str, ...]) -> None:
    result = run("gc", tmp_path, *flags)
    assert result.code == 0, result.stderr
    assert " 0 in all" in result.stdout


def test_gc_keeps_latest_snapshot_of_each_model(run: Run, two: Volume) -> None:
    dry = run("gc", two.root, "--dry-run")
    assert dry.code == 0
    assert dry.stdout.startswith(f"would remove demo--arithmetic/{two.old}: ")
    assert two.commits == {two.old, two.new}

    result = run("gc", two.root)
    assert result.code == 0
    assert result.stdout.startswith(f"removed demo--arithmetic/{two.old}: ")
    assert "removed 1 in all" in result.stdout
    assert two.commits == {two.new}
    assert problems(two.root / "demo--arithmetic" / two.new) == []
    assert list((two.root / ".staging").iterdir()) == list((two.root / ".locks").iterdir()) == []


def gone(volume: Volume, result: Result) -> set[str]:
    assert result.code == 0, result.stderr
    return {volume.old, volume.new} - volume.commits


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--keep", "2"], ""),
        (["--keep", "0"], "old"),
        (["--keep", "0", "--force"], "old new"),
        (["--reference", "hf://demo/arithmetic"], "old"),
        (["--reference", "hf://demo/other"], ""),
        (["--reference", "hf://demo/arithmetic:NEW"], ""),
        (["--reference", "hf://demo/arithmetic:NEW", "--force"], "new"),
        (["--reference", "hf://demo/arithmetic:OLD"], "old"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value or "nothing",
)
def test_gc_flags_select_snapshots_without_refs(run: Run, two: Volume, flags: list[str], expected: str) -> None:
    words = [word.replace("NEW", two.new).replace("OLD", two.old) for word in flags]
    result = run("gc", two.root, *words)
    assert gone(two, result) == {{"old": two.old, "new": two.new}[name] for name in expected.split()}
    ref = two.root / "demo--arithmetic" / "refs" / "main"
    assert ref.exists() == ("new" not in expected.split())


def test_gc_keeps_snapshot_with_unreadable_record(run: Run, two: Volume) -> None:
    (two.root / "demo--arithmetic" / two.old / ".snapshot.json").write_text('{"format_version": 2}')
    result = run("gc", two.root, "--keep", "0", "--force")
    assert gone(two, result) == {two.new}
    assert f"keeping demo--arithmetic/{two.old}: its record is unreadable" in result.stderr


def test_gc_keeps_snapshot_with_live_lease(run: Run, two: Volume) -> None:
    lease = two.root / ".locks" / f"demo--arithmetic@{two.old}.lease"
    lease.write_text(json.dumps({"token": "0" * 16, "name": "other:7"}))
    staging = two.root / ".staging" / f"demo--arithmetic@{two.old}.{'0' * 16}"
    staging.mkdir()
    for flags in (["--dry-run"], []):
        assert gone(two, run("gc", two.root, *flags)) == set()
        assert lease.exists()
        assert staging.exists()


def test_gc_removes_stale_files(run: Run, two: Volume) -> None:
    dead = f"demo--arithmetic@{'d' * 40}"
    left = [two.root / ".staging" / f"{dead}.{'0' * 16}", two.root / ".locks" / f"{dead}.lease"]
    left.append(two.root / ".staging" / f"{dead}.{'1' * 16}.ref")
    left[0].mkdir()
    (left[0] / "model.safetensors").write_bytes(b"x" * 1000)
    left[1].write_text(json.dumps({"token": "0" * 16, "name": "dead:7"}))
    left[2].write_text("")
    for path in left:
        os.utime(path, (0, time.time() - 7200))

    dry = run("gc", two.root, "--dry-run", "--keep", "9")
    assert dry.stdout.count("would remove .") == 3
    assert all(path.exists() for path in left)
    assert run("gc", two.root, "--keep", "9").code == 0
    assert not any(path.exists() for path in left)
    assert two.commits == {two.old, two.new}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("gc", "VOLUME", "--keep", "-1"), "Expected"),
        (("gc", "VOLUME", "--keep", "many"), "'many' is not a number of snapshots"),
        (("gc", "VOLUME", "--reference", "demo"), "'demo' is not a reference"),
        (("gc",), "Expected: python -m storage_initializer gc"),
        (("verify", "VOLUME", "--slow"), "unrecognized arguments: --slow"),
        (("list",), "Expected: python -m storage_initializer list"),
    ],
)
def test_command_with_invalid_arguments_is_rejected(
    run: Run, volume: Path, words: tuple[str, ...], expected: str
) -> None:
    volume.mkdir()
    result = run(*(volume if word == "VOLUME" else word for word in words))
    assert result.code == 2
    assert expected in result.reason


def test_gc_removed_snapshot_is_fetched_again(run: Run, two: Volume) -> None:
    run("gc", two.root, "--keep", "0", "--force")
    shutil.rmtree(two.root / ".staging")
    assert run("hf://demo/arithmetic", two.root).code == 0
    assert problems(two.root / "demo--arithmetic" / two.new) == []


# The policy


def snapshot(name: str, *, revisions: tuple[str, ...] = (), readable: bool = True) -> Snapshot:
    slug, _, directory = name.partition("/")
    commit, _, variant = directory.partition("-")
    record = Record("", commit * 40, (), FileSelection(), None, "", "2026-01-01T00:00:00Z", 0.0)
    return Snapshot(SnapshotLocation(Path("/v"), slug, commit * 40, variant), record if readable else None, revisions)


VOLUME = (
    snapshot("o--a/3", revisions=("main",)),
    snapshot("o--a/2"),
    snapshot("o--a/2-int8"),
    snapshot("o--a/1", revisions=("v1",)),
    snapshot("o--b/9", readable=False),
    snapshot("o--b/8-int8"),
    snapshot("o--b/7"),
)


@pytest.mark.parametrize(
    ("policy", "removed", "kept"),
    [
        (Policy(), {"8-int8": "no longer exists", "2": "latest 1", "7": "latest 1"}, {"1": "refs/v1 points"}),
        (Policy(keep=3), {"8-int8": "no longer exists"}, {}),
        (Policy(keep=0, force=True), dict.fromkeys(["8-int8", "3", "2", "1", "7"], ""), {"9": "unreadable"}),
        (Policy(reference=parse("hf://o/a")), {"2": "latest 1"}, {"1": "refs/v1 points"}),
        (Policy(reference=parse(f"hf://o/a:{'3' * 40}")), {}, {"3": "refs/main points"}),
        (Policy(reference=parse(f"hf://o/a:{'3' * 40}"), force=True), {"3": "latest 0"}, {}),
    ],
    ids=["default", "keep 3", "force all", "model", "commit with ref", "forced commit"],
)
def test_select_removable_policy_gives_reasons(policy: Policy, removed: dict[str, str], kept: dict[str, str]) -> None:
    verdicts = select_removable(VOLUME, policy)
    for remove, expected in ((True, removed), (False, kept)):
        reasons = {
            v.snapshot.location.name.replace(v.snapshot.location.commit, v.snapshot.location.commit[0]): v.reason
            for v in verdicts
            if v.remove == remove
        }
        assert reasons.keys() == expected.keys()
        assert all(expected[name] in reason for name, reason in reasons.items())
