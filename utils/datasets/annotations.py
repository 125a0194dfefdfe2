"""Reading, parsing and normalising the label file of one image, in any layout.

Shapes: n labels of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.config.dataset import Layout
from utils.config.files import read_regular
from utils.datasets.labels import Labels, correct_boxes, parse_yolo
from utils.datasets.sources import Source
from utils.datasets.voc import AnnotationError, parse_voc
from utils.errors import UserError

_MAX_LABEL_BYTES = 64 << 20
_ID_LIMIT = 1 << 24  # up to here float32, the type of labels, tells all whole numbers apart


@dataclass(frozen=True)
class Annotation:
    """Boxes (n, 5) class, x1, y1, x2, y2: in pixels of `size_wh`, or normalised if that is None.

    is_missing: whether there is no label file.
    """

    boxes: NDArray[np.float64]
    size_wh: tuple[int, int] | None = None
    is_missing: bool = False


NOTHING = Annotation(np.zeros((0, 5)))


def label_bytes(source: Source) -> bytes | None:
    """Return the content of an image's label file, None if there is none.

    Raises:
        UserError: if it exists but cannot be read.
    """
    try:
        return read_regular(source.label, _MAX_LABEL_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot be read as a label file ({reason})", source.label, "fix it, or the list of images"
        ) from error


def class_limit(layout: Layout, names: Sequence[str], single_cls: bool) -> int:
    """Return the number that class ids in labels are below.

    single_cls: the classes will be merged, so class ids of layout `yolo` need not have names.
    """
    return _ID_LIMIT if single_cls and layout == "yolo" else len(names)


def parse_annotation(
    content: bytes, layout: Layout, names: Sequence[str], single_cls: bool = False
) -> tuple[Annotation, list[tuple[int, str]]]:
    """Return the annotation in a label file, and its invalid lines as (1-based line number, reason) pairs.

    single_cls: the classes will be merged, so class ids need not have names. In layout `voc`, where the
    names identify the classes, they still do.
    """
    if layout == "yolo":
        boxes, wrong = parse_yolo(content, class_limit(layout, names, single_cls))
        return Annotation(boxes), wrong
    try:
        parsed = parse_voc(content, {name: number for number, name in enumerate(names)})
    except AnnotationError as error:
        return NOTHING, [(error.line, error.what)]
    return Annotation(parsed.boxes, parsed.size_wh), []


def normalised(annotation: Annotation, size_wh: tuple[int, int]) -> tuple[Labels, list[str]]:
    """Return the labels (n, 5) of an image of that size in pixels, and descriptions of the corrections."""
    boxes, notes = annotation.boxes, []
    if annotation.size_wh is not None:
        # Coordinates refer to the size given in the annotation, if it has one.
        annotated = annotation.size_wh if min(annotation.size_wh) > 0 else size_wh
        if annotated != size_wh:
            notes.append(
                f"annotated at {annotated[0]} x {annotated[1]} px but the image has "
                f"{size_wh[0]} x {size_wh[1]} px: boxes scaled, look at them"
            )
        boxes = np.concatenate([boxes[:, :1], boxes[:, 1:] / (annotated * 2)], 1)
    labels, corrections = correct_boxes(boxes)
    return labels, notes + corrections
