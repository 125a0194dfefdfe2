"""Where the training loader gets scaled pictures from: their files, memory, or one file on disk.

Cached pictures lie one after the other in a single buffer. Workers share it: forked ones as it
is, others through shared memory or by mapping the same file. A file ends in what it is a cache of and a
checksum, which every start looks at; whatever is wrong with a cache, training goes on without it.
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


class LostPictureError(UserError):
    """A picture that could be read when the index was made and no longer; number: its place there."""

    def __init__(self, number: int, path: str, reason: str) -> None:
        super().__init__(
            f"was readable when the index was made and is no longer ({reason})",
            path,
            "put it back or start again, which leaves it out",
        )
        self.number, self.path, self.reason = number, path, reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Says how to make it again in another process."""
        return LostPictureError, (self.number, self.path, self.reason)


class PictureStore:
    """Pictures (H, W, 3) BGR uint8 by number, the longer side scaled to `image_size`.

    wh: (N, 2) the scaled sizes, pixels.
    notes: sentences for the console on what was cached and what was not.
    """

    def __init__(self, index: DatasetIndex, image_size: int) -> None:
        self._paths, self._original_wh = index.paths, index.sizes_wh
        self.image_size = image_size
        self.wh = all_scaled_wh(index.sizes_wh, image_size)
        self._offsets = np.concatenate([[0], np.cumsum(self.wh.prod(1) * 3)])
        self._memory: Tensor | None = None
        # Of that memory: a slice of a tensor costs ten times more.
        self._view: NDArray[np.uint8] | None = None
        self._file: Path | None = None
        self.notes: list[str] = []

    def load(self, number: int) -> Image:
        """The picture of a number; not to be written to.

        Raises:
            LostPictureError: when its file has gone or been damaged since the index was made.
        """
        if self._file is not None and self._memory is None:
            self._map(self._file)
        if self._memory is None:
            return self._read(number)
        if self._view is None:
            self._view = self._memory.numpy()
        width, height = self.wh[number].tolist()
        start, stop = self._offsets[number : number + 2].tolist()
        return self._view[start:stop].reshape(height, width, 3)

    def keep_in_memory(self) -> None:
        """Loads all pictures, unless that takes more than most of the free memory.

        Each of several processes on a machine has its own, and a part of what is free.
        """
        needed, free = int(self._offsets[-1]), free_memory()
        if free is not None:
            free //= processes_here()
        if free is not None and needed > free * _MEMORY_SHARE:
            self.notes.append(
                f"pictures are not cached in memory: they take {needed / _GIB:.1f} GiB and "
                f"{free / _GIB:.1f} GiB are free; --cache disk needs none"
            )
            return
        memory = torch.empty(needed, dtype=torch.uint8)
        view = memory.numpy()
        for number, picture in enumerate(self._all()):
            view[self._offsets[number] : self._offsets[number + 1]] = picture.ravel()
        self._memory = memory
        self.notes.append(
            f"{counted(len(self._paths), 'picture')} cached in memory ({needed / _GIB:.2f} GiB)"
        )

    def keep_on_disk(self) -> None:
        """Writes all pictures to a file of the user's cache folder, unless it is there already and intact.

        Where it writes one, others that nobody has used for long go.

        A folder or file that cannot be used costs time and is told in the notes, no more.
        """
        needed, digest = int(self._offsets[-1]), self._digest()
        try:
            path = cache_path("pictures", digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            mark_used(path)  # before it is looked at, which takes minutes
            if not is_intact(path, needed, digest):
                remove_unused()
                free = free_bytes(path.parent)
                if needed > free:
                    needs = f"they take {needed / _GIB:.1f} GiB and {path.parent} has {free / _GIB:.1f} GiB"
                    self.notes.append(f"pictures are not cached on disk: {needs}")
                    return
                self._write(path, digest)
            self._map(path)
        except LostPictureError:
            raise
        except (OSError, RuntimeError, UserError) as error:  # RuntimeError: there is no home folder
            self.notes.append(f"pictures are not cached on disk: {error}")
            return
        if self._file is not None:
            self.notes.append(
                f"{counted(len(self._paths), 'picture')} cached in {path} ({needed / _GIB:.2f} GiB)"
            )

    def _write(self, path: Path, digest: str) -> None:
        """Writes all pictures, and behind them what makes the file known as intact."""

        def write(file: BinaryIO) -> None:
            checksum = 0
            for picture in self._all():
                content = picture.tobytes()
                checksum = zlib.crc32(content, checksum)
                file.write(content)
            file.write(_ending(digest, checksum))

        replace_atomically(path, write)

    def _map(self, path: Path) -> None:
        """Takes the pictures from a file; without it where it has gone since it was looked at."""
        mark_used(path)
        try:
            self._memory, self._file = _mapped(path, int(self._offsets[-1])), path
        except (OSError, ValueError) as error:
            self._file = None
            self.notes.append(f"pictures are not cached on disk: {error}")

    def __getstate__(self) -> dict[str, Any]:
        """What a worker that is not forked gets: the name of a cache file, not its content."""
        return self.__dict__ | {"_view": None} | ({"_memory": None} if self._file is not None else {})

    def _read(self, number: int) -> Image:
        width, height = self._original_wh[number]
        scaled_width, scaled_height = self.wh[number]
        try:
            return read_for_training(
                self._paths[number], (int(width), int(height)), (int(scaled_width), int(scaled_height))
            )
        except UnreadableImageError as error:
            raise LostPictureError(number, self._paths[number], str(error)) from error

    def _all(self) -> Iterator[Image]:
        """All pictures in order, decoded by several threads, a bounded number ahead."""
        count = len(self._paths)
        with (
            ThreadPoolExecutor(_THREADS) as pool,
            Console().progress(None, count, "caching pictures", unit=" pictures") as bar,
        ):
            for start in range(0, count, _CHUNK):
                for picture in pool.map(self._read, range(start, min(start + _CHUNK, count))):
                    yield picture
                    bar.update()

    def _digest(self) -> str:
        """Differs whenever the cached bytes would."""
        stamps = []
        for number, path in enumerate(self._paths):
            try:
                status = os.stat(path)
            except OSError as error:
                raise LostPictureError(number, path, error.strerror or str(error)) from error
            stamps.append([path, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
        described = json.dumps([_VERSION, self.image_size, self.wh.tolist(), stamps])
        return hashlib.sha256(described.encode(errors="surrogateescape")).hexdigest()


def free_memory() -> int | None:
    """Bytes that this process may still take, None where the system does not tell.

    The smaller of what the machine has available and what its control group (a container's
    limit) leaves.
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
    """Whether a file holds `size` bytes of pictures with that digest, as they were written."""
    try:
        status = path.stat()
        ending = len(_ending(digest, 0))
        if not stat.S_ISREG(status.st_mode) or status.st_size != size + ending:
            return False
        with (
            open(path, "rb") as file,
            Console().progress(None, size, "checking cached pictures", unit="B") as bar,
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
