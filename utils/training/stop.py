"""Requests to stop: Ctrl-C, or a signal from the system."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from utils.config.signals import ECHO, ending_signals
from utils.device import DeadWorkerError
from utils.distributed import Vote, is_lost_rank
from utils.errors import StoppedError


class StopSignals:
    """Context in which signals to end raise StoppedError: at once or, within `noted`, at a safe point.

    These are SIGINT, SIGTERM and SIGHUP.

    A second signal has its usual effect, unless it is an echo of the first.

    wanted: the signal received by this process or, once they have agreed, by any rank.
    """

    def __init__(self) -> None:
        self.wanted: int | None = None
        self.how_to_go_on = "nothing had begun, so nothing is lost"
        self._vote, self._noting = Vote(), False
        self._first: tuple[int, float] | None = None  # signal and time
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopSignals:
        """Install the handlers, if possible: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            wanted = (signal.SIGINT, *ending_signals())
            self._before = {number: signal.signal(number, self._receive) for number in wanted}
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Restore the previous handlers. Lost processes are no error if all are to stop."""
        self._give_back()
        if isinstance(error, Exception) and is_process_gone(error):
            self.raise_if_wanted()

    @contextmanager
    def noted(self, how_to_go_on: str) -> Iterator[None]:
        """Only note signals; call `raise_if_wanted` within it wherever everything is saved."""
        self._noting, self.how_to_go_on = True, how_to_go_on
        try:
            yield
        finally:
            self._noting = False
        self.raise_if_wanted()

    def raise_if_wanted(self) -> None:
        """Raise StoppedError if a signal has arrived."""
        if self.wanted is not None:
            raise StoppedError(self.wanted, self.how_to_go_on)

    def agreed(self) -> bool:
        """Return whether to stop, the same on all ranks; each must call it after the same step.

        A rank that stopped alone would leave the others waiting for its gradients.
        """
        found = self._vote(self.wanted or 0)
        self.wanted = found or self.wanted
        return found != 0

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # Loader workers inherit this handler: Ctrl-C reaches them too, and they must keep working.
        if os.getpid() != self._process:
            return
        now = time.monotonic()
        if self._first is not None:
            first, since = self._first
            if number != first or now - since > ECHO:
                self._give_back()
                signal.raise_signal(number)
            return
        self._first = number, now
        self.wanted = self.wanted or number
        if not self._noting:
            self.raise_if_wanted()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def is_process_gone(error: Exception) -> bool:
    """Return whether an error means that a process of the run has died: a loader worker or a rank."""
    return isinstance(error, DeadWorkerError) or is_lost_rank(error)
