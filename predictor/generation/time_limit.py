"""Stop Python code of unknown origin that might never return."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TimeLimitExceeded(BaseException):
    """Raised inside the code that ran too long. No `except Exception` in that code catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitExceeded in this thread, at its next bytecode, once the block has run for `seconds`.

    Python has no other way to end a thread's work; code in C is not interrupted.
    """
    thread_id = ctypes.c_ulong(threading.get_ident())
    lock = threading.Lock()
    active = True

    def interrupt() -> None:
        with lock:
            if active:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(TimeLimitExceeded))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            active = False
        # Withdraw an exception that is set and not raised yet.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, None)
        timer.cancel()
