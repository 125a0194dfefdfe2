"""Loader workers and thread pools: their number, their signal handling and detecting their death."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def cancel_on_error(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """Shut the pool down at the end of the block; if that ends with an exception, cancel queued work."""
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def is_worker_death(error: Exception) -> bool:
    """Return whether a loader's error means that a worker died: torch's own, or a truncated batch."""
    return not isinstance(error, RuntimeError) or str(error).startswith("DataLoader worker")


@contextmanager
def without_sigchld_handler() -> Iterator[None]:
    """Undo the SIGCHLD handler that torch's DataLoader installs within this block.

    On the death of a worker it raises at whatever line this process executes, possibly in the middle of
    an update. Without it the loader detects the death within seconds while waiting for a batch, when all
    earlier work is complete.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


def outlive_signals(_worker: int) -> None:
    """Make a worker ignore SIGHUP, and SIGTERM unless its parent sent it; workers already ignore SIGINT.

    SIGTERM may be sent to all processes of a run at once, but the run needs its workers until the current
    batch is done. A worker ends when its parent tells it to, also by this signal, or has exited.
    """
    if hasattr(signal, "SIGHUP"):  # of a terminal that is closed, to all of its processes
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_told, args=(os.getppid(),), daemon=True).start()


def _leave_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
