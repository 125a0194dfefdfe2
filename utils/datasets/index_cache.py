"""The index on disk: keyed by content, so that no change of the data can meet an old one."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from utils.config.files import read_regular, replace_atomically, user_cache_dir
from utils.datasets.images import MAX_BYTES
from utils.datasets.packed import PackedRows
from utils.datasets.sources import Source
from utils.errors import UserError

_VERSION = "3"


@dataclass(frozen=True)
class CheckedPictures:
    """What costs time to find out: N readable files, their sizes (N, 2) in pixels, labels, remarks."""

    paths: list[str]
    sizes_wh: NDArray[np.int64]
    labels: PackedRows
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
    # Any error: a damaged zip ends in one of a dozen kinds, and none of them is worth more than making
    # the index anew.
    try:
        return _parsed(read_regular(_cache_path(digest, cache_dir), MAX_BYTES), digest)
    except Exception:
        return None


def _parsed(content: bytes, digest: str) -> CheckedPictures:
    """What the bytes of a cache hold. Raises an error of some kind for what this code has not written."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        texts, labels, counts, sizes = (file[name] for name in ("texts", "labels", "counts", "sizes_wh"))
    text = json.loads(texts.tobytes())
    paths, problems = text["paths"], text["problems"]
    sound = (
        text["digest"] == digest
        and isinstance(paths, list)
        and isinstance(problems, list)
        and all(isinstance(entry, str) for entry in (*paths, *problems))
        and (labels.dtype, counts.dtype, sizes.dtype) == (np.float32, np.int64, np.int64)
        and (labels.shape, counts.shape, sizes.shape) == ((counts.sum(), 5), (len(paths),), (len(paths), 2))
        and (counts >= 0).all()
        and (sizes > 0).all()
        and np.isfinite(labels).all()
    )
    if not sound:
        raise ValueError("the cache is of another kind")
    return CheckedPictures(paths, sizes, PackedRows(labels, counts), problems)


def write_cache(digest: str, checked: CheckedPictures, cache_dir: Path | None) -> None:
    """Remembers it; a folder that cannot be written to costs time at the next start, no more."""
    texts = json.dumps({"digest": digest, "paths": checked.paths, "problems": checked.problems}).encode()

    def write(file: BinaryIO) -> None:
        np.savez(
            file,
            texts=np.frombuffer(texts, np.uint8),
            labels=checked.labels.values,
            counts=checked.labels.counts,
            sizes_wh=checked.sizes_wh,
        )

    try:
        path = _cache_path(digest, cache_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, write)
    except (OSError, RuntimeError, UserError):  # RuntimeError: there is no home folder
        return


def _cache_path(digest: str, cache_dir: Path | None) -> Path:
    return (cache_dir or user_cache_dir()) / "index" / f"{digest}.npz"
