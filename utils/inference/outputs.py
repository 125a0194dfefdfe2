"""The output files of one detection run, as its options request."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor

from utils.datasets.images import Image
from utils.errors import UserError
from utils.inference.frames import VIDEO_SUFFIXES, Frame, file_name, is_remote_file, suffix_of
from utils.inference.writers import (
    CropWriter,
    LabelWriter,
    NameBook,
    TableWriter,
    VideoWriter,
    image_suffix,
    safe_name,
    write_image,
)

LABELS = "labels"  # the folder for label files


@dataclass(frozen=True, kw_only=True)
class OutputChoice:
    """What to write. vid_stride: of reading the videos, to keep the duration of those written."""

    images: bool = True
    labels: bool = False
    confidences: bool = False
    crops: bool = False
    table: bool = False
    vid_stride: int = 1


class Outputs:
    """Writes frames and their detections into a folder; use it in a `with` block."""

    def __init__(
        self, folder: Path, names: Sequence[str], choice: OutputChoice, files: Sequence[str] = ()
    ) -> None:
        """`files`: the sources to come, whose names must not be taken by a numbered file.

        Raises UserError if one of them lies in the folder, where it or its labels could be overwritten.
        """
        _check_outside(folder, files)
        self.folder, self.choice = folder, choice
        self.labels = LabelWriter(folder / LABELS, choice.confidences) if choice.labels else None
        self.crops = CropWriter(folder / "crops", names) if choice.crops else None
        self.table = TableWriter(folder / "predictions.csv", names) if choice.table else None
        self._stems, self._files = NameBook(), NameBook()
        for source in files:
            is_video = suffix_of(source) in VIDEO_SUFFIXES
            self._stems.expect(_stem(source), series=is_video)
            self._files.expect(_stem(source) + (".mp4" if is_video else image_suffix(source)))
        self._videos: dict[str, VideoWriter] = {}

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Close all even if one fails; an earlier exception takes precedence over errors of closing.
        with suppress(UserError) if kind is not None else nullcontext(), ExitStack() as stack:
            if self.table is not None:
                stack.callback(self.table.close)
            for video in self._videos.values():
                stack.callback(video.close)

    def write(self, frame: Frame, detections: Tensor, draw: Callable[[], Image]) -> Callable[[], None] | None:
        """Write one frame: detections (n, 6) in its pixels; `draw` returns it with the boxes drawn.

        For an image, returns a function that draws and saves it, which any thread may call. All other output
        depends on the order of the frames and is written at once.
        """
        path = self.record(frame, detections)
        if self.choice.images and frame.number is not None:
            self._video_for(frame).write(draw())
        return None if path is None else lambda: write_image(path, draw())

    def record(self, frame: Frame, detections: Tensor) -> Path | None:
        """Write all output of a frame but the frame itself; return the path for that if it is an image."""
        stem, file = self._names(frame)
        name = stem if frame.number is None else f"{stem}_{frame.number + 1}"
        if self.labels is not None:
            self.labels.write(name, detections, (frame.image.shape[0], frame.image.shape[1]))
        if self.crops is not None:
            self.crops.write(name, frame.image, detections)
        if self.table is not None:
            self.table.write(file.stem + _name_parts(frame.source)[1], frame.number, detections)
        return file if self.choice.images and frame.number is None else None

    def _names(self, frame: Frame) -> tuple[str, Path]:
        """Return the stem of a source's label files and crops, and the path of its image or video.

        `a.jpg` and `a.png` keep their names, unless there are label files or crops to tell apart.
        """
        series, own = frame.number is not None, _stem(frame.source)
        suffix = ".mp4" if series else image_suffix(frame.source)
        stem = self._stems.name(frame.source, own, series=series)
        if self.choice.labels or self.choice.crops:
            return stem, self.folder / f"{stem}{suffix}"
        return stem, self.folder / self._files.name(frame.source, own, suffix)

    def _video_for(self, frame: Frame) -> VideoWriter:
        if frame.source not in self._videos:
            if not frame.live:
                self._close_videos()  # the previous file has ended
            path = self._names(frame)[1]
            self._videos[frame.source] = VideoWriter(path, frame.fps, self.choice.vid_stride)
        return self._videos[frame.source]

    def _close_videos(self) -> None:
        for video in self._videos.values():
            video.close()


def _check_outside(folder: Path, files: Sequence[str]) -> None:
    own = os.path.realpath(folder)
    for place in sorted({os.path.dirname(file) for file in files if not is_remote_file(file)}):
        if Path(os.path.realpath(place)).is_relative_to(own):
            what = f"the sources in {place or os.curdir} lie in the folder for the results and may be lost"
            raise UserError(what, folder, "give another --project or --name")


def _stem(source: str) -> str:
    return _name_parts(source)[0]


def _name_parts(source: str) -> tuple[str, str]:
    """Return stem and suffix of a file, local or remote; of a stream or camera a safe name, no suffix."""
    if is_remote_file(source):
        name = Path(file_name(source))
        return safe_name(name.stem), name.suffix
    path = Path(source)
    return (path.stem, path.suffix) if path.suffix and os.path.isfile(path) else (safe_name(source), "")
