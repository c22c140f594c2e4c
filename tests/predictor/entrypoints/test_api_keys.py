"""API keys from real files that are written, swapped and broken."""

import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from predictor.entrypoints.api_keys import CHECK_SECONDS, KeyFile
from predictor.errors import InvalidSettings
from predictor.types import Caller

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


def name_of(keys: KeyFile, key: str) -> str | None:
    caller = keys.caller_of(key)
    return caller.name if caller else None


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
    assert (name_of(keys, ALICE), name_of(keys, BOB)) == ("alice", "bob")


@pytest.mark.parametrize(
    "key", ["", "alice", ALICE[:-1], ALICE + "0", ALICE.upper(), f"alice:{ALICE}", f" {ALICE}", "schlüssel", "\ud800"]
)
def test_name_of_another_key_is_none(path: Path, key: str) -> None:
    assert name_of(KeyFile(path), key) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(key=st.text())
def test_name_of_any_text_does_not_raise(path: Path, key: str) -> None:
    assert name_of(KeyFile(path), key) == {ALICE: "alice", BOB: "bob"}.get(key)


def test_file_with_a_byte_order_mark_and_unicode_comment_is_read(path: Path) -> None:
    path.write_text(f"# Schlüssel\nalice:{ALICE}", encoding="utf-8-sig")
    assert name_of(KeyFile(path), ALICE) == "alice"


def test_options_after_the_key_are_read_and_shares_follow_from_all_weights(path: Path) -> None:
    path.write_text(
        f"alice:{ALICE}\nbob:{BOB}  weight=3 requests_per_minute=60\ttokens_per_minute=100000 concurrent_sequences=8\n"
    )
    keys = KeyFile(path)
    assert keys.caller_of(ALICE) == Caller("alice", share=0.25)
    assert keys.caller_of(BOB) == Caller("bob", 3, 0.75, 60, 100_000, 8)


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
        (f"alice:{ALICE} weight=2 {OTHER}", 1),
        (f"alice:{ALICE} {OTHER}=2", 1),
        (f"alice:{ALICE} weight={OTHER}", 1),
        (f"alice:{ALICE} weight=0", 1),
        (f"alice:{ALICE} weight=1001", 1),
        (f"alice:{ALICE} weight=1.5", 1),
        (f"alice:{ALICE} weight=1 weight=2", 1),
        (f"alice:{ALICE} weight = 2", 1),
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
    assert (name_of(keys, ALICE), name_of(keys, BOB)) == ("carol", None)


def test_file_is_checked_once_a_second(path: Path, clock: Clock) -> None:
    keys = KeyFile(path, clock)
    path.write_text(f"carol:{ALICE}\n")
    assert name_of(keys, ALICE) == "alice"
    clock.tick()
    assert name_of(keys, ALICE) == "carol"
    path.write_text(f"eve:{ALICE}\n")
    assert name_of(keys, ALICE) == "carol"


def test_swapped_secret_is_read_again(tmp_path: Path, clock: Clock) -> None:
    """A Kubernetes Secret: keys -> ..data/keys, ..data -> a directory per version."""
    for version, name in (("..1", "alice"), ("..2", "carol")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys").write_text(f"{name}:{ALICE}\n")
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys").symlink_to("..data/keys")
    keys = KeyFile(tmp_path / "keys", clock)
    assert name_of(keys, ALICE) == "alice"
    (tmp_path / "..new").symlink_to("..2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    clock.tick()
    assert name_of(keys, ALICE) == "carol"


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
        assert (name_of(keys, ALICE), name_of(keys, OTHER)) == ("alice", None)
    [record] = caplog.records
    assert (record.levelno, str(path) in record.getMessage()) == (logging.ERROR, True)
    assert not any(key in caplog.text for key in (ALICE, BOB, OTHER))
    path.write_text(f"carol:{OTHER}\n")
    clock.tick()
    assert (name_of(keys, ALICE), name_of(keys, OTHER)) == (None, "carol")
