"""A wish to stop, from Ctrl-C or from whoever runs the machine, granted after the step at hand."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from utils.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Within it, the first SIGINT or SIGTERM is noted and a second one acts as it always does."""

    def __init__(self) -> None:
        self.wanted: int | None = None
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopSignals:
        """Listens, where that is possible: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Everything as it was."""
        self._give_back()

    def raise_if_wanted(self, how_to_go_on: str) -> None:
        """Raises StoppedError when a signal has come."""
        if self.wanted is not None:
            raise StoppedError(self.wanted, how_to_go_on)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # The workers of a loader have this handler too: Ctrl-C reaches them, and they must work on.
        if os.getpid() == self._process:
            self.wanted = number
            self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
