"""`StartDisplay` on a terminal and in a log."""

import io
import sys
from contextlib import closing

import pytest

from kserve_llm.start_display import StartDisplay

MESSAGES = ("starting", "loading weights, 3 %", "loading weights, 60 %", "warming up", "ready")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with closing(StartDisplay()) as display:
        for message in MESSAGES:
            display.show(message)
            display.show(message)
    return stream.getvalue()


def test_display_in_a_log_is_a_line_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    assert show(io.StringIO(), monkeypatch) == "starting\nloading weights\nwarming up\nready\n"


def test_display_on_a_terminal_has_a_bar_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    text = show(Terminal(), monkeypatch)
    [sixty] = {part.strip() for part in text.split("\r") if part.rstrip().endswith("60 %")}
    three = next(part for part in text.split("\r") if part.rstrip().endswith(" 3 %"))
    assert sixty.startswith("loading weights ")
    assert sixty.count("█") > three.count("█")
    last = text.split("\r")[-1]
    assert last.strip() == "ready"
    assert last.endswith("\n")
