"""The inputs of detection: files, folders, globs, videos, streams, webcams and lists of them."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np

from models.config import FOLDER
from utils.config.addresses import is_address, without_password
from utils.config.files import read_regular
from utils.config.suggestions import near_files, question
from utils.datasets.images import IMAGE_SUFFIXES, UnreadableImageError, decode_image, read_image
from utils.errors import UserError
from utils.inference.frames import (
    VIDEO_SUFFIXES,
    Frame,
    FrameSource,
    is_live,
    is_remote_file,
    is_utf8,
    suffix_of,
)
from utils.inference.remote import fetch, fetch_video
from utils.inference.streams import StreamSource

LIST_SUFFIXES = (".txt", ".streams")
SHIPPED_IMAGES = Path("data/images")
_PAGES = ("youtube.com", "m.youtube.com", "youtu.be")
_MAX_LIST_BYTES = 256 << 20
_TOLERATED = 100  # the frame count of some containers is an estimate: one in so many may be missing


@dataclass(frozen=True)
class Unreadable:
    """A file that cannot be read, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class PendingFrame:
    """A frame to load: an image still to be read, a frame already read, or the reason why it cannot be read.

    path: of the file. place: as in `Frame`, of an image. found: None if the image is still to be read.
    """

    path: str
    place: str = ""
    found: Frame | Unreadable | None = None

    @property
    def size(self) -> int:
        """The bytes held in memory."""
        return self.found.image.nbytes if isinstance(self.found, Frame) else 0

    def load(self) -> Frame | Unreadable:
        """Return the frame, reading the image if necessary."""
        return read_picture(self.path, self.place) if self.found is None else self.found


@dataclass
class FileSource:
    """Frames of image and video files; unreadable ones are skipped, reported to `warn` and recorded."""

    paths: Sequence[str]
    vid_stride: int = 1
    warn: Callable[[str], None] = print
    skipped: list[str] = field(default_factory=list)

    @property
    def files(self) -> Sequence[str]:
        """The `source` of its frames."""
        return [without_password(path) for path in self.paths]

    def __iter__(self) -> Iterator[Frame]:
        """Yield the images, and every `vid_stride`-th frame of the videos, in the order of the files."""
        for piece in self.pieces():
            found = piece.load()
            if isinstance(found, Frame):
                yield found
            else:
                self.skip(found)

    def pieces(self) -> Iterator[PendingFrame]:
        """Yield the same frames unloaded, so that several threads can read the images."""
        for index, path in enumerate(self.paths, start=1):
            place = f"{index}/{len(self.paths)}"
            if suffix_of(path) in IMAGE_SUFFIXES:
                yield PendingFrame(path, place)
                continue
            try:
                for frame in self._video(path, place):
                    yield PendingFrame(path, found=frame)
            except UnreadableImageError as error:
                yield PendingFrame(path, found=Unreadable(path, str(error)))

    def skip(self, lost: Unreadable) -> None:
        """Report and record a file that could not be read."""
        told = f"{without_password(lost.path)}: {lost.reason}"
        self.skipped.append(told)
        self.warn(f"skipped {told}")

    def _video(self, path: str, place: str) -> Iterator[Frame]:
        if not is_utf8(path):
            raise UnreadableImageError("OpenCV opens no video with a name that is not UTF-8")
        with ExitStack() as stack:
            capture = cv2.VideoCapture(path)
            if not capture.isOpened() and is_address(path):
                # Its index may be at the end, and not every server supports reading that first.
                self.warn(f"{without_password(path)} cannot be played from there: it is fetched first")
                try:
                    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="video-"))
                except OSError as error:
                    raise UnreadableImageError(f"no folder to keep it in ({error.strerror})") from error
                whole = Path(folder) / f"video{suffix_of(path)}"
                fetch_video(path, whole)
                capture = cv2.VideoCapture(str(whole))
            yield from self._frames(capture, without_password(path), place)

    def _frames(self, capture: cv2.VideoCapture, source: str, place: str) -> Iterator[Frame]:
        try:
            fps, total = capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
            number, shown = 0, f" of {total}" if total > 0 else ""
            while capture.grab():
                if number % self.vid_stride == 0:
                    read, image = capture.retrieve()
                    if not read:
                        break
                    where = f"{place} frame {number + 1}{shown}"
                    yield Frame(np.asarray(image, np.uint8), source, number, fps, where)
                number += 1
        finally:
            capture.release()
        if number == 0:
            raise UnreadableImageError("no video that OpenCV can read")
        if number < total - total // _TOLERATED:
            self.warn(f"{source}: ended after {number} of {total} frames, the file may be cut off")


def read_picture(path: str, place: str) -> Frame | Unreadable:
    """Read an image file, or fetch one from its address; `place` as in `Frame`."""
    try:
        image = decode_image(fetch(path)) if is_address(path) else read_image(path)
    except UnreadableImageError as error:
        return Unreadable(path, str(error))
    return Frame(image, without_password(path), place=place)


