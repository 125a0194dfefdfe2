"""Processes that read images, and draw and write the detections in them.

Beside a fast GPU, what Python does for each image takes longer than the network, and the threads of a process
run Python one at a time. Here each image has a process from its file to the file with the boxes: only
its letterboxed pixels, in shared memory, and its detections pass between that and the one with the network.
"""

from __future__ import annotations

import math
import mmap
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from utils.config.addresses import is_address, without_password
from utils.datasets.images import IMAGE_SUFFIXES, Image
from utils.datasets.workers import usable_cpus
from utils.errors import UserError
from utils.inference.detector import BATCH_ON_GPU, Prepared
from utils.inference.frames import Frame, suffix_of
from utils.inference.image_process import Failed, Found, Free, ImageProcess, Lost, WorkerSettings
from utils.inference.pipeline import BUDGET_BYTES
from utils.inference.preprocess import as_batch
from utils.inference.sources import FileSource, Unreadable

LEAST_WORKERS, MOST_WORKERS = 3, 16
# With fewer images, starting processes takes longer than they save.
LEAST_IMAGES = 100
_COARSEST = 128  # px: no stride is larger


def worker_count(device: torch.device) -> int:
    """Return how many processes to start: none on a CPU, where the network needs most of the time.

    One CPU is left to the process with the network. On so few that threads serve as well, there are none.
    """
    if device.type != "cuda" or not hasattr(os, "fork") or multiprocessing.current_process().daemon:
        return 0
    count = min(usable_cpus() - 1, MOST_WORKERS)
    return count if count >= LEAST_WORKERS else 0


def are_plain_images(paths: Sequence[str]) -> bool:
    """Return whether all sources are image files on this machine."""
    return all(suffix_of(path) in IMAGE_SUFFIXES and not is_address(path) for path in paths)


class ImageWorkers:
    """Processes for images, the i-th of n for the images i, i + n, i + 2 n, ...; use it in a `with` block.

    Start them early: a process that uses a GPU takes longer to fork. Then call `configure`, iterate over
    `prepared`, and call `finish` for every image in that order.
    """

    def __init__(self, paths: Sequence[str], most_hw: tuple[int, int], count: int) -> None:
        """`most_hw`: the largest size in px of letterboxed images. Raises OSError if the system refuses."""
        sides = (math.ceil(side / _COARSEST) * _COARSEST for side in most_hw)
        self._slot_bytes = 3 * math.prod(sides)
        # Mostly enough for two batches with the network and one that is read ahead.
        self._depth = math.ceil(3 * BATCH_ON_GPU / count) + 2
        self._paths = paths
        memory = mmap.mmap(-1, count * self._depth * self._slot_bytes)
        self._slots = np.frombuffer(memory, np.uint8).reshape(count, self._depth, self._slot_bytes)
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._taken = [0] * count  # slots of each whose pixels are still needed here
        self._owed: deque[tuple[int, int | None]] = deque()  # of each image to finish: its process and slot
        try:
            for number in range(count):
                self._start(number, paths[number::count], BUDGET_BYTES // count)
        except OSError:
            self._close()
            raise

    def _start(self, number: int, paths: Sequence[str], budget: int) -> None:
        context: Any = multiprocessing.get_context("fork")
        own, theirs = context.Pipe()
        self._connections.append(own)
        work = ImageProcess(theirs, paths, self._slots[number], budget)
        process = context.Process(target=work.run, args=(tuple(self._connections),), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)

    def configure(self, settings: WorkerSettings) -> bool:
        """Let the processes begin; return False if the shared memory is too small for these images."""
        sides = (math.ceil(side / settings.stride) * settings.stride for side in settings.size_hw)
        if 3 * math.prod(sides) > self._slot_bytes:
            return False
        for number in range(len(self._connections)):
            self._send(number, settings)
        return True

    def prepared(self, source: FileSource) -> Iterator[Prepared]:
        """Yield the images in order, without their content: `frame.image` has nothing but a shape.

        Unreadable ones are skipped. The pixels are valid until `finish` is called for the image.
        """
        for index, path in enumerate(self._paths):
            number = index % len(self._connections)
            found = self._receive(number)
            if isinstance(found, Lost):
                self._send(number, Free(found.slot))
                source.skip(Unreadable(path, found.reason))
                continue
            height, width = found.pixels_hw
            pixels = self._slots[number, found.slot, : height * width * 3].reshape(height, width, 3)
            pixels, slot = self._kept(number, pixels, found.slot)
            self._owed.append((number, slot))
            place = f"{index + 1}/{len(self._paths)}"
            frame = Frame(_shape_alone(found.letterbox.original_hw), without_password(path), place=place)
            yield Prepared(frame, as_batch(pixels), found.letterbox, found.seconds)

    def _kept(self, number: int, pixels: Image, slot: int) -> tuple[Image, int | None]:
        """Leave pixels in their slot, unless their process would have none left: it must go on meanwhile.

        That happens where one process has most images of a batch, because others are unreadable.
        """
        if self._taken[number] + 1 < self._depth:
            self._taken[number] += 1
            return pixels, slot
        own = pixels.copy()
        self._send(number, Free(slot))
        return own, None

    def finish(self, detections: NDArray[np.float32], path: Path | None) -> None:
        """Let the next image be drawn and written to `path`, if that is given.

        detections: (n, 6) in its pixels.
        """
        number, slot = self._owed.popleft()
        if slot is not None:
            self._taken[number] -= 1
        self._send(number, Found(detections.tobytes(), None if path is None else str(path), slot))

    def __enter__(self) -> ImageWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until all is written that `finish` was called for; a second call does nothing."""
        numbers = range(len(self._connections)) if kind is None else ()
        try:
            for number in numbers:
                self._send(number, None)
            for number in numbers:
                while self._receive(number) is not None:
                    pass
        finally:
            self._close()

    def _close(self) -> None:
        # Without its other end each process writes what it has been given, and ends.
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()
        self._connections, self._processes = [], []

    def _send(self, number: int, message: object) -> None:
        try:
            self._connections[number].send(message)
        except OSError:
            while True:
                self._receive(number)  # ends with the reason, if the process has told it

    def _receive(self, number: int) -> Any:
        try:
            message = self._connections[number].recv()
        except (EOFError, OSError):
            fix = "start it again; if memory is short, close other programs"
            what = "a process that reads and writes images has ended"
            raise UserError(what, "detection", fix) from None
        if isinstance(message, Failed):
            if message.fix:
                raise UserError(*message)
            raise RuntimeError(f"in a process that reads and writes images:\n{message.what}")
        return message


@lru_cache(maxsize=64)
def _shape_alone(height_width: tuple[int, int]) -> Image:
    """Return an image of that size that takes no memory."""
    return np.broadcast_to(np.zeros((), np.uint8), (*height_width, 3))
