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

from utils.config.files import read_regular, replace_atomically
from utils.datasets.cache_folder import cache_path, mark_used, remove_unused
from utils.datasets.images import MAX_BYTES
from utils.datasets.packed import PackedRows, PackedTexts
from utils.datasets.sources import Source
from utils.errors import UserError

_VERSION = "4"


@dataclass(frozen=True)
class CheckedPictures:
    """What costs time to find out: N readable files, their sizes (N, 2) in pixels, labels, remarks."""

    paths: PackedTexts
    sizes_wh: NDArray[np.int64]
    labels: PackedRows
    problems: list[str]


class ContentDigest:
    """A key that differs whenever an index made of these would differ.

    Label files count with their bytes. Pictures count with size and both times: the time of the
    last change of the entry cannot be set back by a copying tool, as the time of writing can.
    """

    def __init__(self, layout: str, names: Sequence[str], has_labels: bool) -> None:
        """`has_labels` is False where label files do not count at all."""
        header = [_VERSION, layout, list(names), has_labels]
        self._digest = hashlib.sha256(json.dumps(header).encode())

    def add(self, source: Source, content: bytes | None) -> None:
        """Takes in the next picture and the content of its label file, None without one."""
        try:
            status = os.stat(source.image)
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        except OSError:
            stamp = []
        described = json.dumps([source.image, stamp, source.label, None if content is None else len(content)])
        self._digest.update(described.encode())
        self._digest.update(content or b"")

    def __str__(self) -> str:
        """The key of all so far."""
        return self._digest.hexdigest()


def read_cache(digest: str, cache_dir: Path | None) -> CheckedPictures | None:
    """What was remembered, or None when there is nothing or its file is damaged."""
    # Any error: a damaged zip ends in one of a dozen kinds, and none of them is worth more than making
    # the index anew.
    try:
        path = cache_path("index", digest, cache_dir)
        checked = _parsed(read_regular(path, MAX_BYTES), digest)
        mark_used(path)
        return checked
    except Exception:
        return None


def _parsed(content: bytes, digest: str) -> CheckedPictures:
    """What the bytes of a cache hold. Raises an error of some kind for what this code has not written."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        texts, labels, counts, sizes = (file[name] for name in ("texts", "labels", "counts", "sizes_wh"))
        names, ends = file["paths"], file["path_ends"]
    text = json.loads(texts.tobytes())
    problems = text["problems"]
    sound = (
        text["digest"] == digest
        and isinstance(problems, list)
        and all(isinstance(entry, str) for entry in problems)
        and (labels.dtype, counts.dtype, sizes.dtype) == (np.float32, np.int64, np.int64)
        and (names.dtype, ends.dtype, names.ndim, ends.ndim) == (np.uint8, np.int64, 1, 1)
        and (labels.shape, counts.shape, sizes.shape) == ((counts.sum(), 5), (len(ends),), (len(ends), 2))
        and (counts >= 0).all()
        and (sizes > 0).all()
        and np.isfinite(labels).all()
    )
    if not sound:
        raise ValueError("the cache is of another kind")
    return CheckedPictures(PackedTexts.of_parts(names, ends), sizes, PackedRows(labels, counts), problems)


def write_cache(digest: str, checked: CheckedPictures, cache_dir: Path | None) -> None:
    """Remembers it, and forgets what nobody has used for long.

    A folder that cannot be written to costs time at the next start, no more.
    """
    texts = json.dumps({"digest": digest, "problems": checked.problems}).encode()
    names, ends = checked.paths.parts()

    def write(file: BinaryIO) -> None:
        np.savez(
            file,
            texts=np.frombuffer(texts, np.uint8),
            paths=names,
            path_ends=ends,
            labels=checked.labels.values,
            counts=checked.labels.counts,
            sizes_wh=checked.sizes_wh,
        )

    try:
        path = cache_path("index", digest, cache_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, write)
        remove_unused(cache_dir)
    except (OSError, RuntimeError, UserError):  # RuntimeError: there is no home folder
        return
