"""The on-disk cache of indexes, keyed by content so that changed data never matches a stale entry."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
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
_MAX_SIDE = 2**20  # pixels, as of the images that OpenCV reads
_ROUNDING = 1e-5  # of float32, where a box ends at the edge of the image


@dataclass(frozen=True)
class CheckedImages:
    """The expensive part of an index: N readable files, their sizes (N, 2) in pixels, labels, problems."""

    paths: PackedTexts
    sizes_wh: NDArray[np.int64]
    labels: PackedRows
    problems: list[str]


class ContentDigest:
    """A cache key that differs whenever the resulting index would differ.

    Label files are hashed by content. Images are identified by file size, mtime and ctime: unlike
    mtime, ctime cannot be set back by a copying tool.
    """

    def __init__(self, layout: str, names: Sequence[str], has_labels: bool, any_class: bool = False) -> None:
        """`has_labels` is False if label files are ignored; `any_class`: class ids need not have names."""
        header = [_VERSION, layout, list(names), has_labels, any_class]
        self._digest = hashlib.sha256(json.dumps(header).encode())

    def add(self, source: Source, content: bytes | None) -> None:
        """Add the next image and the content of its label file, None if there is none."""
        try:
            status = os.stat(source.image)
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        except OSError:
            stamp = []
        described = json.dumps([source.image, stamp, source.label, None if content is None else len(content)])
        self._digest.update(described.encode())
        self._digest.update(content or b"")

    def __str__(self) -> str:
        """The key of everything added so far."""
        return self._digest.hexdigest()


def read_cache(digest: str, cache_dir: Path | None, classes: int) -> CheckedImages | None:
    """Return the cached result, or None if there is none or its file is damaged.

    classes: the number that class ids are below.
    """
    # Any exception: a damaged zip raises one of a dozen types, and the remedy is always to rebuild the
    # index.
    try:
        path = cache_path("index", digest, cache_dir)
        checked = _parsed(read_regular(path, MAX_BYTES), digest, classes)
        mark_used(path)
        return checked
    except Exception:
        return None


def _parsed(content: bytes, digest: str, classes: int) -> CheckedImages:
    """Parse the content of a cache file; raises some exception if this code did not write it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
    # Compressed ones could expand to a thousand times their size.
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(content) for entry in members):
        raise ValueError("the cache is compressed")
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
        and ((sizes > 0) & (sizes <= _MAX_SIDE)).all()
        and _are_labels(labels, classes)
    )
    if not sound:
        raise ValueError("the cache is of another kind")
    return CheckedImages(PackedTexts.of_parts(names, ends), sizes, PackedRows(labels, counts), problems)


def _are_labels(labels: NDArray[np.float32], classes: int) -> bool:
    """Return whether all rows are a class id below `classes` and a box within its image."""
    ids, centre, half = labels[:, 0], labels[:, 1:3], labels[:, 3:] / 2
    are_ids = (ids == np.floor(ids)) & (ids >= 0) & (ids < classes)
    # A NaN compares as False.
    are_inside = (half >= 0) & (centre - half >= -_ROUNDING) & (centre + half <= 1 + _ROUNDING)
    return bool(are_ids.all() and are_inside.all())


def write_cache(digest: str, checked: CheckedImages, cache_dir: Path | None) -> None:
    """Write the cache, and remove caches that have long been unused.

    Failure to write is ignored: it only costs time at the next start.
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
