"""One process at a time fetches a thing; the others wait and find it done."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from utils.config.files import open_lock, refusals, take_lock

_SECONDS = 0.2  # between two looks


@contextmanager
def exclusive_lock(lock: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Lets one process of this machine through at a time; the file `lock` goes when it leaves.

    waiting: called once where there is another. Where a system or a disk knows no locks, all pass.

    Raises:
        UserError: the file cannot be made, or something of its name is a link or a pipe.
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
    """The locked file; None where another process has it."""
    with refusals("cannot be written", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = open_lock(path)
        except FileNotFoundError:  # another process has tidied up the folder just now
            return None
    if take_lock(stream) is not False and _is_still(stream, path):
        return stream
    stream.close()
    return None


def _is_still(stream: BinaryIO, path: Path) -> bool:
    """Whether the file has not been removed meanwhile, by the process that had it before."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
