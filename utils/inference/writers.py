"""What detection leaves behind: images, videos, label files, a table and crops."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from torch import Tensor

from utils.boxes import xyxy_to_cxcywh
from utils.config.files import refusals
from utils.datasets.images import Image
from utils.errors import UserError
from utils.inference.frames import Frame, file_name, is_utf8, suffix_of
from utils.words import counted

# OpenCV reads more kinds of images than it writes.
_WRITABLE = frozenset(".bmp .jpeg .jpg .png .tif .tiff .webp".split())
_RESERVED = frozenset("con prn aux nul".split()) | {f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10)}
_MAX_NAME = 120
_MAX_NAME_BYTES = 200  # file systems take 255; a number and a suffix come on top
_DEFAULT_FPS = 30.0
_CROP_FACTOR, _CROP_BORDER_PX = 1.02, 10
_REFUSED, _CHECK = "cannot be written", "check the space on the disk"


def safe_name(text: str) -> str:
    """A file name made of any text: one path component that every system takes.

    Letters and digits of any script, blanks and -_.,()+ stay; the rest becomes "_".
    """
    kept = "".join(c if c.isalnum() or c in " -_.,()+" else "_" for c in text)
    short = kept[:_MAX_NAME].encode("utf-8")[:_MAX_NAME_BYTES].decode("utf-8", errors="ignore")
    name = short.strip(" .") or "_"
    return f"_{name}" if name.partition(".")[0].lower() in _RESERVED else name


class NameBook:
    """A file name for each key, never the same for two keys."""

    def __init__(self) -> None:
        self._by_key: dict[object, str] = {}
        self._taken: set[str] = set()
        self._expected: set[str] = set()
        self._series: set[str] = set()
        self._numbered: set[str] = set()

    def expect(self, stem: str, series: bool = False) -> None:
        """Keeps a name that will be asked for from being given to another stem with a number."""
        self._expected.add(stem.casefold())
        self._note(stem.casefold(), series)

    def name(self, key: object, stem: str, suffix: str = "", *, series: bool = False) -> str:
        """The key's name: at its first call `stem` and `suffix`, a number between where that is taken.

        series: with `_1`, `_2`, ... behind it the name is not that of another key either.
        """
        if key not in self._by_key:
            name, number = f"{stem}{suffix}", 1
            # Beside a series of that name no `_N` is free.
            joint = "-" if name.casefold() in self._series and not series else "_"
            # Some systems take A.txt and a.txt for one file.
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
        """Remembers a series, or what no series must be called because of this name."""
        if series:
            self._series.add(name)
        elif before := _before_number(name):
            self._numbered.add(before)


def _before_number(name: str) -> str:
    """What stands before `_N` at the end of a name, empty without such an end."""
    before, _, number = name.rpartition("_")
    return before if number.isdecimal() else ""


def label_lines(detections: Tensor, image_hw: tuple[int, int], with_confidence: bool) -> str:
    """Detections (n, 6) in pixels of an image as lines `class cx cy w h [confidence]`, normalised."""
    height, width = image_hw
    size = detections.new_tensor((width, height, width, height))
    boxes = (xyxy_to_cxcywh(detections[:, :4]) / size).tolist()
    lines = []
    for box, (confidence, label) in zip(boxes, detections[:, 4:].tolist(), strict=True):
        values = [*box, confidence] if with_confidence else box
        lines.append(" ".join([str(int(label)), *(f"{value:.6g}" for value in values)]) + "\n")
    return "".join(lines)


class LabelWriter:
    """Writes `FOLDER/NAME.txt` for each image or frame in which something was found.

    Where nothing was found there is no such file, not even one of an earlier run into the same folder.
    """

    def __init__(self, folder: Path, with_confidence: bool) -> None:
        self.folder, self.with_confidence, self.count = folder, with_confidence, 0
        with refusals(_REFUSED, folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, detections: Tensor, image_hw: tuple[int, int]) -> None:
        """Writes one file of detections (n, 6), or removes it; `name` is safe and has no suffix.

        Raises UserError when the system refuses that.
        """
        path = self.folder / f"{name}.txt"
        with refusals(_REFUSED, path):
            if not len(detections):
                path.unlink(missing_ok=True)
                return
            path.write_text(label_lines(detections, image_hw, self.with_confidence), encoding="utf-8")
        self.count += 1


class TableWriter:
    """Writes one CSV line a detection: image, class name, confidence, frame, box in pixels."""

    COLUMNS = ("Image Name", "Prediction", "Confidence", "Frame", "x1", "y1", "x2", "y2")

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, names
        with refusals(_REFUSED, path):
            # A file's name need not be text.
            self._file: IO[str] = path.open("w", newline="", encoding="utf-8", errors="backslashreplace")
            self._rows: Any = csv.writer(self._file)
            self._rows.writerow(self.COLUMNS)

    def write(self, frame: Frame, detections: Tensor) -> None:
        """Adds the detections (n, 6) of a frame."""
        number = "" if frame.number is None else frame.number + 1  # as in the names of label files
        source = file_name(frame.source) or frame.source
        for *box, confidence, label in detections.tolist():
            corners = [f"{value:.1f}" for value in box]
            name = self.names[int(label)]
            with refusals(_REFUSED, self.path):
                self._rows.writerow([source, name, f"{confidence:.4f}", number, *corners])

    def close(self) -> None:
        """Closes the file."""
        with refusals(_REFUSED, self.path):
            self._file.close()


class CropWriter:
    """Saves each detection, with a little around it, as `FOLDER/CLASS/NAME.jpg`."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names
        self._folders = NameBook()
        self._files: dict[str, NameBook] = {}

    def write(self, name: str, image: Image, detections: Tensor) -> None:
        """Saves the crops of an unmarked image; `name` is safe and has no suffix."""
        for index, (*box, _, label) in enumerate(detections.tolist()):
            class_name = self._folders.name(int(label), safe_name(self.names[int(label)]))
            folder = self.folder / class_name
            with refusals(_REFUSED, folder):
                folder.mkdir(parents=True, exist_ok=True)
            crop_name = self._files.setdefault(class_name, NameBook()).name((name, index), name)
            write_image(folder / f"{crop_name}.jpg", _crop(image, box))


