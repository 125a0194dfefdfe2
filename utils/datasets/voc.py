"""Parsing of annotations in PASCAL VOC layout (`Annotations`, `ImageSets`, `JPEGImages`)."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

_MAX_BYTES = 16 << 20
_MAX_ELEMENTS = 200_000  # an element takes a hundred times the memory of its text


class AnnotationError(ValueError):
    """An invalid annotation file: what is wrong with it, and in which line."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(line, what)
        self.line, self.what = line, what


@dataclass(frozen=True)
class VocAnnotation:
    """The boxes of one image.

    boxes: (n, 5) float64: class id, then x1, y1, x2, y2 in pixels, continuous coordinates with
        0 at the left and upper edge.
    size_wh: the image's width and height as annotated, (0, 0) if the file does not give them.
    """

    boxes: NDArray[np.float64]
    size_wh: tuple[int, int]


def parse_voc(content: bytes, class_ids: dict[str, int]) -> VocAnnotation:
    """Parse the objects of an annotation file, leaving out those marked `difficult`.

    VOC counts pixels from 1 and includes both ends of a box: pixels 1 to 10 cover the continuous
    interval from 0 to 10.

    Raises:
        AnnotationError: if the file is broken, a class name is unknown, or a box is not numeric or
            ends before it starts.

    Source: Everingham et al., The PASCAL Visual Object Classes (VOC) Challenge, IJCV 2010.
    """
    root = _parse_without_entities(content)
    size = (_number(root, "size/width", 0.0), _number(root, "size/height", 0.0))
    rows = []
    for entry in root.findall("object"):
        name = (entry.findtext("name") or "").strip()
        if name not in class_ids:
            raise AnnotationError(_line(entry), f"class '{name}' is not among the dataset's names")
        if (entry.findtext("difficult") or "0").strip() == "1":
            continue
        x1, y1, x2, y2 = (_number(entry, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
        if x2 < x1 or y2 < y1:
            raise AnnotationError(_line(entry), f"box {x1:g} {y1:g} {x2:g} {y2:g} ends before it starts")
        rows.append([class_ids[name], x1 - 1, y1 - 1, x2, y2])
    return VocAnnotation(np.array(rows, np.float64).reshape(-1, 5), (int(size[0]), int(size[1])))


def object_names(content: bytes) -> set[str]:
    """Return the class names of all objects in an annotation file, including those marked `difficult`.

    Raises:
        AnnotationError: if the file is broken.
    """
    objects = _parse_without_entities(content).findall("object")
    return {(entry.findtext("name") or "").strip() for entry in objects}


def _parse_without_entities(content: bytes) -> ElementTree.Element:
    """Parse XML to an element tree in which every element has its line number in the attribute `line`.

    A document type may define entities that expand to gigabytes or read other files. Annotations do
    not need one, so it is rejected at its start.
    """
    if len(content) > _MAX_BYTES:
        raise AnnotationError(1, f"more than {_MAX_BYTES >> 20} MiB, too much for an annotation")
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    count = 0

    def refuse(*_: object) -> None:
        raise AnnotationError(parser.CurrentLineNumber, "a document type (DTD) is not accepted")

    def start(tag: str, _attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if count > _MAX_ELEMENTS:
            what = f"more than {_MAX_ELEMENTS:,} elements, too many for an annotation"
            raise AnnotationError(parser.CurrentLineNumber, what)
        builder.start(tag, {"line": str(parser.CurrentLineNumber)})

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise AnnotationError(error.lineno, f"no valid XML ({expat.ErrorString(error.code)})") from error
    except AnnotationError:
        raise
    except (LookupError, ValueError) as error:
        raise AnnotationError(1, f"its encoding is not known ({error}), save it as UTF-8") from error
    return builder.close()


def _line(element: ElementTree.Element) -> int:
    return int(element.get("line", 0))


def _number(element: ElementTree.Element, path: str, default: float | None = None) -> float:
    text = element.findtext(path)
    if text is None and default is not None:
        return default
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise AnnotationError(_line(element), f"'{path}' is '{text}' and not a number")
    return value
