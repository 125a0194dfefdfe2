"""The training loader's source of scaled images: their files, a cache in memory, or one in a file.

Cached images are stored consecutively in a single buffer, which workers share: by forking, through
shared memory, or by mapping the same file. A cache file ends with a digest of its sources and a checksum,
verified at every start; if anything is wrong with a cache, training continues without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.config.files import replace_atomically
from utils.datasets.cache_folder import cache_path, mark_used, remove_unused
from utils.datasets.images import Image, UnreadableImageError, all_scaled_wh, read_for_training
from utils.datasets.index import DatasetIndex
from utils.distributed import processes_here
from utils.errors import UserError
from utils.fetch.lock import exclusive_lock
from utils.fetch.part import free_bytes
from utils.reporting.console import Console
from utils.words import counted

CacheKind = Literal["ram", "disk"]
_VERSION = "2"
_MARK = b"yolov5-distillation pictures 2\n"
_READ = 1 << 24  # bytes at a time
_CHUNK = 256
_THREADS = 8
_MEMORY_SHARE = 0.8
_GIB = 2**30
_CGROUP = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class LostImageError(UserError):
    """An image that was readable when the index was built but no longer is; number: its index there."""

    def __init__(self, number: int, path: str, reason: str) -> None:
        super().__init__(
            f"was readable when the index was made and is no longer ({reason})",
            path,
            "put it back or start again, which leaves it out",
        )
        self.number, self.path, self.reason = number, path, reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling, to pass the error on to another process."""
        return LostImageError, (self.number, self.path, self.reason)


