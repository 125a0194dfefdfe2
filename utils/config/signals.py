"""Signals to end, handled like Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.errors import Terminated

# Ctrl-C reaches every process of a terminal, and torchrun and timeout forward signals to processes that may
# have received them already: the same signal twice within this many seconds is one request.
ECHO = 2.0


def ending_signals() -> tuple[signal.Signals, ...]:
    """Return SIGTERM, and SIGHUP of a terminal that is closed unless it is ignored, as under nohup."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN:
        return (signal.SIGTERM,)
    return (signal.SIGTERM, hangup)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Context in which SIGTERM and SIGHUP raise Terminated, so that open files are finished as after Ctrl-C.

    By default they end the process at once: a video, for one, would lack the index at its end. A second one
    has this effect, unless it is an echo of the first. Does nothing outside of the main thread.
    """
    process, first, received = os.getpid(), 0.0, 0

    def receive(number: int, _frame: FrameType | None) -> None:
        nonlocal first, received
        now = time.monotonic()
        if os.getpid() == process and not first:
            first, received = now, number
            raise Terminated(number)
        # A loader worker inherits this handler, but has nothing to finish.
        if os.getpid() != process or now - first > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, receive) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:  # Python drops exceptions from handlers that interrupt a hook of a fork or a finalizer
        raise Terminated(received)
