"""Webcams and network streams, of which only the newest frame matters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from utils.config.addresses import without_password
from utils.datasets.images import Image
from utils.errors import UserError
from utils.inference.frames import Frame, is_live
from utils.words import counted

_MOST_DIGITS = 9  # of a camera number
_MAX_PLAUSIBLE_FPS = 240.0  # cameras report 0, NaN or 1000 if they do not know
_SECONDS_TO_STOP = 5.0  # in case the network never answers


@dataclass(frozen=True)
class Persistence:
    """How to go on when a live stream gives no frame.

    reads: attempts in a row to read one, `read_pause` seconds apart; one damaged frame costs one. pauses:
    seconds before each attempt to open the stream again, about eight minutes in all: cameras restart.
    """

    reads: int = 5
    read_pause: float = 0.1
    pauses: Sequence[float] = (1, 2, 5, 10, 20, *[30] * 15)


@dataclass
class StreamSource:
    """Yields the newest frame of each of several streams in turn, until all have ended.

    One thread per stream reads as fast as frames arrive and keeps only the last one, so detection that is
    slower than the stream never lags by more than one frame. A live stream that is lost is opened again, as
    `persistence` says; one with a known number of frames ends with them.
    """

    addresses: Sequence[str]
    vid_stride: int = 1
    warn: Callable[[str], None] = print
    skipped: list[str] = field(default_factory=list)
    persistence: Persistence = field(default_factory=Persistence)

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
            for reader in readers:
                reader.join(_SECONDS_TO_STOP)

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
                self.skipped += [f"{reader.name}: gives no frames" for reader in readers if not reader.count]
                return

    def _opened(self, address: str, arrival: threading.Condition) -> _Reader | None:
        capture, name = _capture(address), without_password(address)
        if capture.isOpened():
            return _Reader(address, capture, self, arrival)
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
    """Reads one stream; hold `arrival` to call `has_news` and `take` and to read `ended`.

    count: the number of frames so far.
    """

    def __init__(
        self, address: str, capture: cv2.VideoCapture, source: StreamSource, arrival: threading.Condition
    ) -> None:
        super().__init__(name=without_password(address), daemon=True)
        fps = float(capture.get(cv2.CAP_PROP_FPS))
        self.fps = fps if 0 < fps <= _MAX_PLAUSIBLE_FPS else 0.0
        self.ended, self.count = False, 0
        self._address, self._capture, self._source, self._arrival = address, capture, source, arrival
        self._endless = is_live(address) and capture.get(cv2.CAP_PROP_FRAME_COUNT) <= 0
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
        try:
            while not self._stopping.is_set() and (self._read() or (self._endless and self._recover())):
                pass
        finally:
            self._capture.release()
            with self._arrival:
                self.ended = True
                self._arrival.notify_all()

    def stop(self) -> None:
        """Ask the thread to end."""
        self._stopping.set()

    def _read(self) -> bool:
        """Read a frame, and keep it if it is one of every `vid_stride`; returns False if there is none."""
        if not self._capture.grab():
            return False
        if self.count % self._source.vid_stride == 0:
            read, image = self._capture.retrieve()
            if not read:
                return False
            with self._arrival:
                self._newest = np.asarray(image, np.uint8), self.count
                self._arrival.notify_all()
        self.count += 1
        return True

    def _recover(self) -> bool:
        """Read a frame after a failed read, opening the stream again if need be; returns False if lost."""
        if self._read_patiently():
            return True
        pauses, warn = self._source.persistence.pauses, self._source.warn
        if not self._stopping.is_set():
            warn(f"{self.name}: no frames any more, opening it again")
        for pause in pauses:
            if self._stopping.wait(pause):
                return False
            self._capture.release()  # most cameras can only be opened once
            self._capture = _capture(self._address)
            if self._capture.isOpened() and self._read_patiently():
                return True
        if not self._stopping.is_set():
            warn(f"{self.name}: lost after {counted(len(pauses), 'attempt')} to open it again")
        return False

    def _read_patiently(self) -> bool:
        """Read a frame in one of several attempts; returns False if all fail."""
        persistence = self._source.persistence
        for _ in range(persistence.reads):
            if self._read():
                return True
            if self._stopping.wait(persistence.read_pause):
                return False
        return False
