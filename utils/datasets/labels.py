"""Parsing of YOLO label lines, and the corrections shared by all layouts."""

from __future__ import annotations

import codecs
import math
import re

import numpy as np
from numpy.typing import NDArray

from utils.words import counted, were

Labels = NDArray[np.float32]

_BOX_NUMBERS = 4
_POLYGON_NUMBERS = 6
_MIN_COORDINATE, _MAX_COORDINATE = -1.0, 2.0
# Exports round to 3 to 6 digits; boxes that exceed the image by less than this are not reported.
_ROUNDING = 2e-3
_MAX_WRONG = 1000  # lines of a file that are listed: a message takes a hundred times the memory of its line
# Line endings as editors count them. str.splitlines knows eight more, among them form feed and U+2028.
_LINE_END = re.compile(r"\r\n|\r|\n")


class LabelLineError(ValueError):
    """An invalid line of a label file; the message says why."""


def lines_of(text: str) -> list[str]:
    """Split a text into lines as editors number them."""
    return _LINE_END.split(text)


def parse_yolo(content: bytes, nc: int) -> tuple[NDArray[np.float64], list[tuple[int, str]]]:
    """Return the boxes of a label file, and its invalid lines as (1-based line number, reason) pairs.

    Boxes are (n, 5): class id, then x1, y1, x2, y2, normalised. A line is `class cx cy w h`, or a
    class and a polygon (`class x1 y1 x2 y2 x3 y3 ...`), which becomes its bounding box. The encoding is
    UTF-8, or UTF-16 with a byte order mark, with any line endings. Of more than `_MAX_WRONG` invalid lines
    the first are returned, and one that says so.
    """
    rows: list[list[float]] = []
    wrong: list[tuple[int, str]] = []
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace")
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        try:
            rows.append(_parse_line(line, nc))
        except LabelLineError as error:
            if len(wrong) == _MAX_WRONG:
                wrong.append((number, f"after {_MAX_WRONG:,} wrong lines, further ones are not listed"))
                break
            wrong.append((number, str(error)))
    return np.array(rows, np.float64).reshape(-1, 5), wrong


def _parse_line(line: str, nc: int) -> list[float]:
    """Return class id, x1, y1, x2, y2."""
    try:
        # float() accepts underscores as digit separators. A form feed or the like between numbers may be
        # meant as a line ending, which would turn two boxes into a polygon.
        if "_" in line or len(line.strip().splitlines()) > 1:
            raise ValueError(line)
        class_id, *coordinates = (float(word) for word in line.split())
    except ValueError as error:
        raise LabelLineError(f"'{line.strip()[:60]}' is not a row of numbers") from error
    _check_line(class_id, coordinates, nc)
    if len(coordinates) == _BOX_NUMBERS:
        cx, cy, width, height = coordinates
        return [class_id, cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
    xs, ys = coordinates[::2], coordinates[1::2]
    return [class_id, min(xs), min(ys), max(xs), max(ys)]


def _check_line(class_id: float, coordinates: list[float], nc: int) -> None:
    count = len(coordinates)
    if count != _BOX_NUMBERS and (count < _POLYGON_NUMBERS or count % 2):
        confidence = "; a sixth is the confidence of --save-conf" if count == _BOX_NUMBERS + 1 else ""
        raise LabelLineError(f"{count + 1} numbers where 'class cx cy w h' has 5{confidence}")
    if not all(map(math.isfinite, (class_id, *coordinates))):
        raise LabelLineError("a number is not finite")
    if class_id != int(class_id) or not 0 <= class_id < nc:
        raise LabelLineError(f"class {class_id:g} is not one of 0..{nc - 1}")
    if min(coordinates) < _MIN_COORDINATE or max(coordinates) > _MAX_COORDINATE:
        raise LabelLineError("coordinates must be fractions (0..1) of the image's size")
    if count == _BOX_NUMBERS and min(coordinates[2:]) < 0:
        raise LabelLineError(f"negative size {coordinates[2]:g} x {coordinates[3]:g}")


def correct_boxes(boxes: NDArray[np.float64]) -> tuple[Labels, list[str]]:
    """Convert boxes (m, 5) class, x1, y1, x2, y2 to labels (n, 5) float32 class, cx, cy, w, h.

    All normalised. Clips boxes to the image and drops empty boxes and duplicates. The second value
    describes the corrections in words.
    """
    corners = boxes[:, 1:].clip(0, 1)
    size = corners[:, 2:] - corners[:, :2]
    solid, had_area = (size > 0).all(1), (boxes[:, 3:] > boxes[:, 1:3]).all(1)
    moved = (np.abs(corners - boxes[:, 1:]) > _ROUNDING).any(1)
    notes = [
        f"{counted(number, 'box')} {what.format(were(number))}"
        for number, what in (
            (int((moved & solid).sum()), "reached out of the image and {} clipped"),
            (int((~solid & had_area).sum()), "lay outside of the image and {} left out"),
            (int((~solid & ~had_area).sum()), "{} empty and left out"),
        )
        if number
    ]
    centre = (corners[:, :2] + corners[:, 2:]) / 2
    labels = np.concatenate([boxes[:, :1], centre, size], 1)[solid].astype(np.float32)
    distinct = dict.fromkeys(map(tuple, labels.tolist()))  # NumPy's `unique` takes far longer for a few rows
    if len(distinct) < len(labels):
        notes.append(f"{counted(len(labels) - len(distinct), 'label')} repeated and left out")
        labels = np.array(list(distinct), np.float32)
    return labels, notes
