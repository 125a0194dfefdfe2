"""Writers for the results of detection: images, videos, label files, a table and crops."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from torch import Tensor

from utils.boxes import xyxy_to_cxcywh
from utils.config.files import refusals, replacement
from utils.datasets.images import IMAGE_SUFFIXES, Image
from utils.errors import UserError
from utils.inference.frames import file_name, is_utf8
from utils.words import counted

# OpenCV reads more image formats than it writes, and which depends on its build. Left out are those for
# grey or black and white, in which the boxes would lose their colours.
_WRITABLE = frozenset(
    suffix for suffix in IMAGE_SUFFIXES - {".pbm", ".pgm"} if cv2.haveImageWriter(f"image{suffix}")
)
_RESERVED = frozenset("con prn aux nul".split()) | {f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10)}
_MAX_NAME = 120
_MAX_NAME_BYTES = 200  # file systems allow 255; a number and a suffix are added
_DEFAULT_FPS = 30.0
_CROP_FACTOR, _CROP_BORDER_PX = 1.02, 10
_REFUSED, _CHECK = "cannot be written", "check the space on the disk"


def safe_name(text: str) -> str:
    """Turn any text into a file name: a single path component that is valid on every system.

    Letters and digits of any script, blanks and -_.,()+ are kept; everything else becomes "_".
    """
    kept = "".join(c if c.isalnum() or c in " -_.,()+" else "_" for c in text)
    short = kept[:_MAX_NAME].encode("utf-8")[:_MAX_NAME_BYTES].decode("utf-8", errors="ignore")
    name = short.strip(" .") or "_"
    return f"_{name}" if name.partition(".")[0].lower() in _RESERVED else name


class NameBook:
    """Assigns a file name to each key, unique ignoring case."""

    def __init__(self) -> None:
        self._by_key: dict[object, str] = {}
        self._taken: set[str] = set()
        self._expected: set[str] = set()
        self._series: set[str] = set()
        self._numbered: set[str] = set()

    def expect(self, stem: str, series: bool = False) -> None:
        """Reserve a name that will be requested, so that no other stem with a number appended gets it."""
        self._expected.add(stem.casefold())
        self._note(stem.casefold(), series)

    def name(self, key: object, stem: str, suffix: str = "", *, series: bool = False) -> str:
        """Return the key's name: at its first call `stem` and `suffix`, with a number between if necessary.

        series: the name with `_1`, `_2`, ... appended must not be that of another key either.
        """
        if key not in self._by_key:
            name, number = f"{stem}{suffix}", 1
            # A series of that name occupies every `_N`.
            joint = "-" if name.casefold() in self._series and not series else "_"
            # On some systems A.txt and a.txt are the same file.
            while not self._is_free(name.casefold(), number == 1, series):
                number += 1
                name = f"{stem}{joint}{number}{suffix}"
            self._taken.add(name.casefold())
            self._note(name.casefold(), series)
            self._by_key[key] = name
        return self._by_key[key]

    def _is_free(self, name: str, is_own: bool, series: bool) -> bool:
        if name in self._taken or (not is_own and name in self._expected):
            return False
        if series:
            return name not in self._numbered
        return _before_number(name) not in self._series or (is_own and name in self._expected)

    def _note(self, name: str, series: bool) -> None:
        """Record a series, or the series name that would collide with this name."""
        if series:
            self._series.add(name)
        elif before := _before_number(name):
            self._numbered.add(before)


def _before_number(name: str) -> str:
    """Return a name without its ending `_N`, empty if it has none."""
    before, _, number = name.rpartition("_")
    return before if number.isdecimal() else ""


def label_lines(detections: Tensor, image_hw: tuple[int, int], with_confidence: bool) -> str:
    """Format detections (n, 6) in pixels as lines `class cx cy w h [confidence]`, normalised."""
    height, width = image_hw
    size = detections.new_tensor((width, height, width, height))
    boxes = (xyxy_to_cxcywh(detections[:, :4]) / size).tolist()
    lines = []
    for box, (confidence, label) in zip(boxes, detections[:, 4:].tolist(), strict=True):
        values = [*box, confidence] if with_confidence else box
        lines.append(" ".join([str(int(label)), *(f"{value:.6g}" for value in values)]) + "\n")
    return "".join(lines)


class LabelWriter:
    """Writes `FOLDER/NAME.txt` for each image or frame with detections.

    Without detections there is no file: one left by an earlier run into the same folder is removed.
    """

    def __init__(self, folder: Path, with_confidence: bool) -> None:
        self.folder, self.with_confidence, self.count = folder, with_confidence, 0
        with refusals(_REFUSED, folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, detections: Tensor, image_hw: tuple[int, int]) -> None:
        """Write one file of detections (n, 6), or remove it if there are none.

        `name` is a safe file name without suffix. Raises UserError if the system refuses.
        """
        path = self.folder / f"{name}.txt"
        if not len(detections):
            with refusals(_REFUSED, path):
                path.unlink(missing_ok=True)
            return
        write_one_of_many(path, label_lines(detections, image_hw, self.with_confidence).encode())
        self.count += 1


class TableWriter:
    """Writes one CSV row per detection: image, class name, confidence, frame, box in pixels.

    The table gets its name when it is closed, so that a full disk leaves an earlier one as it was. It is
    begun with the first image: without any, there is none.
    """

    COLUMNS = ("Image Name", "Prediction", "Confidence", "Frame", "x1", "y1", "x2", "y2")

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, names
        self._file = ExitStack()
        self._stream: BinaryIO | None = None

    def write(self, image: str, frame: int | None, detections: Tensor) -> None:
        """Append the detections (n, 6) of an image or of a video's frame, counted from 0.

        Raises UserError if the system refuses.
        """
        number = "" if frame is None else frame + 1  # as in the names of label files
        self._write(
            [image, self.names[int(label)], f"{confidence:.4f}", number, *(f"{value:.1f}" for value in box)]
            for *box, confidence, label in detections.tolist()
        )

    def _write(self, rows: Iterable[Sequence[object]]) -> None:
        text = io.StringIO(newline="")
        if self._stream is None:
            self._stream = self._file.enter_context(replacement(self.path))
            csv.writer(text).writerow(self.COLUMNS)
        csv.writer(text).writerows(rows)
        with refusals(_REFUSED, self.path):
            # A file name need not be valid text.
            self._stream.write(text.getvalue().encode("utf-8", errors="backslashreplace"))

    def close(self) -> None:
        """Finish the table. Raises UserError if the system refuses to write the rest."""
        self._file.close()


class CropWriter:
    """Saves each detection, with a small margin, as `FOLDER/CLASS/NAME.jpg`."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names
        self._folders = NameBook()
        self._files: dict[str, NameBook] = {}

    def write(self, name: str, image: Image, detections: Tensor) -> None:
        """Save the crops of an image without drawn boxes; `name` is a safe file name without suffix."""
        for index, (*box, _, label) in enumerate(detections.tolist()):
            class_name = self._folders.name(int(label), safe_name(self.names[int(label)]))
            folder = self.folder / class_name
            with refusals(_REFUSED, folder):
                folder.mkdir(parents=True, exist_ok=True)
            crop_name = self._files.setdefault(class_name, NameBook()).name((name, index), name)
            write_image(folder / f"{crop_name}.jpg", crop_of(image, box))


