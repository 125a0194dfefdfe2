"""Picture files to arrays: one way of reading for the index, the caches and the loaders."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

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

# Loader and index parallelise over images. OpenCV's own threads would fight with that, and a
# forked worker hangs when it waits for a pool of threads that only its parent has.
cv2.setNumThreads(0)


class UnreadableImageError(ValueError):
    """A file that is no whole picture; the message says why."""


def is_image(path: str | Path) -> bool:
    """Whether a file name has the suffix of a picture."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def decode_image(content: bytes, flags: int = cv2.IMREAD_COLOR) -> Image:
    """A picture (H, W, 3), BGR, uint8, upright, from the bytes of its file.

    Grey, palette, alpha, CMYK and 16-bit pictures become 8-bit BGR; an EXIF orientation is
    applied, so the size here is the one that labels refer to.

    Args:
        content: the file.
        flags: OpenCV's, for another depth or for decoding at a part of the size.

    Raises:
        UnreadableImageError: when OpenCV cannot decode it.
    """
    if not content:
        raise UnreadableImageError("the file is empty")
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


def scaled_wh(width: int, height: int, image_size: int) -> tuple[int, int]:
    """The size in pixels after the longer side is scaled to `image_size`."""
    factor = image_size / max(width, height)
    return max(round(width * factor), 1), max(round(height * factor), 1)


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


def _read(path: str | Path) -> bytes:
    # cv2.imread cannot open names outside of the code page on Windows.
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UnreadableImageError(getattr(error, "strerror", None) or str(error)) from error


def _read_checked(path: str | Path) -> bytes:
    """The bytes of a picture that passed `check_image`, which need no second look."""
    content = _read(path)
    is_cut = _is_jpeg(content) and not _has_end(content, _JPEG_END)
    return _with_jpeg_end(content) if is_cut else content


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
