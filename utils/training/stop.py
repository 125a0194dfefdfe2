"""A wish to stop, from Ctrl-C or from whoever runs the machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from utils.device import DeadWorkerError
from utils.distributed import Vote, is_lost_rank
from utils.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Ctrl-C reaches every process of a terminal, and torchrun hands what it gets on to its processes: the
# same signal twice within so many seconds is one wish.
ECHO = 2.0


class StopSignals:
    """Within it SIGINT and SIGTERM end the work with StoppedError: at once, or where `noted` in good order.

    A second signal acts as it always does, unless it is the echo of the first.

    wanted: the signal that has come, to this process or, once they agree, to any of several.
    """

    def __init__(self) -> None:
        self.wanted: int | None = None
        self.how_to_go_on = "nothing was done that is not saved"
        self._vote, self._noting = Vote(), False
        self._first: tuple[int, float] | None = None  # signal and time
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopSignals:
        """Listens, where that is possible: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Everything as it was. That other processes are gone is no error when all are to stop."""
        self._give_back()
        if isinstance(error, Exception) and is_process_gone(error):
            self.raise_if_wanted()

    @contextmanager
    def noted(self, how_to_go_on: str) -> Iterator[None]:
        """Within it a signal is only noted, for `raise_if_wanted` to be called where all is saved."""
        self._noting, self.how_to_go_on = True, how_to_go_on
        try:
            yield
        finally:
            self._noting = False
        self.raise_if_wanted()

    def raise_if_wanted(self) -> None:
        """Raises StoppedError when a signal has come."""
        if self.wanted is not None:
            raise StoppedError(self.wanted, self.how_to_go_on)

    def agreed(self) -> bool:
        """Whether to stop, the same on all ranks; to be asked by each of them after the same step.

        A rank that stopped by itself would leave the others waiting for its gradients.
        """
        found = self._vote(self.wanted or 0)
        self.wanted = found or self.wanted
        return found != 0

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # The workers of a loader have this handler too: Ctrl-C reaches them, and they must work on.
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
    """Whether an error says that a process of the run has ended: one that makes batches, or a rank."""
    return isinstance(error, DeadWorkerError) or is_lost_rank(error)
