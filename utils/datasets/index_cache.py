"""The index on disk: keyed by content, so that no change of the data can meet an old one."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from utils.config.files import replace_atomically, user_cache_dir
from utils.datasets.labels import Labels
from utils.datasets.sources import Source
from utils.errors import UserError

_VERSION = "2"


@dataclass(frozen=True)
class CheckedPictures:
    """What costs time to find out: N readable files, their sizes (N, 2) in pixels, labels, remarks."""

    paths: list[str]
    sizes_wh: NDArray[np.int64]
    labels: list[Labels]
    problems: list[str]


def content_digest(
    layout: str, names: Sequence[str], sources: Sequence[Source], labels: Sequence[bytes | None] | None
) -> str:
    """A key that differs whenever an index made of these would differ.

    Label files count with their bytes. Pictures count with size and both times: the time of the
    last change of the entry cannot be set back by a copying tool, as the time of writing can.
    `labels` is None where they do not count at all.
    """
    header = [_VERSION, layout, list(names), labels is not None]
    digest = hashlib.sha256(json.dumps(header).encode())
    for source, content in zip(sources, labels or [None] * len(sources), strict=True):
        try:
            status = os.stat(source.image)
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        except OSError:
            stamp = []
        described = json.dumps([source.image, stamp, source.label, None if content is None else len(content)])
        digest.update(described.encode())
        digest.update(content or b"")
    return digest.hexdigest()


def read_cache(digest: str, cache_dir: Path | None) -> CheckedPictures | None:
    """What was remembered, or None when there is nothing or its file is damaged."""
    try:
        with np.load(_cache_path(digest, cache_dir), allow_pickle=False) as file:
            texts = json.loads(file["texts"].tobytes())
            ends = np.cumsum(file["counts"])
            labels = np.split(file["labels"], ends[:-1]) if len(ends) else []
            return CheckedPictures(texts["paths"], file["sizes_wh"], labels, texts["problems"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def write_cache(digest: str, checked: CheckedPictures, cache_dir: Path | None) -> None:
    """Remembers it; a folder that cannot be written to costs time at the next start, no more."""
    texts = json.dumps({"paths": checked.paths, "problems": checked.problems}).encode()

    def write(file: BinaryIO) -> None:
        np.savez(
            file,
            texts=np.frombuffer(texts, np.uint8),
            labels=np.concatenate([np.zeros((0, 5), np.float32), *checked.labels]),
            counts=np.array([len(labels) for labels in checked.labels], np.int64),
            sizes_wh=checked.sizes_wh,
        )

    path = _cache_path(digest, cache_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, write)
    except (OSError, UserError):
        return


def _cache_path(digest: str, cache_dir: Path | None) -> Path:
    return (cache_dir or user_cache_dir()) / "index" / f"{digest}.npz"
