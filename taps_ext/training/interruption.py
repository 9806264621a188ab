"""A run that is asked to stop finishes its step and saves a checkpoint first."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 1.0  # a launcher repeats the signal that the terminal has sent to everybody


class Interruption:
    """While entered (in the main thread), the first SIGINT or SIGTERM is a request; a later one acts at once."""

    def __init__(self) -> None:
        self.is_requested = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.is_requested:
            self.is_requested, self._since = True, now
        elif now - self._since > SAME_SECONDS:
            self.__exit__()
            signal.raise_signal(number)
