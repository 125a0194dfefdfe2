"""Streams that break off: a camera's server on this machine, and webcams that are made up."""

from __future__ import annotations

import http.server
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain

import cv2
import numpy as np
import pytest

from utils.inference.streams import Persistence, StreamSource

SHORT = Persistence(reads=2, read_pause=0.001, pauses=(0.01,) * 3)
DAMAGED = b"\xff\xd8 no JPEG"


def grey(value: int) -> bytes:
    return cv2.imencode(".jpg", np.full((48, 64, 3), value, np.uint8))[1].tobytes()


def scene(value: int) -> Iterator[bytes]:
    """Twelve frames, the last of this grey: OpenCV wants some before it takes them for a stream."""
    return map(grey, [*range(100, 111), value])


class Camera:
    """An MJPEG server. plans: the frames of each connection to a path; it refuses those beyond."""

    def __init__(self) -> None:
        self.plans: dict[str, list[Iterator[bytes]]] = {}
        camera = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                plans = camera.plans[self.path]
                if not plans:
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                for image in plans.pop(0):
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(image)}\r\n\r\n"
                    with suppress(OSError):  # the reader has left
                        self.wfile.write(head.encode() + image + b"\r\n")

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def streams(self, **plans: list[Iterator[bytes]]) -> list[str]:
        """Sets the plans; returns the addresses."""
        self.plans = {f"/{name}": plan for name, plan in plans.items()}
        return [self.address + path for path in self.plans]


@pytest.fixture
def camera() -> Iterator[Camera]:
    made = Camera()
    with made.server:
        threading.Thread(target=made.server.serve_forever, daemon=True).start()
        yield made
        made.server.shutdown()


@pytest.mark.fault(
    "a camera's stream breaks off",
    "opened again with growing pauses and one warning for each loss; frames go on into the same video",
)
def test_a_lost_stream_is_opened_again_with_one_warning_for_each_loss(camera: Camera) -> None:
    plans = [scene(10), iter([]), scene(20), scene(220)]
    (address,) = camera.streams(door=plans)
    said: list[str] = []
    source = StreamSource([address], warn=said.append, persistence=SHORT)
    frames = list(source)
    assert frames[-1].number == 35 and abs(frames[-1].image.mean() - 220) < 3
    numbers = [frame.number or 0 for frame in frames]
    assert numbers == sorted(set(numbers)) and {frame.source for frame in frames} == {address}
    lost = f"{address}: no frames any more, opening it again"
    assert said == [lost, lost, lost, f"{address}: lost after 3 attempts to open it again"]
    assert source.skipped == []


def test_a_damaged_frame_is_left_out(camera: Camera) -> None:
    (address,) = camera.streams(door=[chain(scene(10), [DAMAGED], scene(20), [DAMAGED], scene(30))])
    said: list[str] = []
    frames = list(StreamSource([address], warn=said.append, persistence=SHORT))
    assert frames[-1].number == 35 and abs(frames[-1].image.mean() - 30) < 3
    assert len(said) == 2  # the end of the stream is a loss, and it does not come back


@pytest.mark.fault("one of several streams stays away", "given up with a warning; the others go on")
def test_other_streams_go_on_without_a_lost_one(camera: Camera) -> None:
    is_lost = threading.Event()

    def until_lost() -> Iterator[bytes]:
        end = time.monotonic() + 30
        while not is_lost.is_set() and time.monotonic() < end:
            yield grey(10)
            time.sleep(0.005)
        yield grey(220)

    addresses = camera.streams(door=[scene(10)], yard=[until_lost()])
    said: list[str] = []

    def warn(text: str) -> None:
        said.append(text)
        if "lost" in text:
            is_lost.set()

    frames = list(StreamSource(addresses, warn=warn, persistence=SHORT))
    assert frames[-1].source == addresses[1] and abs(frames[-1].image.mean() - 220) < 3
    assert [text.split()[0] for text in said] == [f"{addresses[0]}:"] * 2 + [f"{addresses[1]}:"] * 2


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, None])
def test_waiting_for_a_lost_stream_ends_at_once(camera: Camera, number: int | None) -> None:
    """By Ctrl-C, and when its frames are not wanted any longer."""
    (address,) = camera.streams(door=[scene(10)])
    waiting = threading.Event()

    def warn(_: str) -> None:
        waiting.set()
        if number is not None:
            os.kill(os.getpid(), number)

    frames = iter(StreamSource([address], warn=warn, persistence=Persistence(2, 0.001, (60.0,))))
    begun = time.monotonic()
    if number is None:
        next(frames)
        assert waiting.wait(30)
        frames.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(KeyboardInterrupt):
            list(frames)
    assert time.monotonic() - begun < 30
    assert not any(thread.name == address for thread in threading.enumerate())


class Webcam:
    """In place of OpenCV's capture. frames: the grey values of its frames, None where it fails."""

    opened = 0

    def __init__(self, frames: list[int | None] | None) -> None:
        self.frames, self.current = frames, None
        assert Webcam.opened == 0, "a camera can only be opened once"
        Webcam.opened += 1

    def isOpened(self) -> bool:  # noqa: N802 - OpenCV's name
        return self.frames is not None

    def get(self, _: int) -> float:
        return -1.0

    def grab(self) -> bool:
        self.current = self.frames.pop(0) if self.frames else None
        return bool(self.frames) or self.current is not None

    def retrieve(self) -> tuple[bool, np.ndarray | None]:
        if self.current is None:
            return False, None
        return True, np.full((48, 64, 3), self.current, np.uint8)

    def release(self) -> None:
        Webcam.opened -= 1


@pytest.fixture
def webcam(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the next openings of a webcam have these frames; after that there is none."""
    monkeypatch.setattr(Webcam, "opened", 0)

    def plug(*plans: list[int | None] | None) -> None:
        waiting = list(plans)
        monkeypatch.setattr(cv2, "VideoCapture", lambda _: Webcam(waiting.pop(0) if waiting else None))

    return plug


def test_a_webcam_that_is_pulled_out_and_plugged_in_again_goes_on(webcam: Callable[..., None]) -> None:
    webcam([10, None, 20], None, None, [30, 40])
    said: list[str] = []
    frames = list(StreamSource(["0"], warn=said.append, persistence=SHORT))
    assert frames[-1].number == 3 and frames[-1].image.mean() == 40
    assert said == [
        *["0: no frames any more, opening it again"] * 2,
        "0: lost after 3 attempts to open it again",
    ]
    assert Webcam.opened == 0


def test_a_stream_without_any_frame_is_told(webcam: Callable[..., None]) -> None:
    webcam([], [], [], [])
    source = StreamSource(["0"], warn=lambda _: None, persistence=SHORT)
    assert list(source) == [] and source.skipped == ["0: gives no frames"]
