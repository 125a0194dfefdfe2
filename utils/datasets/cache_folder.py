"""Where the caches of indexes and pictures lie, and which of them go again."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from utils.config.files import user_cache_dir

Kind = Literal["index", "pictures"]
_SUFFIXES: dict[Kind, str] = {"index": ".npz", "pictures": ".raw"}
KEPT_DAYS = 30


def cache_path(kind: Kind, digest: str, folder: Path | None = None) -> Path:
    """The file of a cache that is known by a digest, in the user's cache folder or `folder`.

    Raises:
        RuntimeError: there is no home folder.
    """
    return (folder or user_cache_dir()) / kind / f"{digest}{_SUFFIXES[kind]}"


def mark_used(path: Path) -> None:
    """Notes in the file's time that it is of use, which keeps it from `remove_unused`."""
    with suppress(OSError):  # it has gone, or is another user's
        os.utime(path)


def remove_unused(folder: Path | None = None) -> None:
    """Removes caches that nobody has used for `KEPT_DAYS` days, and what killed processes left of others.

    Only files that have names as `cache_path` gives them. A process that has one of them mapped keeps its
    content until it ends; an index is read as a whole. What cannot be removed stays.

    Raises:
        RuntimeError: there is no home folder.
    """
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for kind, suffix in _SUFFIXES.items():
        name = rf"[0-9a-f]{{64}}\{suffix}"
        own = re.compile(rf"{name}|\.{name}\.[0-9a-f]{{12}}\.tmp")  # see `replace_atomically`
        with suppress(OSError), os.scandir((folder or user_cache_dir()) / kind) as entries:
            for entry in entries:
                if own.fullmatch(entry.name):
                    with suppress(OSError):
                        _remove_if_older(entry, oldest)


def _remove_if_older(entry: os.DirEntry[str], oldest: float) -> None:
    if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mtime < oldest:
        os.unlink(entry)
