"""API keys from real files that are written, swapped and broken."""

import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from predictor.entrypoints.api_keys import CHECK_SECONDS, KeyFile
from predictor.errors import InvalidSettings

ALICE = "alices-key-0123456789"
BOB = "bobs:key#with=signs+0"


class Clock:
    """A clock that moves only by `tick`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def tick(self) -> None:
        self.seconds += CHECK_SECONDS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# clients\n\nalice:{ALICE}\n  bob:{BOB}  \r\n")
    return path


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_name_of_a_key_is_its_owner(path: Path) -> None:
    keys = KeyFile(path)
    assert (keys.name_of(ALICE), keys.name_of(BOB)) == ("alice", "bob")


@pytest.mark.parametrize(
    "key", ["", "alice", ALICE[:-1], ALICE + "0", ALICE.upper(), f"alice:{ALICE}", f" {ALICE}", "schlüssel", "\ud800"]
)
def test_name_of_another_key_is_none(path: Path, key: str) -> None:
    assert KeyFile(path).name_of(key) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(key=st.text())
def test_name_of_any_text_does_not_raise(path: Path, key: str) -> None:
    assert KeyFile(path).name_of(key) == {ALICE: "alice", BOB: "bob"}.get(key)


def test_file_with_a_byte_order_mark_and_unicode_comment_is_read(path: Path) -> None:
    path.write_text(f"# Schlüssel\nalice:{ALICE}", encoding="utf-8-sig")
    assert KeyFile(path).name_of(ALICE) == "alice"


OTHER = "another-key-of-this-test"


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        (OTHER, 1),
        (f"alice:{ALICE}\n\n:{OTHER}", 3),
        (f"# comment\nal ice:{OTHER}", 2),
        (f"{'n' * 65}:{OTHER}", 1),
        (f"älice:{OTHER}", 1),
        ("alice:", 1),
        (f"alice:{OTHER[:15]}", 1),
        (f"alice: {OTHER}", 1),
        (f"alice:{OTHER} {OTHER}", 1),
        (f"alice:{OTHER}ü", 1),
        (f"alice:{ALICE}\nalice:{OTHER}", 2),
        (f"alice:{OTHER}\nbob:{OTHER}", 2),
    ],
)
def test_malformed_line_is_numbered_but_not_shown(path: Path, lines: str, number: int) -> None:
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(InvalidSettings, match=f"^API key file {path}, line {number}: .*\\.$") as raised:
        KeyFile(path)
    assert OTHER[:15] not in str(raised.value)


def test_line_of_invalid_utf8_is_malformed(path: Path) -> None:
    path.write_bytes(b"alice:\xff\xfe\xff\xfe\xff\xfe\xff\xfe\xff\xfe\xff\xfe\xff\xfe\xff\xfe")
    with pytest.raises(InvalidSettings, match=", line 1: "):
        KeyFile(path)


@pytest.mark.parametrize("lines", ["", "\n# none\n"])
def test_file_without_keys_is_rejected(path: Path, lines: str) -> None:
    path.write_text(lines)
    with pytest.raises(InvalidSettings, match=r"is empty\. Write one name:key per line"):
        KeyFile(path)


def test_unreadable_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"missing cannot be read: No such file or directory"):
        KeyFile(tmp_path / "missing")
    with pytest.raises(InvalidSettings, match=r"cannot be read: Is a directory"):
        KeyFile(tmp_path)


def test_changed_file_is_read_again(path: Path, clock: Clock) -> None:
    keys = KeyFile(path, clock)
    path.write_text(f"carol:{ALICE}\n")
    clock.tick()
    assert (keys.name_of(ALICE), keys.name_of(BOB)) == ("carol", None)


def test_file_is_checked_once_a_second(path: Path, clock: Clock) -> None:
    keys = KeyFile(path, clock)
    path.write_text(f"carol:{ALICE}\n")
    assert keys.name_of(ALICE) == "alice"
    clock.tick()
    assert keys.name_of(ALICE) == "carol"
    path.write_text(f"eve:{ALICE}\n")
    assert keys.name_of(ALICE) == "carol"


def test_swapped_secret_is_read_again(tmp_path: Path, clock: Clock) -> None:
    """A Kubernetes Secret: keys -> ..data/keys, ..data -> a directory per version."""
    for version, name in (("..1", "alice"), ("..2", "carol")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys").write_text(f"{name}:{ALICE}\n")
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys").symlink_to("..data/keys")
    keys = KeyFile(tmp_path / "keys", clock)
    assert keys.name_of(ALICE) == "alice"
    (tmp_path / "..new").symlink_to("..2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    clock.tick()
    assert keys.name_of(ALICE) == "carol"


@pytest.mark.parametrize("broken", [None, "", "alice", f"carol:{OTHER}\ncarol:{ALICE}"])
def test_file_that_becomes_invalid_keeps_the_previous_keys_and_is_logged_once(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    keys = KeyFile(path, clock)
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    for _ in range(3):
        clock.tick()
        assert (keys.name_of(ALICE), keys.name_of(OTHER)) == ("alice", None)
    [record] = caplog.records
    assert (record.levelno, str(path) in record.getMessage()) == (logging.ERROR, True)
    assert not any(key in caplog.text for key in (ALICE, BOB, OTHER))
    path.write_text(f"carol:{OTHER}\n")
    clock.tick()
    assert (keys.name_of(ALICE), keys.name_of(OTHER)) == (None, "carol")
