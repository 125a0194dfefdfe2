"""Image decoding, shared by the index, the caches and the loaders."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.config.files import read_regular
from utils.config.options_base import MAX_PIXELS
from utils.datasets.partial import declared_hw, top_of_jpeg

Image = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset(".bmp .dib .jpe .jpeg .jpg .jp2 .mpo .pbm .pgm .png .ppm .tif .tiff .webp".split())
_JPEG_END = b"\xff\xd9"
# Without 0xff, which would start a marker; enough bytes for missing image data to decode visibly.
_JPEG_MORE = bytes(37 * number % 251 for number in range(1, 257))
_REDUCED = (
    (8, cv2.IMREAD_REDUCED_COLOR_8),
    (4, cv2.IMREAD_REDUCED_COLOR_4),
    (2, cv2.IMREAD_REDUCED_COLOR_2),
)
# Decoded in excess: with subsampled colours the last row depends on the one that would follow.
_SPARE_ROWS = 4
_CUT_OFF = "the file is cut off"
_PNG_START, _PNG_END = b"\x89PNG", b"IEND\xaeB`\x82"
MAX_BYTES = 2**31
# Pixels times scans, about ten seconds of decoding. A JPEG may consist of any number of scans of a few
# bytes each; real files have about ten.
MAX_SCANNED = 2**37
_JPEG_SCAN = b"\xff\xda"
_JPEG_PADDING = re.compile(rb"\xff+")
# Before the frame header. A file of MAX_BYTES holds at most half as many of full length.
MAX_SEGMENTS = 2**16
# JPEG's frame header markers (SOF), without DHT, JPG and DAC, which lie in the same range.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset(range(0xD0, 0xD9)) | {0x00, 0x01}  # without a length; 0 is not a marker

# Loader and index parallelise over images. OpenCV's own threads would compete with theirs, and a
# forked worker would deadlock waiting for a thread pool that exists only in its parent.
cv2.setNumThreads(0)
# Errors are reported once, with the file's name; OpenCV would log additional lines without it.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class UnreadableImageError(ValueError):
    """A file that is not a complete image; the message says why."""


def is_image(path: str | Path) -> bool:
    """Return whether a file name has an image suffix."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def decode_image(content: bytes, flags: int = cv2.IMREAD_COLOR) -> Image:
    """Decode a file's bytes to an upright BGR image (H, W, 3) uint8.

    Greyscale, palette, alpha, CMYK and 16-bit images become 8-bit BGR; animations give their first frame.
    The format is detected from the content, not the name. The EXIF orientation is applied, so the size is
    the one that labels refer to.

    Args:
        content: the file.
        flags: OpenCV's, for another depth or for decoding at reduced size.

    Raises:
        UnreadableImageError: if OpenCV cannot decode it, it has more than `MAX_PIXELS`, or it is a JPEG
            that would take minutes.
    """
    if not content:
        raise UnreadableImageError("the file is empty")
    _check_cost(content)
    image = _decoded(content, flags)
    if image is None and _lacks_only_its_end(content):
        image = _decoded(_with_jpeg_end(content), flags)
    if image is None:
        raise UnreadableImageError(_CUT_OFF if _lacks_its_end(content) else "no image that OpenCV can decode")
    return image


def read_image(path: str | Path) -> Image:
    """Read an image file as in `decode_image`; any file name works on any system.

    Raises:
        UnreadableImageError: if the file is missing or is not an image.
    """
    return decode_image(_read(path))


def check_image(path: str | Path) -> tuple[int, int]:
    """Check that an image is complete and return its width and height in pixels, as read by `read_image`.

    Decoders may silently fill the missing part of a truncated JPEG or PNG with grey, so the file's end
    marker is looked for first. A JPEG that lacks only this marker counts as complete.

    Raises:
        UnreadableImageError: if the image is missing, damaged or truncated.
    """
    content = _read(path)
    if _lacks_its_end(content) and not _lacks_only_its_end(content):
        raise UnreadableImageError(_CUT_OFF)
    # Decoding to greyscale takes half the time and fails on the same files.
    height, width = decode_image(content, cv2.IMREAD_GRAYSCALE).shape[:2]
    return width, height


