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
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from utils.batch import Letterbox
from utils.config.addresses import is_address, without_password
from utils.datasets.images import IMAGE_SUFFIXES, Image
from utils.datasets.workers import usable_cpus
from utils.errors import UserError
from utils.inference.detector import BATCH_ON_GPU, Prepared
from utils.inference.drawing import DrawStyle, draw_detections
from utils.inference.frames import Frame, suffix_of
from utils.inference.pipeline import BUDGET_BYTES
from utils.inference.preprocess import as_batch, letterbox_pixels
from utils.inference.sources import FileSource, Unreadable, read_picture
from utils.inference.writers import write_image

LEAST_WORKERS, MOST_WORKERS = 3, 16
# With fewer images, starting processes takes longer than they save.
LEAST_IMAGES = 100
_COARSEST = 128  # px: no stride is larger


@dataclass(frozen=True)
class WorkerSettings:
    """How to letterbox images, and how to draw boxes."""

    size_hw: tuple[int, int]
    stride: int
    whole: bool
    names: Sequence[str]
    style: DrawStyle


class _Ready(NamedTuple):
    """An image whose pixels are in a slot. seconds: what that took."""

    slot: int
    pixels_hw: tuple[int, int]
    letterbox: Letterbox
    seconds: float


class _Failed(NamedTuple):
    """An error that ends the run."""

    what: str
    where: str
    fix: str


def worker_count(device: torch.device) -> int:
    """Return how many processes to start: none on a CPU, where the network needs most of the time.

    One CPU is left to the process with the network. On so few that threads serve as well, there are none.
    """
    if device.type != "cuda" or not hasattr(os, "fork"):
        return 0
    count = min(usable_cpus() - 1, MOST_WORKERS)
    return count if count >= LEAST_WORKERS else 0


def are_plain_images(paths: Sequence[str]) -> bool:
    """Return whether all sources are image files on this machine."""
    return all(suffix_of(path) in IMAGE_SUFFIXES and not is_address(path) for path in paths)


