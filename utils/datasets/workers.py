"""Processes and threads that make things ready: how many, what signals do to them, how one's end shows."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


def usable_cpus() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def abandonable(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """The pool, until the block is over; where that ends early what is still in line is dropped."""
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def died(error: Exception) -> bool:
    """Whether an error of a loader says that a worker is gone: torch's own, or a batch cut off half-way."""
    return not isinstance(error, RuntimeError) or str(error).startswith("DataLoader worker")


@contextmanager
def no_interruptions() -> Iterator[None]:
    """Leaves out torch's handler for ends of child processes, which a loader installs within this.

    It raises at whatever line this process is, be it in the middle of an update. Without it the loader
    finds within seconds that a worker is dead, where a batch is waited for: all that is done is whole.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


def outlive_signals(_worker: int) -> None:
    """Lets a worker leave SIGTERM to its parent, as it does SIGINT.

    Who stops a run may send it to all its processes at once, and the run needs its workers until the
    batch at hand is done. A worker ends when its parent says so, be it by this signal, or is gone.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_told, args=(os.getppid(),), daemon=True).start()


def _leave_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
