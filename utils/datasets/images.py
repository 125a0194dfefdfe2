"""Picture files to arrays: one way of reading for the index, the caches and the loaders."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.config.files import read_regular

Image = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset(".bmp .dib .jpe .jpeg .jpg .jp2 .mpo .pbm .pgm .png .ppm .tif .tiff .webp".split())
_JPEG_END = b"\xff\xd9"
# Without 0xff, which would start a marker; enough to fill what is missing with something visible.
_JPEG_MORE = bytes(37 * number % 251 for number in range(1, 257))
_REDUCED = (
    (8, cv2.IMREAD_REDUCED_COLOR_8),
    (4, cv2.IMREAD_REDUCED_COLOR_4),
    (2, cv2.IMREAD_REDUCED_COLOR_2),
)
_PNG_START, _PNG_END = b"\x89PNG", b"IEND\xaeB`\x82"
# 20,000 x 20,000 px pass. A file of a megabyte may claim any size and unfold to it.
MAX_PIXELS = 2**29
MAX_BYTES = 2**31
# A JPEG may go over its picture in any number of scans, of a few bytes each: pixels times scans, which
# is ten seconds. Real ones have ten scans.
MAX_SCANNED = 2**37
_JPEG_SCAN = b"\xff\xda"
_JPEG_PADDING = re.compile(rb"\xff+")
# Before the picture. MAX_BYTES hold half as many of full length.
MAX_SEGMENTS = 2**16
# The frame headers of JPEG, those of DHT, JPG and DAC left out.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset(range(0xD0, 0xD9)) | {0x00, 0x01}  # without a length; 0 is no marker at all

# Loader and index parallelise over images. OpenCV's own threads would fight with that, and a
# forked worker hangs when it waits for a pool of threads that only its parent has.
cv2.setNumThreads(0)
# What is wrong with a file is said once, by its name; OpenCV would add lines without one.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class UnreadableImageError(ValueError):
    """A file that is no whole picture; the message says why."""


def is_image(path: str | Path) -> bool:
    """Whether a file name has the suffix of a picture."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def decode_image(content: bytes, flags: int = cv2.IMREAD_COLOR) -> Image:
    """A picture (H, W, 3), BGR, uint8, upright, from the bytes of its file.

    Grey, palette, alpha, CMYK and 16-bit pictures become 8-bit BGR; of an animation it is the first
    frame; what the file is counts, not what its name says. An EXIF orientation is applied, so the
    size here is the one that labels refer to.

    Args:
        content: the file.
        flags: OpenCV's, for another depth or for decoding at a part of the size.

    Raises:
        UnreadableImageError: when OpenCV cannot decode it, it has more than `MAX_PIXELS`, or is a JPEG
            that would take minutes.
    """
    if not content:
        raise UnreadableImageError("the file is empty")
    width, height = declared_wh(content)
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"{width} x {height} px are more than {MAX_PIXELS:,} pixels")
    if _is_jpeg(content) and width * height * content.count(_JPEG_SCAN) > MAX_SCANNED:
        raise UnreadableImageError(f"{content.count(_JPEG_SCAN)} scans would take minutes to decode")
    image = _decoded(content, flags)
    if image is None and _lacks_only_its_end(content):
        image = _decoded(_with_jpeg_end(content), flags)
    if image is None:
        raise UnreadableImageError("no picture that OpenCV can decode")
    return image


def read_image(path: str | Path) -> Image:
    """The picture of a file as in `decode_image`; any file name works on any system.

    Raises:
        UnreadableImageError: when the file is missing or is no picture.
    """
    return decode_image(_read(path))


def check_image(path: str | Path) -> tuple[int, int]:
    """The width and height of a whole picture, in pixels as `read_image` gives it.

    Decoders may fill the missing part of a truncated JPEG or PNG with grey and say nothing, so
    the end mark of the file is looked for first. A JPEG in which nothing but that mark is missing
    counts as whole.

    Raises:
        UnreadableImageError: when the picture is missing, damaged or cut off.
    """
    content = _read(path)
    is_cut_jpeg = _is_jpeg(content) and not _has_end(content, _JPEG_END)
    is_cut_png = content.startswith(_PNG_START) and not _has_end(content, _PNG_END)
    if is_cut_png or (is_cut_jpeg and not _lacks_only_its_end(content)):
        raise UnreadableImageError("the file is cut off")
    # Without colour it takes half the time, and fails on the same files.
    height, width = decode_image(content, cv2.IMREAD_GRAYSCALE).shape[:2]
    return width, height


def declared_wh(content: bytes) -> tuple[int, int]:
    """Width and height in pixels as the head of a PNG, GIF or JPEG says, before any turning.

    (0, 0) where the head is broken and for other formats, for which OpenCV's own limit holds.

    Raises:
        UnreadableImageError: a JPEG has more than `MAX_SEGMENTS` before its picture.
    """
    if content.startswith(_PNG_START) and len(content) >= 24:
        width, height = struct.unpack(">II", content[16:24])
    elif content.startswith(b"GIF8") and len(content) >= 10:
        width, height = struct.unpack("<HH", content[6:10])
    elif _is_jpeg(content):
        width, height = _jpeg_wh(content)
    else:
        width = height = 0
    return int(width), int(height)


