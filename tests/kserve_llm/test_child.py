"""`Child`: whatever the moment of a signal, no child is left running."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kserve_llm.child import STOP_SIGNALS, Child

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


class InterruptedPopen(subprocess.Popen[bytes]):
    """A signal arrives when the child runs, and before its caller has got it."""

    number = signal.SIGTERM

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        os.kill(os.getpid(), self.number)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """The handlers of this process before and after."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    yield
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_child_signal_while_it_is_started_ends_it(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    monkeypatch.setattr(InterruptedPopen, "number", number)
    monkeypatch.setattr("kserve_llm.child.subprocess.Popen", InterruptedPopen)
    with handlers_kept(), Child() as child:
        child.start(SLEEP)
        assert child.wait() == 128 + signal.SIGTERM
        assert child.is_stopped


def test_child_after_a_signal_is_not_started() -> None:
    with handlers_kept(), Child() as child:
        child.start([sys.executable, "-c", ""])
        assert child.wait() == 0
        os.kill(os.getpid(), signal.SIGINT)
        child.start(SLEEP)
        assert not child.is_running
        assert child.wait() == 128 + signal.SIGINT


def test_child_ends_with_an_error_of_its_context() -> None:
    child = Child()

    def fail() -> None:
        with child:
            child.start(SLEEP)
            raise ZeroDivisionError

    with handlers_kept(), pytest.raises(ZeroDivisionError):
        fail()
    assert child.wait() == 128 + signal.SIGTERM


def test_child_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Child():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
