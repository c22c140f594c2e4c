"""Thread pool that a signal or the first failure ends at once."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, as_completed
from typing import TypeVar

_JOIN_SECONDS = 0.5
"""Time for threads to notice that they should stop. Slower ones are abandoned."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run_in_threads(
    items: Iterable[_Item], work: Callable[[_Item], _Result], width: int = 1, stopped: threading.Event | None = None
) -> list[_Result]:
    """Return the results of `work` on every item; the first failure, or a signal, sets `stopped` and is raised.

    The calling thread only waits, so signals interrupt it at once. Threads are daemons: one that hangs in a lookup or a
    read cannot be stopped and must not block the exit. (An executor joins its threads at exit.)
    """
    stopped = stopped or threading.Event()
    tasks = deque((item, Future[_Result]()) for item in items)
    futures = [future for _, future in tasks]

    def run_tasks() -> None:
        while tasks and not stopped.is_set():
            with contextlib.suppress(IndexError):
                _complete(work, *tasks.popleft())

    threads = [threading.Thread(target=run_tasks, name=f"work-{n}", daemon=True) for n in range(min(width, len(tasks)))]
    try:
        for thread in threads:
            thread.start()
        for future in as_completed(futures):
            future.result()
    except BaseException:
        stopped.set()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        raise
    return [future.result() for future in futures]


def _complete(work: Callable[[_Item], _Result], item: _Item, future: "Future[_Result]") -> None:
    try:
        future.set_result(work(item))
    except BaseException as error:  # noqa: BLE001 - the future must complete, whatever happens
        # The Hub library's Rust parts panic with a BaseException, which must not end the program without a message.
        future.set_exception(
            error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
        )
