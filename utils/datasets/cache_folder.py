"""Location of the index and image caches, and removal of unused ones."""

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
    """Return the path of the cache with a digest, in the user's cache folder or `folder`.

    Raises:
        RuntimeError: if there is no home folder.
    """
    return (folder or user_cache_dir()) / kind / f"{digest}{_SUFFIXES[kind]}"


def mark_used(path: Path) -> None:
    """Touch the file, so that `remove_unused` keeps it."""
    with suppress(OSError):  # deleted meanwhile, or owned by another user
        os.utime(path)


def remove_unused(folder: Path | None = None) -> None:
    """Remove caches unused for `KEPT_DAYS` days, and temporary files of that age left by killed processes.

    Touches only files named as by `cache_path`. Safe while caches are in use: a process that has one mapped
    keeps its content until it ends, and an index is read as a whole. Files that cannot be removed stay.

    Raises:
        RuntimeError: if there is no home folder.
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