def _crop(image: Image, box_xyxy_px: Sequence[float]) -> Image:
    x1, y1, x2, y2 = box_xyxy_px
    half_w = (x2 - x1) * _CROP_FACTOR / 2 + _CROP_BORDER_PX / 2
    half_h = (y2 - y1) * _CROP_FACTOR / 2 + _CROP_BORDER_PX / 2
    centre_x, centre_y = (x1 + x2) / 2, (y1 + y2) / 2
    top, left = max(int(centre_y - half_h), 0), max(int(centre_x - half_w), 0)
    return image[top : int(centre_y + half_h) + 1, left : int(centre_x + half_w) + 1]


def image_suffix(source: str) -> str:
    """The suffix to save an image under: its own where OpenCV can write it, else .jpg."""
    suffix = suffix_of(source)
    return suffix if suffix in _WRITABLE else ".jpg"


def write_image(path: Path, image: Image) -> None:
    """Saves an image (H, W, 3) BGR in the format of the suffix.

    Raises UserError when it cannot be written.
    """
    # cv2.imwrite fails without a word, and on Windows with names outside the code page.
    encoded, content = cv2.imencode(path.suffix, image)
    if not encoded:
        what = f"OpenCV cannot write {path.suffix} images"
        raise UserError(what, path, "convert the source to .jpg or .png")
    with refusals(_REFUSED, path):
        path.write_bytes(content.tobytes())


class VideoWriter:
    """Writes the frames of one video or stream into an .mp4 file of the same size and duration."""

    def __init__(self, path: Path, fps: float, vid_stride: int = 1) -> None:
        self.path, self.fps, self.count = path, max((fps or _DEFAULT_FPS) / vid_stride, 1.0), 0
        self._size_wh: tuple[int, int] | None = None
        self._writer: cv2.VideoWriter | None = None

    def write(self, image: Image) -> None:
        """Adds a frame (H, W, 3) BGR; one of another size is scaled to that of the first.

        Raises UserError when the file cannot be begun; a disk that is full shows at `close`.
        """
        if self._writer is None or self._size_wh is None:
            self._size_wh = (image.shape[1], image.shape[0])
            if not is_utf8(str(self.path)):
                what = "OpenCV writes no video with a name that is not UTF-8"
                raise UserError(what, self.path, "rename the video")
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self.path), codec, self.fps, self._size_wh)
            if not self._writer.isOpened():
                self._writer = None  # there is nothing to end
                raise UserError("OpenCV cannot write this video", self.path, f"{_CHECK}, or give --nosave")
        if (image.shape[1], image.shape[0]) != self._size_wh:
            image = np.asarray(cv2.resize(image, self._size_wh), np.uint8)
        self._writer.write(image)
        self.count += 1

    def close(self) -> None:
        """Ends the file; without it players cannot open it. Raises UserError when it is not whole then."""
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        if not _is_video(self.path, self.count):
            raise UserError(f"the video of {counted(self.count, 'frame')} is not whole", self.path, _CHECK)


def _is_video(path: Path, frames: int) -> bool:
    """Whether a file that was written can be played and states so many frames.

    OpenCV says nothing of a write that fails. An .mp4 has its index at the end, which is missing then; to
    read it and the first frame takes milliseconds, however long the video is.
    """
    capture = cv2.VideoCapture(str(path))
    try:
        # Where a container has no count OpenCV makes one of the duration, or says 0 or -1.
        stated = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        return capture.grab() and (stated <= 0 or stated >= frames - 1)
    finally:
        capture.release()
