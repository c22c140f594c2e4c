"""Threads with a large stack."""

import threading

import pytest

from predictor.resources.large_stack import run_with_large_stack


def test_run_with_large_stack_returns_the_result_and_restores_the_size() -> None:
    threading.stack_size(1024 * 1024)
    try:
        assert run_with_large_stack(lambda: threading.current_thread().name) == "large-stack"
        assert threading.stack_size() == 1024 * 1024
    finally:
        threading.stack_size(0)


def test_run_with_large_stack_raises_the_error() -> None:
    with pytest.raises(ZeroDivisionError):
        run_with_large_stack(lambda: 1 / 0)
