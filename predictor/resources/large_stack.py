"""Run native code that recurses deeply: an overflow of the stack would end the process."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

STACK_BYTES = 256 * 1024 * 1024
"""Only what is used takes memory."""

_stack_size_lock = threading.Lock()
ResultT = TypeVar("ResultT")


def run_with_large_stack(function: Callable[[], ResultT]) -> ResultT:
    """Run a function in a thread with a stack of `STACK_BYTES`, and return its result or raise its error."""
    future: Future[ResultT] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001, raised by `result`
            future.set_exception(error)

    thread = threading.Thread(target=run, name="large-stack", daemon=True)
    # The size is a setting of the process, for threads that start from then on.
    with _stack_size_lock:
        previous = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(previous)
    return future.result()