class ImageWorkers:
    """Worker processes for images; use it in a `with` block.

    Start them early: a process that uses a GPU takes longer to fork. Then call `configure`, iterate over
    `prepared`, and call `finish` for every image in that order.
    """

    def __init__(self, paths: Sequence[str], most_hw: tuple[int, int], count: int) -> None:
        """`most_hw`: the largest size in px of letterboxed images."""
        sides = (math.ceil(side / _COARSEST) * _COARSEST for side in most_hw)
        self._slot_bytes = 3 * math.prod(sides)
        # A batch is read ahead while two are with the network, which need all of their images at once.
        self._depth = math.ceil(3 * BATCH_ON_GPU / count) + 2
        self._paths = paths
        memory = mmap.mmap(-1, count * self._depth * self._slot_bytes)
        self._slots = np.frombuffer(memory, np.uint8).reshape(count, self._depth, self._slot_bytes)
        self._connections: list[Connection] = []
        self._processes = []
        context: Any = multiprocessing.get_context("fork")
        for number in range(count):
            own, theirs = context.Pipe()
            self._connections.append(own)
            work = _Worker(theirs, paths[number::count], self._slots[number], BUDGET_BYTES // count)
            process = context.Process(target=work.run, args=(tuple(self._connections),), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
        self._owed: deque[Connection] = deque()

    def configure(self, settings: WorkerSettings) -> bool:
        """Let the workers begin; return False if the shared memory is too small for these images."""
        sides = (math.ceil(side / settings.stride) * settings.stride for side in settings.size_hw)
        if 3 * math.prod(sides) > self._slot_bytes:
            return False
        for connection in self._connections:
            self._send(connection, settings)
        return True

    def prepared(self, source: FileSource) -> Iterator[Prepared]:
        """Yield the images in order, without their content: `frame.image` has nothing but a shape.

        Unreadable ones are skipped. The pixels are valid until `finish` is called for the image.
        """
        for index, path in enumerate(self._paths):
            number = index % len(self._connections)
            connection = self._connections[number]
            found = self._receive(connection)
            if isinstance(found, str):
                source.skip(Unreadable(path, found))
                continue
            height, width = found.pixels_hw
            pixels = self._slots[number, found.slot, : height * width * 3].reshape(height, width, 3)
            place = f"{index + 1}/{len(self._paths)}"
            frame = Frame(_shape_alone(found.letterbox.original_hw), without_password(path), place=place)
            self._owed.append(connection)
            yield Prepared(frame, as_batch(pixels), found.letterbox, found.seconds)

    def finish(self, detections: NDArray[np.float32], path: Path | None) -> None:
        """Let the next image be drawn and written to `path`, if that is given.

        detections: (n, 6) in its pixels.
        """
        given = (detections.tobytes(), None if path is None else str(path))
        self._send(self._owed.popleft(), given)

    def __enter__(self) -> ImageWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for connection in self._connections if kind is None else ():
                self._send(connection, None)
            for connection in self._connections if kind is None else ():
                while self._receive(connection) is not None:
                    pass
        finally:
            # Without its other end each worker writes what it has been given, and ends.
            for connection in self._connections:
                connection.close()
            for process in self._processes:
                process.join()

    def _send(self, connection: Connection, message: object) -> None:
        try:
            connection.send(message)
        except OSError:
            while True:
                self._receive(connection)  # ends with the reason, if the worker has told it

    def _receive(self, connection: Connection) -> Any:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if isinstance(message, _Failed):
            raise UserError(*message)
        return message

    def _lost(self) -> UserError:
        fix = "start it again; if memory is short, close other programs"
        return UserError("a process that reads and writes images has ended", "detection", fix)


@lru_cache(maxsize=64)
def _shape_alone(height_width: tuple[int, int]) -> Image:
    """Return an image of that size that takes no memory."""
    return np.broadcast_to(np.zeros((), np.uint8), (*height_width, 3))


class _Worker:
    """What one process does."""

    def __init__(
        self, connection: Connection, paths: Sequence[str], slots: NDArray[np.uint8], budget: int
    ) -> None:
        """`budget`: bytes of images to keep for drawing; others are read again."""
        self._connection, self._paths, self._slots, self._budget = connection, paths, slots, budget
        # Of each image with the network: its path, and the image unless it has to be read again.
        self._waiting: deque[tuple[str, Image | None]] = deque()

    def run(self, others: Sequence[Connection]) -> None:
        """Work until all images are written, or the process with the network is gone.

        others: inherited ends of pipes, which would keep workers from noticing that.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides
        for other in others:
            other.close()
        with suppress(EOFError, OSError):  # of the pipe, whose other end is gone
            settings = self._connection.recv()
            try:
                self._work(settings)
            except OSError:  # of sending: what has come before can still be written
                while self._finish_one(settings):
                    pass
            except UserError as error:
                self._connection.send(_Failed(error.what, error.where, error.fix))
            except MemoryError:
                self._connection.send(_Failed("out of memory", "main memory", "a smaller --imgsz needs less"))

    def _work(self, settings: WorkerSettings | None) -> None:
        if settings is None:
            self._connection.send(None)
            return
        count = 0
        for path in self._paths:
            while len(self._waiting) == len(self._slots) or (self._waiting and self._connection.poll()):
                if not self._finish_one(settings):
                    return
            begun = perf_counter()
            found = read_picture(path, "")
            if isinstance(found, Unreadable):
                self._connection.send(found.reason)
                continue
            slot = count % len(self._slots)
            pixels, letterbox = letterbox_pixels(
                found.image, settings.size_hw, settings.stride, settings.whole, self._slots[slot]
            )
            held = sum(image.nbytes for _, image in self._waiting if image is not None)
            keeps = held + found.image.nbytes <= self._budget
            self._waiting.append((path, found.image if keeps else None))
            hw = (pixels.shape[0], pixels.shape[1])
            self._connection.send(_Ready(slot, hw, letterbox, perf_counter() - begun))
            count += 1
        while self._finish_one(settings):
            pass

    def _finish_one(self, settings: WorkerSettings) -> bool:
        """Draw and write the oldest image; return False if there is none to come."""
        message = self._connection.recv()
        if message is None:
            self._connection.send(None)
            return False
        given, target = message
        path, image = self._waiting.popleft()
        if target is not None:
            found = read_picture(path, "") if image is None else None
            if isinstance(found, Unreadable):
                raise UserError(f"cannot be read any more ({found.reason})", path, "start it again")
            image = found.image if found is not None else image
            assert image is not None
            detections = np.frombuffer(given, np.float32).reshape(-1, 6)
            write_image(Path(target), draw_detections(image, detections, settings.names, settings.style))
        return True