def resolve_default_source(source: str) -> str:
    """Return the source, or the images shipped with the project if it is the default and missing here."""
    if Path(source) == SHIPPED_IMAGES and not os.path.exists(source):
        return str(FOLDER.parent / SHIPPED_IMAGES)
    return source


def open_source(source: str, vid_stride: int = 1, warn: Callable[[str], None] = print) -> FrameSource:
    """Return the frames of a file, folder, glob, video, stream, webcam, or a list of these.

    source: a path; a pattern with * ? [ ] (** for all subfolders); an address (rtsp://, http://, ...) of a
    stream or file; the number of a webcam; a .txt or .streams file with one of these per line.

    Raises UserError if there is nothing to read.
    """
    _check_address(source)
    if is_live(source):
        return StreamSource([source], vid_stride, warn)
    if source.lower().endswith(LIST_SUFFIXES):
        return _listed(Path(os.path.expanduser(source)), vid_stride, warn)
    return FileSource(_files(source), vid_stride, warn)


def _check_address(source: str) -> None:
    if is_address(source):
        try:
            _ = urlsplit(source).port
        except ValueError as error:
            raise UserError(
                f"is not an address ({error})", without_password(source), "check --source"
            ) from error
        if (urlsplit(source).hostname or "").removeprefix("www.") in _PAGES:
            fix = "fetch the video with a program made for that, and give the file"
            raise UserError("is the address of a page and no video's", source, fix)


def _listed(path: Path, vid_stride: int, warn: Callable[[str], None]) -> FrameSource:
    """Return the frames of a list's sources. If any is live, all are read as streams and may drop frames."""
    try:
        text = read_regular(path, _MAX_LIST_BYTES).decode("utf-8-sig")
        lines = [line.strip() for line in text.splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        fix = question(near_files(path), "check --source")
        raise UserError("cannot be read as a list of sources", path, fix) from error
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise UserError("the list of sources is empty", path, "write one file or address a line")
    for entry in entries:
        _check_address(entry)
    if any(is_live(entry) for entry in entries):
        return StreamSource(entries, vid_stride, warn)
    files = [file for entry in entries for file in _files(_from_list(entry, path))]
    return FileSource(list(dict.fromkeys(files)), vid_stride, warn)  # what is listed twice is read once


def _from_list(entry: str, listing: Path) -> str:
    """Resolve a line of a list: an address, or a path or pattern in the working or else the list's folder."""
    if is_address(entry) or _names_something(entry):
        return entry
    beside = str(listing.parent / entry)
    if _names_something(beside):
        return beside
    pattern = os.path.join(glob.escape(str(listing.parent)), entry)
    if _names_something(pattern):
        return pattern
    raise UserError("no such file or folder", entry, f"it stands in {listing}")


def _names_something(source: str) -> bool:
    path = os.path.expanduser(source)
    return os.path.exists(path) or any(glob.iglob(path, recursive=True))


def _files(source: str) -> list[str]:
    """Return the image and video files of a path, a pattern or an address, sorted."""
    if is_remote_file(source):
        return [source]
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        if not _is_readable(path):
            raise UserError("neither an image nor a video", source, f"known are {_known_suffixes()}")
        return [path]
    if os.path.isdir(path):
        found = _within(path)
        if not found:
            raise UserError("no image or video in this folder", source, f"known are {_known_suffixes()}")
        return found
    if glob.has_magic(source):
        matches = glob.glob(path, recursive=True)  # hidden files only if the pattern has the dot
        found = [match for match in _once(matches) if os.path.isfile(match) and _is_readable(match)]
        if found:
            return found
        raise UserError("no image or video matches this pattern", source, "check --source")
    if source.split()[:1] == ["screen"]:
        fix = "record it, and give the video; a webcam is --source 0"
        raise UserError("the screen is no source here", f"--source {source}", fix)
    if os.path.exists(path):  # a device, a pipe
        raise UserError("neither a file nor a folder", source, "a camera is named by its number: --source 0")
    raise UserError("no such file or folder", source, question(near_files(path), "check --source"))


def _once(paths: Sequence[str]) -> list[str]:
    """Return sorted paths without those that reach another's place by a longer way, through links.

    The pattern `**` follows links to a parent folder too, forty times.
    """
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
    places = dict[tuple[str, str], str]()
    for path in sorted(paths, key=lambda path: path.count(os.sep)):
        folder, name = os.path.split(path)
        places.setdefault((folders[folder], name), path)
    return sorted(places.values())


def _within(folder: str) -> list[str]:
    """Return the images and videos in a folder, without hidden ones."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", folder, "check --source") from error
    files = (os.path.join(folder, name) for name in names)
    return [file for file in files if os.path.isfile(file) and _is_readable(file)]


def _is_readable(path: str) -> bool:
    return suffix_of(path) in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def _known_suffixes() -> str:
    return " ".join(sorted(suffix.lstrip(".") for suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES))
