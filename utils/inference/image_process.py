"""One of the processes that read images, and draw and write the detections in them; see `image_workers`."""

from __future__ import annotations

import signal
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.batch import Letterbox
from utils.datasets.images import Image
from utils.datasets.workers import outlive_signals
from utils.errors import UserError
from utils.inference.drawing import DrawStyle, draw_detections
from utils.inference.preprocess import letterbox_pixels
from utils.inference.sources import Unreadable, read_picture
from utils.inference.writers import write_image

_MAX_REASON = 500  # characters: unread messages must fit into the pipe


@dataclass(frozen=True)
class WorkerSettings:
    """How to letterbox images, and how to draw boxes."""

    size_hw: tuple[int, int]
    stride: int
    whole: bool
    names: Sequence[str]
    style: DrawStyle


class Ready(NamedTuple):
    """An image whose pixels are in a slot. seconds: what letterboxing and reading took."""

    slot: int
    pixels_hw: tuple[int, int]
    letterbox: Letterbox
    seconds: float


class Lost(NamedTuple):
    """An image that cannot be read. slot: left empty."""

    slot: int
    reason: str


class Failed(NamedTuple):
    """An error that ends the run: the parts of a UserError, or a traceback as `what` alone."""

    what: str
    where: str = ""
    fix: str = ""


class Free(NamedTuple):
    """A slot that may be filled again."""

    slot: int


class Found(NamedTuple):
    """The detections (n, 6) of the next image, float32, and where to write it. slot: free from now on."""

    detections: bytes
    path: str | None
    slot: int | None


class ImageProcess:
    """What one process does: prepare its images while it has free slots, and finish those with detections.

    A message of its own takes a slot, so that few are ever unread: it never blocks while it sends, only while
    it receives.
    """

    def __init__(
        self, connection: Connection, paths: Sequence[str], slots: NDArray[np.uint8], budget: int
    ) -> None:
        """`budget`: bytes of images to keep for drawing; others are read again."""
        self._connection, self._paths, self._slots, self._budget = connection, paths, slots, budget
        self._free = deque(range(len(slots)))
        # Of each image with the network: its path, and the image unless it has to be read again.
        self._waiting: deque[tuple[str, Image | None]] = deque()
        self._failed = False

    def run(self, others: Sequence[Connection]) -> None:
        """Work until all images are written, or the process with the network is gone.

        others: inherited ends of pipes, which would keep processes from noticing that.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # that process decides
        outlive_signals(0)
        for other in others:
            other.close()
        with suppress(EOFError):  # the other end is gone, and what it has sent is done
            settings = self._received()
            if settings is None:
                self._send(None)
                return
            assert isinstance(settings, WorkerSettings)
            self._work(settings)

    def _work(self, settings: WorkerSettings) -> None:
        for path in self._paths:
            while not self._free or self._connection.poll():
                if not self._take(settings):
                    return
            try:
                self._send(self._prepare(path, settings))
            except Exception as error:
                self._fail(error)
                break
        while self._take(settings):
            pass

    def _prepare(self, path: str, settings: WorkerSettings) -> Ready | Lost:
        """Read an image and put its pixels into a free slot."""
        begun, slot = perf_counter(), self._free.popleft()
        found = read_picture(path, "")
        if isinstance(found, Unreadable):
            return Lost(slot, found.reason[:_MAX_REASON])
        pixels, letterbox = letterbox_pixels(
            found.image, settings.size_hw, settings.stride, settings.whole, self._slots[slot]
        )
        held = sum(image.nbytes for _, image in self._waiting if image is not None)
        keeps = not held or held + found.image.nbytes <= self._budget
        self._waiting.append((path, found.image if keeps else None))
        return Ready(slot, (pixels.shape[0], pixels.shape[1]), letterbox, perf_counter() - begun)

    def _take(self, settings: WorkerSettings) -> bool:
        """Wait for a message and do what it says; return False if it was the last."""
        message = self._received()
        if message is None:
            self._send(None)
            return False
        assert isinstance(message, Free | Found)
        if message.slot is not None:
            self._free.append(message.slot)
        if isinstance(message, Found):
            path, image = self._waiting.popleft()
            try:
                self._write(message, path, image, settings)
            except Exception as error:  # the other images are written all the same
                self._fail(error)
        return True

    def _write(self, message: Found, path: str, image: Image | None, settings: WorkerSettings) -> None:
        if message.path is None:
            return
        if image is None:
            found = read_picture(path, "")
            if isinstance(found, Unreadable):
                raise UserError(f"cannot be read any more ({found.reason})", path, "start it again")
            image = found.image
        detections = np.frombuffer(message.detections, np.float32).reshape(-1, 6)
        write_image(Path(message.path), draw_detections(image, detections, settings.names, settings.style))

    def _fail(self, error: Exception) -> None:
        """Report the first error."""
        if self._failed:
            return
        self._failed = True
        if isinstance(error, UserError):
            self._send(Failed(error.what, error.where, error.fix))
        elif isinstance(error, MemoryError):
            self._send(Failed(f"out of memory ({error})", "main memory", "a smaller --imgsz needs less"))
        else:
            self._send(Failed("".join(traceback.format_exception(error))[-10_000:]))

    def _send(self, message: Ready | Lost | Failed | None) -> None:
        with suppress(OSError):  # if the other end is gone, receiving will tell, after what it has sent
            self._connection.send(message)

    def _received(self) -> object:
        """Return the next message. Raises EOFError if the other end is gone and all is read."""
        try:
            return self._connection.recv()
        except OSError as error:
            raise EOFError from error