class ImageStore:
    """Images (H, W, 3) BGR uint8 by number, with the longer side scaled to `image_size`.

    wh: (N, 2) the scaled sizes, pixels.
    notes: sentences for the console about what was cached and what was not.
    """

    def __init__(self, index: DatasetIndex, image_size: int) -> None:
        self._paths, self._original_wh = index.paths, index.sizes_wh
        self.image_size = image_size
        self.wh = all_scaled_wh(index.sizes_wh, image_size)
        self._offsets = np.concatenate([[0], np.cumsum(self.wh.prod(1) * 3)])
        self._memory: Tensor | None = None
        # The same memory for NumPy: slicing a tensor costs ten times as much.
        self._view: NDArray[np.uint8] | None = None
        self._file: Path | None = None
        self.notes: list[str] = []

    def load(self, number: int, rows: int | None = None) -> Image:
        """Return the image with a number; must not be written to.

        Args:
            number: of the image.
            rows: how many are needed, from the top; the image may lack some of the others. None: all.

        Raises:
            LostImageError: if its file has been removed or damaged since the index was built.
        """
        if self._file is not None and self._memory is None:
            self._map(self._file)
        if self._memory is None:
            return self._read(number, rows)
        if self._view is None:
            self._view = self._memory.numpy()
        width, height = self.wh[number].tolist()
        start, stop = self._offsets[number : number + 2].tolist()
        return self._view[start:stop].reshape(height, width, 3)

    def keep_in_memory(self) -> None:
        """Load all images into memory, unless they would take more than 80% of what is free.

        Each rank on a machine has its own copy, and an equal share of the free memory.
        """
        needed, free = int(self._offsets[-1]), free_memory()
        if free is not None:
            free //= processes_here()
        if free is not None and needed > free * _MEMORY_SHARE:
            self.notes.append(
                f"images are not cached in memory: they take {needed / _GIB:.1f} GiB and "
                f"{free / _GIB:.1f} GiB are free; --cache disk needs none"
            )
            return
        memory = torch.empty(needed, dtype=torch.uint8)
        view = memory.numpy()
        for number, picture in enumerate(self._all()):
            view[self._offsets[number] : self._offsets[number + 1]] = picture.ravel()
        self._memory = memory
        self.notes.append(f"{counted(len(self._paths), 'image')} cached in memory ({needed / _GIB:.2f} GiB)")

    def keep_on_disk(self) -> None:
        """Write all images to a file in the user's cache folder, unless an intact one exists, and use it.

        Before writing it removes caches that have long been unused. A folder or file that cannot be used
        only costs time and adds to the notes.
        """
        needed, digest = int(self._offsets[-1]), self._digest()
        try:
            path = cache_path("pictures", digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            mark_used(path)  # before verifying it, which takes minutes
            if not is_intact(path, needed, digest) and not self._make_cache(path, needed, digest):
                return
            self._map(path)
        except LostImageError:
            raise
        except (OSError, RuntimeError, UserError) as error:  # RuntimeError: there is no home folder
            self.notes.append(f"images are not cached on disk: {error}")
            return
        if self._file is not None:
            self.notes.append(
                f"{counted(len(self._paths), 'image')} cached in {path} ({needed / _GIB:.2f} GiB)"
            )

    def _make_cache(self, path: Path, needed: int, digest: str) -> bool:
        """Write a cache of `needed` bytes, or wait for another process that does; False without space."""
        waiting = "waiting for another process that caches these images"
        with exclusive_lock(path.with_suffix(".lock"), lambda: Console().info(waiting)):
            if is_intact(path, needed, digest):
                return True
            remove_unused()
            free = free_bytes(path.parent)
            if needed > free:
                needs = f"they take {needed / _GIB:.1f} GiB and {path.parent} has {free / _GIB:.1f} GiB"
                self.notes.append(f"images are not cached on disk: {needs}")
                return False
            self._write(path, digest)
            return True

    def _write(self, path: Path, digest: str) -> None:
        """Write all images, followed by the ending by which `is_intact` recognises a complete file."""

        def write(file: BinaryIO) -> None:
            checksum = 0
            for picture in self._all():
                content = picture.tobytes()
                checksum = zlib.crc32(content, checksum)
                file.write(content)
            file.write(_ending(digest, checksum))

        replace_atomically(path, write)

    def _map(self, path: Path) -> None:
        """Map a cache file; goes on without it if it has disappeared since it was verified."""
        mark_used(path)
        try:
            self._memory, self._file = _mapped(path, int(self._offsets[-1])), path
        except (OSError, ValueError) as error:
            self._file = None
            self.notes.append(f"images are not cached on disk: {error}")

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the path of a cache file instead of its content, for workers that are not forked."""
        return self.__dict__ | {"_view": None} | ({"_memory": None} if self._file is not None else {})

    def _read(self, number: int, rows: int | None = None) -> Image:
        width, height = self._original_wh[number].tolist()
        scaled_width, scaled_height = self.wh[number].tolist()
        try:
            return read_for_training(
                self._paths[number], (width, height), (scaled_width, scaled_height), rows
            )
        except UnreadableImageError as error:
            raise LostImageError(number, self._paths[number], str(error)) from error

    def _all(self) -> Iterator[Image]:
        """Yield all images in order, decoded by several threads, a bounded number ahead."""
        count = len(self._paths)
        with (
            ThreadPoolExecutor(_THREADS) as pool,
            Console().progress(None, count, "caching images", unit=" images") as bar,
        ):
            for start in range(0, count, _CHUNK):
                for picture in pool.map(self._read, range(start, min(start + _CHUNK, count))):
                    yield picture
                    bar.update()

    def _digest(self) -> str:
        """Return a digest that differs whenever the cached bytes would."""
        stamps = []
        for number, path in enumerate(self._paths):
            try:
                status = os.stat(path)
            except OSError as error:
                raise LostImageError(number, path, error.strerror or str(error)) from error
            stamps.append([path, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
        described = json.dumps([_VERSION, self.image_size, self.wh.tolist(), stamps])
        return hashlib.sha256(described.encode(errors="surrogateescape")).hexdigest()


def free_memory() -> int | None:
    """Return the bytes of memory still available to this process, None if unknown.

    The smaller of the machine's available memory and what is left of its control group's limit (a
    container's).
    """
    candidates = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        candidates += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except OSError:
        pass
    for limit, used in _CGROUP:
        try:
            candidates.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such group, or its limit is the word "max"
    return max(min(candidates), 0) if candidates else None


def is_intact(path: Path, size: int, digest: str) -> bool:
    """Return whether a file holds `size` bytes of images with that digest, unchanged since written."""
    try:
        status = path.stat()
        ending = len(_ending(digest, 0))
        if not stat.S_ISREG(status.st_mode) or status.st_size != size + ending:
            return False
        with (
            open(path, "rb") as file,
            Console().progress(None, size, "checking cached images", unit="B") as bar,
        ):
            checksum, left = 0, size
            while left and (content := file.read(min(left, _READ))):
                checksum = zlib.crc32(content, checksum)
                left -= len(content)
                bar.update(len(content))
            return file.read() == _ending(digest, checksum)
    except OSError:
        return False


def _ending(digest: str, checksum: int) -> bytes:
    return _MARK + bytes.fromhex(digest) + checksum.to_bytes(4, "little")


def _mapped(path: Path, size: int) -> Tensor:
    array: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="c", shape=(size,))
    return torch.from_numpy(array)
