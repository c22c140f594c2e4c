"""Tar archives as sources, for air-gapped clusters; also hostile ones."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapshot_format.record import FileSelection
from snapshot_format.reference import DirectoryReference
from storage_initializer.errors import InitializerError
from storage_initializer.sources.file_selection import check_safe_path
from storage_initializer.sources.local import Archive
from tests.storage_initializer.conftest import Run, make_model, problems, safetensors

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"{}", **attributes: object) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info, content


GOOD = [member("config.json"), member("model.safetensors", safetensors(10))]


def pack(path: Path, members: list[Member], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


def files(volume: Path) -> set[str]:
    (snapshot,) = (path for path in volume.glob("*--*/*") if path.name != "refs")
    assert problems(snapshot) == []
    return {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()} - {
        ".snapshot.json"
    }


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
@pytest.mark.parametrize("around", [".", "my-model"])
def test_archive_with_or_without_top_directory_is_published(
    run: Run, model: Path, volume: Path, tmp_path: Path, compression: str, around: str
) -> None:
    packed = tmp_path / "my-model.tar"
    with tarfile.open(packed, f"w:{compression}") as archive:  # type: ignore[call-overload]
        archive.add(model, around)
    result = run(f"file://{packed}", volume)
    assert result.code == 0, result.stderr
    assert files(volume) == {"config.json", "tokenizer.json", "README.md", "model.safetensors"}
    assert "nothing to do" in run(f"file://{packed}", volume).stdout


def test_archive_and_its_directory_have_the_same_fingerprint(run: Run, tmp_path: Path) -> None:
    model = make_model(tmp_path / "sharded", shards=3)
    with tarfile.open(tmp_path / "model.tar", "w") as archive:
        archive.add(model, "sharded")
    commits = set()
    for source, volume in (("model.tar", "a"), ("sharded", "b")):
        assert run(f"file://{tmp_path / source}", tmp_path / volume).code == 0
        (ref,) = (tmp_path / volume).glob("*--*/refs/main")
        commits.add(ref.read_text())
    assert len(commits) == 1


HOSTILE = {
    "parent": member("../evil.json"),
    "parent within": member("a/../../evil.json"),
    "absolute": member("/etc/evil.json"),
    "backslash": member("a\\..\\evil.json"),
    "unprintable": member("evil\n.json"),
    "symbolic link": member("evil.json", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member("evil.json", b"", type=tarfile.LNKTYPE, linkname="config.json"),
    "character device": member("evil.json", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "block device": member("evil.json", b"", type=tarfile.BLKTYPE, devmajor=1, devminor=5),
    "fifo": member("evil.json", b"", type=tarfile.FIFOTYPE),
    "twice": member("config.json", b"[]"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_archive_with_unsafe_member_is_rejected_before_writing(
    run: Run, volume: Path, tmp_path: Path, kind: str
) -> None:
    packed = pack(tmp_path / "model.tar", [*GOOD, HOSTILE[kind]])
    before = sorted(tmp_path.rglob("*"))
    result = run(f"file://{packed}", volume)
    assert result.code == 2, result.stderr
    assert result.reason.startswith(f"file://{packed} contains ")
    assert sorted(tmp_path.rglob("*")) == before


def test_archive_hidden_link_is_excluded(run: Run, volume: Path, tmp_path: Path) -> None:
    link = member(".cache/evil", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    assert run(f"file://{pack(tmp_path / 'model.tar', [*GOOD, link])}", volume).code == 0
    assert files(volume) == {"config.json", "model.safetensors"}


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("damage", [cut_off, lambda path: path.write_bytes(b"no tar at all")], ids=["cut", "other"])
def test_archive_truncated_or_invalid_is_rejected(
    run: Run, volume: Path, tmp_path: Path, mode: str, damage: Callable[[Path], None]
) -> None:
    packed = pack(tmp_path / "model.tar", [*GOOD, member("extra.json", os.urandom(100_000))], mode)
    damage(packed)
    result = run(f"file://{packed}", volume)
    assert result.code == 2, result.stderr
    assert "is neither a directory nor a complete tar archive" in result.reason
    assert not volume.exists()


KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
PARTS = st.sampled_from(["..", ".", "", "a", "b.json", "C:", "x\\y", "..a", "/"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(PARTS, min_size=1, max_size=4).map("/".join), KINDS), max_size=3))
def test_archive_listing_of_any_members_is_safe(tmp_path: Path, hostile: list[tuple[str, bytes]]) -> None:
    others = [member(name, b"", type=kind, linkname="/etc/passwd") for name, kind in hostile]
    packed = pack(tmp_path / "model.tar", [*GOOD, *others])
    archive = Archive(DirectoryReference(packed), FileSelection())
    try:
        commit = archive.resolve()
    except InitializerError:
        return
    for file in archive.list_files(commit):
        check_safe_path(file.path, "archive")
