"""Webcams and network streams, of which only the newest frame matters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from utils.datasets.images import Image
from utils.errors import UserError
from utils.inference.frames import Frame, is_live, without_password

_MOST_DIGITS = 9  # of a camera number
_MAX_PLAUSIBLE_FPS = 240.0  # cameras report 0, NaN or 1000 if they do not know


@dataclass
class StreamSource:
    """Yields the newest frame of each of several streams in turn, until all have ended.

    One thread per stream reads as fast as frames arrive and keeps only the last one, so detection that is
    slower than the stream never lags by more than one frame.
    """

    addresses: Sequence[str]
    vid_stride: int = 1
    warn: Callable[[str], None] = print
    skipped: list[str] = field(default_factory=list)

    @property
    def files(self) -> Sequence[str]:
        """Empty: streams are not files."""
        return ()

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames as they arrive. Raises UserError if no stream can be opened."""
        arrival = threading.Condition()
        readers = [reader for address in self.addresses if (reader := self._opened(address, arrival))]
        if not readers:
            listed = ", ".join(map(without_password, self.addresses))
            raise UserError("cannot be opened", listed, "check the address, the camera and the network")
        for reader in readers:
            reader.start()
        try:
            yield from self._newest(readers, arrival)
        finally:
            for reader in readers:
                reader.stop()

    def _newest(self, readers: list[_Reader], arrival: threading.Condition) -> Iterator[Frame]:
        while True:
            with arrival:
                arrival.wait_for(lambda: any(reader.has_news() for reader in readers))
                fresh = [(reader, reader.take()) for reader in readers]
                over = all(reader.ended for reader in readers)
            for reader, taken in fresh:
                if taken is not None:
                    image, number = taken
                    yield Frame(image, reader.name, number, reader.fps, f"frame {number + 1}", live=True)
            if over:
                return

    def _opened(self, address: str, arrival: threading.Condition) -> _Reader | None:
        capture, name = _capture(address), without_password(address)
        if capture.isOpened():
            return _Reader(capture, name, self.vid_stride, arrival)
        capture.release()
        self.skipped.append(f"{name}: cannot be opened")
        if len(self.addresses) > 1:
            self.warn(f"skipped {name}: cannot be opened")
        return None


def _capture(address: str) -> cv2.VideoCapture:
    """Return the capture of a camera by number or a stream by address; not open if that fails."""
    if not (address.isdigit() and is_live(address)):
        return cv2.VideoCapture(address)
    if len(address) > _MOST_DIGITS:
        return cv2.VideoCapture()  # a number too large for a C int makes OpenCV raise its own error
    return cv2.VideoCapture(int(address))


class _Reader(threading.Thread):
    """Reads one stream; hold `arrival` to call `has_news` and `take` and to read `ended`."""

    def __init__(
        self, capture: cv2.VideoCapture, name: str, vid_stride: int, arrival: threading.Condition
    ) -> None:
        super().__init__(name=name, daemon=True)
        fps = float(capture.get(cv2.CAP_PROP_FPS))
        self.fps = fps if 0 < fps <= _MAX_PLAUSIBLE_FPS else 0.0
        self.ended = False
        self._capture, self._stride, self._arrival = capture, vid_stride, arrival
        self._newest: tuple[Image, int] | None = None
        self._stopping = threading.Event()
        self._end_was_told = False

    def has_news(self) -> bool:
        """Return whether there is a frame, or the end of the stream, that has not been taken yet."""
        return self._newest is not None or (self.ended and not self._end_was_told)

    def take(self) -> tuple[Image, int] | None:
        """Return the newest frame and its number, or None if it has been taken already."""
        taken, self._newest = self._newest, None
        self._end_was_told = self.ended
        return taken

    def run(self) -> None:
        number = 0
        try:
            while not self._stopping.is_set() and self._capture.grab():
                if number % self._stride == 0:
                    read, image = self._capture.retrieve()
                    if not read:
                        break
                    with self._arrival:
                        self._newest = np.asarray(image, np.uint8), number
                        self._arrival.notify_all()
                number += 1
        finally:
            self._capture.release()
            with self._arrival:
                self.ended = True
                self._arrival.notify_all()

    def stop(self) -> None:
        """Ask the thread to end and wait for it, with a timeout in case the network never answers."""
        self._stopping.set()
        self.join(timeout=5)
