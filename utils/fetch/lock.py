"""A lock with which one process downloads while others wait for its result."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from utils.config.files import open_lock, refusals, take_lock

_SECONDS = 0.2  # polling interval


@contextmanager
def exclusive_lock(lock: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock among the processes of this machine; removes the file `lock` at the end.

    waiting: called once if another process holds it. If the system or file system does not support
    locks, the block runs without one.

    Raises:
        UserError: if the file cannot be created, or is a link or a pipe.
    """
    told = False
    while (stream := _taken(lock)) is None:
        if not told:
            waiting()
        told = True
        time.sleep(_SECONDS)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        stream.close()


def _taken(path: Path) -> BinaryIO | None:
    """Return the locked file, None if another process has the lock."""
    with refusals("cannot be written", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = open_lock(path)
        except FileNotFoundError:  # another process has just removed the folder
            return None
    if take_lock(stream) is not False and _is_still(stream, path):
        return stream
    stream.close()
    return None


def _is_still(stream: BinaryIO, path: Path) -> bool:
    """Return whether the file still exists: the previous holder may have removed it before we locked it."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
