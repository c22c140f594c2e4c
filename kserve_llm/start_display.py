"""Display of a start on stderr: a line for each phase, and a bar of the loaded weights on a terminal."""

import re
import sys

from tqdm import tqdm

_BAR = "{desc} {bar} {n:.0f} %"
_NO_BAR = "{desc}"


class StartDisplay:
    """The phases of a server's start, as its readiness messages give them."""

    def __init__(self) -> None:
        # `None` leaves the bar out where stderr is no terminal.
        self._bar = tqdm(total=100, bar_format=_NO_BAR, file=sys.stderr, disable=None, dynamic_ncols=True)
        self._message = self._phase = ""

    def show(self, message: str) -> None:
        """Show a phase, such as `warming up` or `loading weights, 45 %`."""
        if message == self._message:
            return
        percent = re.search(r", (\d+) %$", message)
        phase = message[: percent.start()] if percent else message
        if not self._bar.disable:
            self._bar.bar_format = _BAR if percent else _NO_BAR
            self._bar.n = int(percent[1]) if percent else 0
            self._bar.set_description_str(phase)
        elif phase != self._phase:
            print(phase, file=sys.stderr, flush=True)
        self._message, self._phase = message, phase

    def close(self) -> None:
        """End the line of the terminal."""
        self._bar.close()
