"""Frames, which every image source yields, and the classification of sources by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import unquote, urlsplit

from utils.config.addresses import is_address
from utils.datasets.images import IMAGE_SUFFIXES, Image

VIDEO_SUFFIXES = frozenset(".asf .avi .gif .m4v .mkv .mov .mp4 .mpeg .mpg .ts .webm .wmv".split())
_FILE_SCHEMES = ("http://", "https://")


@dataclass(frozen=True)
class Frame:
    """One image to detect objects in.

    image: (H, W, 3) uint8 BGR. source: the file or address it comes from, without a password.
    number: 0-based index within a video or stream, None for an image. fps: of the video or stream, 0
    if unknown. place: its position, as in "3/17", for the console. live: frames of several sources
    may alternate.
    """

    image: Image
    source: str
    number: int | None = None
    fps: float = 0.0
    place: str = ""
    live: bool = False


class FrameSource(Protocol):
    """An iterable of frames; `skipped` has a sentence for each input that could not be read so far."""

    skipped: list[str]

    @property
    def files(self) -> Sequence[str]:
        """The `source` of all frames to come, if they are read from files; else empty."""
        ...

    def __iter__(self) -> Iterator[Frame]:
        """Yield each frame once, in order."""
        ...


def is_live(source: str) -> bool:
    """Return whether a source is a webcam's number or the address of a stream."""
    if source.isascii() and source.isdigit():
        return True
    return is_address(source) and not is_remote_file(source)


def is_remote_file(source: str) -> bool:
    """Return whether a source is the address of an image or video file, which unlike a stream can wait."""
    return source.lower().startswith(_FILE_SCHEMES) and suffix_of(source) in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def file_name(source: str) -> str:
    """Return the file name of a path or address."""
    if not is_address(source):
        return Path(source).name
    try:
        return PurePosixPath(unquote(urlsplit(source).path)).name
    except ValueError:
        return ""


def suffix_of(source: str) -> str:
    """Return the suffix of the file name of a path or address, in lower case."""
    return Path(file_name(source)).suffix.lower()


def is_utf8(path: str) -> bool:
    """Return whether a file name is valid UTF-8; others make OpenCV's videos and windows end the process."""
    return path.encode("utf-8", "replace") == path.encode("utf-8", "surrogatepass")