def declared_wh(content: bytes) -> tuple[int, int]:
    """Return the width and height in the header of a PNG, GIF or JPEG, before any rotation.

    (0, 0) if the header is broken, and for other formats, to which OpenCV's own limit applies; scripts set it
    to `MAX_PIXELS`.

    Raises:
        UnreadableImageError: if a JPEG has more than `MAX_SEGMENTS` before its frame header.
    """
    if content.startswith(_PNG_START) and len(content) >= 24:
        width, height = struct.unpack(">II", content[16:24])
    elif content.startswith(b"GIF8") and len(content) >= 10:
        width, height = struct.unpack("<HH", content[6:10])
    elif _is_jpeg(content):
        frame = _jpeg_frame(content)
        height, width = (0, 0) if frame is None else declared_hw(content, frame)
    else:
        width = height = 0
    return int(width), int(height)


def scaled_wh(width: int, height: int, image_size: int) -> tuple[int, int]:
    """Return the width and height in pixels after scaling the longer side to `image_size`."""
    factor = image_size / max(width, height)
    return max(round(width * factor), 1), max(round(height * factor), 1)


def fitting_wh(width: int, height: int, image_size: int, room_hw: tuple[int, int]) -> tuple[int, int]:
    """Return `scaled_wh`, reduced if it would not fit into `room_hw` (height, width)."""
    factor = min(image_size / max(width, height), room_hw[0] / height, room_hw[1] / width)
    return max(round(width * factor), 1), max(round(height * factor), 1)


def all_scaled_wh(sizes_wh: NDArray[np.int64], image_size: int) -> NDArray[np.int64]:
    """Return `scaled_wh` of many sizes (N, 2) at once."""
    factors = image_size / sizes_wh.max(1, initial=1)
    scaled: NDArray[np.int64] = np.maximum(np.rint(sizes_wh * factors[:, None]), 1).astype(np.int64)
    return scaled