def crop_of(image: Image, box_xyxy_px: Sequence[float]) -> Image:
    """Return the part of an image (H, W, 3) in a box, with a small margin; a view, never empty."""
    x1, y1, x2, y2 = box_xyxy_px
    rows, columns = (
        slice(*_widened(start, end, side))
        for start, end, side in ((y1, y2, image.shape[0]), (x1, x2, image.shape[1]))
    )
    return image[rows, columns]


def _widened(start: float, end: float, side: int) -> tuple[int, int]:
    """Return the first and the end pixel of a crop along one side of an image, at least one pixel apart."""
    centre, half = (start + end) / 2, abs(end - start) * _CROP_FACTOR / 2 + _CROP_BORDER_PX / 2
    first = min(max(int(centre - half), 0), side - 1)
    return first, min(max(int(centre + half), first), side - 1) + 1


def image_suffix(source: str) -> str:
    """Return the suffix for saving an image: its own, as spelled, if OpenCV can write it, else .jpg."""
    own = Path(file_name(source)).suffix
    return own if own.lower() in _WRITABLE else ".jpg"


def write_image(path: Path, image: Image) -> None:
    """Save an image (H, W, 3) BGR in the format of the suffix.

    Raises UserError if it cannot be written.
    """
    # cv2.imwrite fails silently, and on Windows for names outside of the code page.
    encoded, content = cv2.imencode(path.suffix, image)
    if not encoded:
        what = f"OpenCV cannot write {path.suffix} images"
        raise UserError(what, path, "convert the source to .jpg or .png")
    write_one_of_many(path, content.tobytes())


def write_one_of_many(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises UserError if the system refuses."""
    with refusals(_REFUSED, path), replacement(path, synced=False) as stream:
        stream.write(content)


class VideoWriter:
    """Writes the frames of one video or stream to an .mp4 file of the same size and duration."""

    def __init__(self, path: Path, fps: float, vid_stride: int = 1) -> None:
        self.path, self.fps, self.count = path, max((fps or _DEFAULT_FPS) / vid_stride, 1.0), 0
        self._size_wh: tuple[int, int] | None = None
        self._writer: cv2.VideoWriter | None = None

    def write(self, image: Image) -> None:
        """Append a frame (H, W, 3) BGR, scaled to the size of the first one.

        Raises UserError if the file cannot be created; a full disk is only detected by `close`.
        """
        if self._writer is None or self._size_wh is None:
            self._size_wh = (image.shape[1], image.shape[0])
            if not is_utf8(str(self.path)):
                what = "OpenCV writes no video with a name that is not UTF-8"
                raise UserError(what, self.path, "rename the video")
            with refusals(_REFUSED, self.path):
                if os.path.lexists(self.path) and (self.path.is_symlink() or not self.path.is_file()):
                    self.path.unlink()  # OpenCV would follow a link, and wait for the reader of a pipe
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self.path), codec, self.fps, self._size_wh)
            if not self._writer.isOpened():
                self._writer = None  # nothing to close
                raise UserError("OpenCV cannot write this video", self.path, f"{_CHECK}, or give --nosave")
        if (image.shape[1], image.shape[0]) != self._size_wh:
            image = np.asarray(cv2.resize(image, self._size_wh), np.uint8)
        self._writer.write(image)
        self.count += 1

    def close(self) -> None:
        """Finish the file, which players could not open otherwise. Raises UserError if it is incomplete."""
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        if not _is_video(self.path, self.count):
            raise UserError(f"the video of {counted(self.count, 'frame')} is not whole", self.path, _CHECK)


def _is_video(path: Path, frames: int) -> bool:
    """Return whether a written file can be played and states the number of frames.

    OpenCV does not report failed writes. They leave an .mp4 without the index at its end; reading that and
    the first frame takes milliseconds, however long the video is.
    """
    capture = cv2.VideoCapture(str(path))
    try:
        # For a container without a frame count OpenCV derives one from the duration, or returns 0 or -1.
        stated = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        return capture.grab() and (stated <= 0 or stated >= frames - 1)
    finally:
        capture.release()
