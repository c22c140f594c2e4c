"""Work on many items in threads that nobody has to wait for: a signal, or the first failure, ends it at once."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, as_completed
from typing import TypeVar

_LEAVING_SECONDS = 0.5
"""How long threads may take to notice that they should stop. A slow one is left behind."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def work_on(
    items: Iterable[_Item], work: Callable[[_Item], _Result], width: int = 1, stopped: threading.Event | None = None
) -> list[_Result]:
    """The results of work on every item; the first failure, or a signal, sets `stopped` and ends it.

    The calling thread only waits, so that a signal reaches it at once. A thread that hangs in a lookup or a read cannot
    be stopped, and is not waited for: it is a daemon, and ends with the program. (An executor's threads are joined when
    the program ends, and a Hub that sends a byte now and then keeps them for ever.)
    """
    stopped = stopped or threading.Event()
    tasks = deque((item, Future[_Result]()) for item in items)
    futures = [future for _, future in tasks]

    def go_on() -> None:
        while tasks and not stopped.is_set():
            with contextlib.suppress(IndexError):
                _complete(work, *tasks.popleft())

    threads = [threading.Thread(target=go_on, name=f"work-{n}", daemon=True) for n in range(min(width, len(tasks)))]
    try:
        for thread in threads:
            thread.start()
        for done in as_completed(futures):
            done.result()
    except BaseException:
        stopped.set()
        until = time.monotonic() + _LEAVING_SECONDS
        for thread in threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))
        raise
    return [future.result() for future in futures]


def _complete(work: Callable[[_Item], _Result], item: _Item, future: "Future[_Result]") -> None:
    try:
        future.set_result(work(item))
    except BaseException as error:  # noqa: BLE001 - whatever it is, nobody else would tell
        # The Hub library's Rust parts panic with what is no Exception, and must not end the program without a sentence.
        future.set_exception(
            error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
        )
