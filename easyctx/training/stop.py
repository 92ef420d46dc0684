"""Stopping a run from outside: SIGTERM and SIGINT end it after the step at hand, on all ranks after the same one."""

import os
import signal
import time
from types import FrameType
from typing import Any

from easyctx.training.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
INSIST_SECONDS = 5.0  # launchers pass on what the terminal has already sent, so an echo is not a second wish


class StopSignal:
    """While it is entered, the first of the signals is a wish, and one of 5 seconds later does what it always does."""

    def __init__(self) -> None:
        self.ranks = Ranks()
        self.received = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any rank was told to stop. All ranks must ask, once a step: they share one small message."""
        self.received = self.ranks.largest(self.received)
        return self.received > 0

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received and time.monotonic() - self._since > INSIST_SECONDS:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        elif not self.received:
            self.received, self._since = number, time.monotonic()