def read_for_evaluation(path: str | Path, wh: tuple[int, int]) -> Image:
    """Read an image and scale it to `wh` pixels, with area interpolation when shrinking.

    Raises:
        UnreadableImageError: if the file is missing or is not an image.
    """
    image = decode_image(_read_checked(path))
    shrinks = wh[0] < image.shape[1] or wh[1] < image.shape[0]
    return _resized(image, wh, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def read_for_training(
    path: str | Path, original_wh: tuple[int, int], wh: tuple[int, int], rows: int | None = None
) -> Image:
    """Read an image and scale it from `original_wh` to `wh` pixels, as fast as possible.

    A JPEG at least twice as large as needed is decoded at half, a quarter or an eighth of its size;
    the rest is linear interpolation.

    Args:
        path: the file.
        original_wh: its width and height, pixels.
        wh: width and height after scaling.
        rows: how many are needed, from the top; the image returned may lack some of the others. None: all.

    Raises:
        UnreadableImageError: if the file is missing or is not an image.
    """
    content = _read_checked(path)
    factor, flags = 1, cv2.IMREAD_COLOR
    if _is_jpeg(content):
        surplus = min(original_wh[0] / wh[0], original_wh[1] / wh[1])
        factor, flags = next((pair for pair in _REDUCED if surplus >= pair[0]), (factor, flags))
        top = None if rows is None else _read_top(content, original_wh, wh, rows, (factor, flags))
        if top is not None:
            return top
    return _resized(decode_image(content, flags), wh, cv2.INTER_LINEAR)


def _read_top(
    content: bytes,
    original_wh: tuple[int, int],
    wh: tuple[int, int],
    rows: int,
    reduced: tuple[int, int],
) -> Image | None:
    """Decode a JPEG's first rows, at least `rows` after scaling, None if that is impossible or saves little.

    The first `rows` equal those of the whole image. It ends where a whole number of decoded rows becomes a
    whole number of scaled ones.

    Args:
        content: the file.
        original_wh: as in `read_for_training`, like `wh` and `rows`.
        wh: width and height after scaling.
        rows: how many are needed.
        reduced: the factor by which it is decoded smaller, and OpenCV's flag for that.
    """
    factor, flags = reduced
    height = -(-original_wh[1] // factor)
    step = wh[1] // math.gcd(height, wh[1])
    # The interpolation of a row reaches into the next decoded one.
    scaled = -(-(rows + math.ceil(wh[1] / height)) // step) * step
    kept = scaled * height // wh[1]
    declared = (kept + _SPARE_ROWS) * factor
    if scaled >= wh[1] or declared >= original_wh[1]:
        return None
    frame = _jpeg_frame(content)
    if frame is None or declared_hw(content, frame) != original_wh[::-1]:
        return None
    top = top_of_jpeg(content, frame, declared)
    image = None if top is None else _decoded(top, flags)
    if image is None or image.shape[:2] != (kept + _SPARE_ROWS, -(-original_wh[0] // factor)):
        return None
    return _resized(image[:kept], (wh[0], scaled), cv2.INTER_LINEAR)


def _jpeg_frame(content: bytes) -> int | None:
    """Return the place of the first frame header's marker code, None if there is none.

    Segments are a marker, a length and that many bytes. Skips padding and stray bytes between segments,
    as decoders do: otherwise a few of them would hide the header.
    """
    place = 2
    for _ in range(MAX_SEGMENTS):
        start = content.find(b"\xff", place)
        padding = _JPEG_PADDING.match(content, start) if start >= 0 else None
        if padding is None or padding.end() + 8 > len(content):
            return None
        place = padding.end()
        marker = content[place]
        if marker in _JPEG_FRAMES:
            return place
        place += 1
        if marker not in _JPEG_BARE:
            place += int.from_bytes(content[place : place + 2], "big")
    raise UnreadableImageError(f"more than {MAX_SEGMENTS:,} segments stand before the image")


def _read(path: str | Path) -> bytes:
    # cv2.imread cannot open names outside of the code page on Windows.
    try:
        return read_regular(path, MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UnreadableImageError(getattr(error, "strerror", None) or str(error)) from error


def _read_checked(path: str | Path) -> bytes:
    """Return the bytes of an image that passed `check_image`.

    A JPEG without an end marker is checked again, as it may have been truncated since.
    """
    content = _read(path)
    if not _is_jpeg(content) or _has_end(content, _JPEG_END):
        return content
    if not _lacks_only_its_end(content):
        raise UnreadableImageError(_CUT_OFF)
    return _with_jpeg_end(content)


def _check_cost(content: bytes) -> None:
    """Raise UnreadableImageError for a file that would take too much memory or time to decode."""
    width, height = declared_wh(content)
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"{width} x {height} px are more than {MAX_PIXELS:,} pixels")
    # Counting takes a while; there cannot be more scans than pairs of bytes.
    if _is_jpeg(content) and width * height * (len(content) // 2) > MAX_SCANNED:
        scans = content.count(_JPEG_SCAN)
        if width * height * scans > MAX_SCANNED:
            raise UnreadableImageError(f"{scans} scans would take minutes to decode")


def _decoded(content: bytes, flags: int) -> Image | None:
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as error:
        raise UnreadableImageError(f"cannot be decoded ({error.err or error})") from error
    return None if image is None or 0 in image.shape else np.asarray(image, np.uint8)


def _lacks_its_end(content: bytes) -> bool:
    """Return whether a JPEG or PNG has no end marker."""
    is_cut_png = content.startswith(_PNG_START) and not _has_end(content, _PNG_END)
    return is_cut_png or (_is_jpeg(content) and not _has_end(content, _JPEG_END))


def _lacks_only_its_end(content: bytes) -> bool:
    """Return whether a JPEG without an end marker has all of its image data.

    A decoder that has everything ignores appended bytes; otherwise they become part of the image.
    """
    if not _is_jpeg(content):
        return False
    _check_cost(content)
    # In colour: the last scans may contain nothing but chroma.
    plain = _decoded(_with_jpeg_end(content), cv2.IMREAD_COLOR)
    longer = _decoded(_with_jpeg_end(content, _JPEG_MORE), cv2.IMREAD_COLOR)
    return plain is not None and longer is not None and np.array_equal(plain, longer)


def _with_jpeg_end(content: bytes, more: bytes = b"") -> bytes:
    return content.rstrip(b"\xff") + more + _JPEG_END


def _has_end(content: bytes, mark: bytes) -> bool:
    # Cameras append bytes after the end, hence "anywhere in the second half".
    return content.rfind(mark, len(content) // 2) >= 0


def _is_jpeg(content: bytes) -> bool:
    return content.startswith(b"\xff\xd8")


def _resized(image: Image, wh: tuple[int, int], interpolation: int) -> Image:
    if image.shape[1::-1] == wh:
        return image
    return np.asarray(cv2.resize(image, wh, interpolation=interpolation), np.uint8)