def scaled_wh(width: int, height: int, image_size: int) -> tuple[int, int]:
    """The size in pixels after the longer side is scaled to `image_size`."""
    factor = image_size / max(width, height)
    return max(round(width * factor), 1), max(round(height * factor), 1)


def fitting_wh(width: int, height: int, image_size: int, room_hw: tuple[int, int]) -> tuple[int, int]:
    """As `scaled_wh`, smaller where that would not fit into (height, width)."""
    factor = min(image_size / max(width, height), room_hw[0] / height, room_hw[1] / width)
    return max(round(width * factor), 1), max(round(height * factor), 1)


def all_scaled_wh(sizes_wh: NDArray[np.int64], image_size: int) -> NDArray[np.int64]:
    """`scaled_wh` of many sizes (N, 2) at once."""
    factors = image_size / sizes_wh.max(1, initial=1)
    scaled: NDArray[np.int64] = np.maximum(np.rint(sizes_wh * factors[:, None]), 1).astype(np.int64)
    return scaled


def read_for_evaluation(path: str | Path, wh: tuple[int, int]) -> Image:
    """The picture of a file, scaled to `wh` pixels; shrinking averages over areas.

    Raises:
        UnreadableImageError: when the file is missing or is no picture.
    """
    image = decode_image(_read_checked(path))
    shrinks = wh[0] < image.shape[1] or wh[1] < image.shape[0]
    return _resized(image, wh, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def read_for_training(path: str | Path, original_wh: tuple[int, int], wh: tuple[int, int]) -> Image:
    """The picture of a file, scaled from `original_wh` to `wh` pixels, as fast as it goes.

    A JPEG that is more than twice as large as needed is decoded at half, a quarter or an eighth
    of its size, the rest is linear interpolation.

    Raises:
        UnreadableImageError: when the file is missing or is no picture.
    """
    content = _read_checked(path)
    flags = cv2.IMREAD_COLOR
    if _is_jpeg(content):
        surplus = min(original_wh[0] / wh[0], original_wh[1] / wh[1])
        flags = next((flag for factor, flag in _REDUCED if surplus >= factor), flags)
    return _resized(decode_image(content, flags), wh, cv2.INTER_LINEAR)


def _jpeg_wh(content: bytes) -> tuple[int, int]:
    """The size in the first frame header: segments are a marker, a length and that many bytes.

    Passes over padding and over stray bytes between segments, as decoders do: else a few of them would hide
    the size.
    """
    place = 2
    for _ in range(MAX_SEGMENTS):
        start = content.find(b"\xff", place)
        padding = _JPEG_PADDING.match(content, start) if start >= 0 else None
        if padding is None or padding.end() + 8 > len(content):
            return 0, 0
        place = padding.end()
        marker = content[place]
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack(">HH", content[place + 4 : place + 8])
            return width, height
        place += 1
        if marker not in _JPEG_BARE:
            place += int.from_bytes(content[place : place + 2], "big")
    raise UnreadableImageError(f"more than {MAX_SEGMENTS:,} segments stand before the picture")


def _read(path: str | Path) -> bytes:
    # cv2.imread cannot open names outside of the code page on Windows.
    try:
        return read_regular(path, MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UnreadableImageError(getattr(error, "strerror", None) or str(error)) from error


def _read_checked(path: str | Path) -> bytes:
    """The bytes of a picture that passed `check_image`.

    One without an end mark is looked at again: it may have been cut off since.
    """
    content = _read(path)
    if not _is_jpeg(content) or _has_end(content, _JPEG_END):
        return content
    if not _lacks_only_its_end(content):
        raise UnreadableImageError("the file is cut off")
    return _with_jpeg_end(content)


def _decoded(content: bytes, flags: int) -> Image | None:
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as error:
        raise UnreadableImageError(f"cannot be decoded ({error.err or error})") from error
    return None if image is None or 0 in image.shape else np.asarray(image, np.uint8)


def _lacks_only_its_end(content: bytes) -> bool:
    """Whether a JPEG without an end mark has all of its picture.

    A decoder that has everything passes over what follows; else that becomes a part of the picture.
    """
    if not _is_jpeg(content):
        return False
    # In colour: the last scans may hold nothing else.
    plain = _decoded(_with_jpeg_end(content), cv2.IMREAD_COLOR)
    longer = _decoded(_with_jpeg_end(content, _JPEG_MORE), cv2.IMREAD_COLOR)
    return plain is not None and longer is not None and np.array_equal(plain, longer)


def _with_jpeg_end(content: bytes, more: bytes = b"") -> bytes:
    return content.rstrip(b"\xff") + more + _JPEG_END


def _has_end(content: bytes, mark: bytes) -> bool:
    # Cameras append bytes after the end, hence "anywhere in the second half".
    return mark in content[len(content) // 2 :]


def _is_jpeg(content: bytes) -> bool:
    return content.startswith(b"\xff\xd8")


def _resized(image: Image, wh: tuple[int, int], interpolation: int) -> Image:
    if image.shape[1::-1] == wh:
        return image
    return np.asarray(cv2.resize(image, wh, interpolation=interpolation), np.uint8)
