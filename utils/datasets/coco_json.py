"""Convert COCO annotations (`instances_*.json`) to label lines of the YOLO layout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from utils.config.files import read_regular
from utils.errors import UserError
from utils.words import counted

Polygon = list[tuple[float, float]]
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)
_POLYGON_NUMBERS = 6
_MAX_BYTES = 1 << 30  # COCO's own largest file has 450 MB
# Larger integers can be chosen to have the same hash, and the time to find one would be quadratic.
_MAX_ID = 1 << 53
_MAX_PAIRS = 1 << 22  # of corners that are compared for one object
# What is left out, in the singular and the plural.
_LEFT_OUT = {
    "repeated label": ("repeated label", "repeated labels"),
    "crowd": ("crowd", "crowds"),
    "annotation without image": ("annotation without image", "annotations without image"),
    "box without area": ("box without area", "boxes without area"),
}


@dataclass
class CocoImage:
    """An image of an annotation file.

    name: its path relative to the image folder, with slashes, never outside of that folder. size_wh: in
    pixels. lines: its normalised label lines, empty for an image without objects.
    """

    name: str
    size_wh: tuple[int, int]
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CocoSet:
    """An annotation file: its class names in the order of their ids, its images, and notes on omissions."""

    names: list[str]
    images: list[CocoImage]
    notes: list[str]


def read_coco(path: Path, names: Sequence[str] | None = None, segments: bool = False) -> CocoSet:
    """Read the labels of an annotation file.

    Category ids may have gaps, as COCO's do (80 of 91): classes are numbered in the order of the ids, or
    by their position in `names`. Crowd annotations are left out, as they are not single objects, and so
    are boxes without area and duplicates.

    segments: write outlines instead of boxes; the polygons of an object in several parts are joined.

    Raises:
        UserError: if the file is damaged or has a class missing from `names`.
    """
    content = _load(path)
    annotations = content.get("annotations", [])
    if not isinstance(annotations, list):
        raise UserError("its annotations are not a list", path, "fix it, or fetch or copy the file again")
    try:
        own, class_of = _classes(content["categories"], names, path)
        images = {_id(entry, path): _image(entry, path) for entry in content["images"]}
    except _DAMAGE as error:
        raise _damaged(path, "its categories or images", error) from error
    counts: dict[str, int] = {}
    seen: dict[int, set[str]] = {}
    for number, entry in enumerate(annotations):
        try:
            line = _line(entry, images, class_of, segments)
            if not line.startswith("!"):
                known = seen.setdefault(entry["image_id"], set())
                if line not in known:
                    known.add(line)
                    images[entry["image_id"]].lines.append(line)
                    continue
                line = "!repeated label"
        except _DAMAGE as error:
            raise _damaged(path, f"entry {number} of its annotations", error) from error
        counts[line[1:]] = counts.get(line[1:], 0) + 1
    notes = [f"{path}: left out: {counted(count, *_LEFT_OUT[what])}" for what, count in counts.items()]
    return CocoSet(own, list(images.values()), notes)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path, _MAX_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", path, "check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"is not valid JSON ({str(error)[:200]})", path, "fetch or copy the file again"
        ) from error
    if not isinstance(content, dict) or not {"images", "categories"} <= set(content):
        raise UserError(
            "is not an annotation file: it lacks images or categories",
            path,
            "give one like instances_val2017.json",
        )
    return content


def _classes(
    categories: Sequence[Mapping[str, Any]], names: Sequence[str] | None, path: Path
) -> tuple[list[str], dict[Any, int]]:
    """Return the class names, and a mapping from category id to class number."""
    ordered = sorted(categories, key=lambda entry: int(entry["id"]))
    own = [str(entry["name"]) for entry in ordered]
    if names is None:
        return own, {_id(entry, path): number for number, entry in enumerate(ordered)}
    unknown = sorted(set(own) - set(names))
    if unknown:
        raise UserError(f"class '{unknown[0]}' is not among the dataset's names", path, "correct the names")
    return list(names), {_id(entry, path): list(names).index(str(entry["name"])) for entry in ordered}


def _id(entry: Mapping[str, Any], path: Path) -> Any:
    found = entry["id"]
    if isinstance(found, int | float) and abs(found) > _MAX_ID:
        raise UserError(f"id {str(found)[:40]} is too large", path, "give ids of at most 2**53")
    return found


def _image(entry: Mapping[str, Any], path: Path) -> CocoImage:
    name, size = str(entry["file_name"]).replace("\\", "/"), (int(entry["width"]), int(entry["height"]))
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in name or ":" in pure.parts[0]:
        fault = f"image '{name[:200]}' leads out of the folder of images"
        raise UserError(fault, path, "give names relative to that folder")
    if min(size) < 1:
        raise UserError(f"image '{name[:200]}' has a size of {size[0]} x {size[1]} px", path, "fix it")
    return CocoImage(str(pure), size)


def _line(
    entry: Mapping[str, Any], images: Mapping[Any, CocoImage], class_of: Mapping[Any, int], segments: bool
) -> str:
    """Return a label line, or `!` followed by the reason for leaving it out."""
    if entry.get("iscrowd"):
        return "!crowd"
    image = images.get(entry["image_id"])
    if image is None:
        return "!annotation without image"
    width, height = image.size_wh
    x, y, w, h = (float(number) for number in entry["bbox"])
    if not all(map(math.isfinite, (x, y, w, h))):
        raise ValueError("a number is not finite")
    x1, x2 = (min(max(edge, 0.0), width) for edge in (x, x + w))
    y1, y2 = (min(max(edge, 0.0), height) for edge in (y, y + h))
    if x2 <= x1 or y2 <= y1:
        return "!box without area"
    numbers = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
    if segments:
        outline = joined(_polygons(entry.get("segmentation"))) or [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
        clipped = ((min(max(x, 0.0), width), min(max(y, 0.0), height)) for x, y in outline)
        numbers = [part for x, y in clipped for part in (x / width, y / height)]
    return " ".join((str(class_of[entry["category_id"]]), *(f"{number:.6f}" for number in numbers)))


def _polygons(segmentation: Any) -> list[Polygon]:
    """Return the polygons of an object; none if it is described by a mask."""
    if not isinstance(segmentation, list):
        return []
    found = []
    for part in segmentation:
        numbers = [float(number) for number in part]
        if len(numbers) >= _POLYGON_NUMBERS and all(map(math.isfinite, numbers)):
            found.append(list(zip(numbers[::2], numbers[1::2], strict=False)))
    return found


def joined(polygons: Sequence[Polygon]) -> Polygon:
    """Join polygons into one outline by connecting each to the next between their closest corners.

    The connection is traversed in both directions, so it encloses no area. Polygons of so many corners that
    comparing them all would take long are connected at any corner.
    """
    if not polygons:
        return []
    outline, room = list(polygons[0]), _MAX_PAIRS
    for following in polygons[1:]:
        room -= len(outline) * len(following)
        if room >= 0:
            here, there = _closest(outline, following)
            turned = [*following[there:], *following[: there + 1]]
            outline = [*outline[: here + 1], *turned, *outline[here:]]
        else:
            outline += [*following, following[0], outline[-1]]
    return [point for point, after in pairwise([*outline, None]) if point is not None and point != after]


def _closest(outline: Polygon, following: Polygon) -> tuple[int, int]:
    """Return the corner of `outline` and that of `following` that are closest, the first of several."""
    with np.errstate(over="ignore"):
        apart = np.array(outline)[:, None] - np.array(following)[None]
        here, there = divmod(int(np.argmin(np.square(apart).sum(2))), len(following))
    return here, there


def _damaged(path: Path, where: str, error: Exception) -> UserError:
    what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) and error.args else str(error)[:200]
    return UserError(f"{where} cannot be used ({what})", path, "fix it, or fetch or copy the file again")
