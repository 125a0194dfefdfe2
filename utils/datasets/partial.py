"""Shortened JPEG files, for images of which only the upper rows are needed.

A decoder reads as many rows as the frame header declares. For the lower images of a mosaic, of which only
the upper part is visible, most of the decoding can thus be left out.

Source: ITU-T T.81 (JPEG), B.1.1 (markers) and B.2.2 (frame header).
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

_SEQUENTIAL = frozenset({0xC0, 0xC1})
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_EXIF = b"Exif\0\0"
# Finding markers may take eight bytes of memory for each byte of a file.
_MAX_BYTES = 1 << 24


def _markers(content: bytes) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the places and codes of all that look like markers, also within segments.

    A hundred bytes of image data have one or two 0xff, which makes searching for a pair of bytes slow.
    """
    values = np.frombuffer(content, np.uint8)
    places = np.flatnonzero(values[:-1] == 0xFF) + 1
    codes = values[places]
    is_marker = codes != 0
    return places[is_marker], codes[is_marker]


def declared_hw(content: bytes, frame: int) -> tuple[int, int]:
    """Return the height and width in a JPEG's frame header.

    Args:
        content: the file.
        frame: place of the header's marker code.
    """
    height, width = struct.unpack_from(">HH", content, frame + 4)
    return height, width


def top_of_jpeg(content: bytes, frame: int, rows: int) -> bytes | None:
    """Return a JPEG of the first rows of another, None if this is not possible.

    It is possible if rows are stored from top to bottom, in one scan, and the image is not rotated. The
    rest of the image data stays, but not the end marker: a decoder that found it behind unread data would
    warn of a corrupt file.

    Args:
        content: the file.
        frame: place of the frame header's marker code.
        rows: fewer than the image has, more than 0.
    """
    if content[frame] not in _SEQUENTIAL or len(content) > _MAX_BYTES:
        return None
    places, codes = _markers(content)
    scans = np.flatnonzero(codes == _START_OF_SCAN)
    # Nothing but the end may follow the scan's start: no other scan, no restart marker within it.
    if len(scans) != 1 or codes[scans[0] + 1 :].tolist() != [_END_OF_IMAGE]:
        return None
    if content.find(_EXIF, 0, int(places[scans[0]])) >= 0:
        return None
    height = frame + 4
    return content[:height] + struct.pack(">H", rows) + content[height + 2 : places[-1] - 1]
