"""Detections as COCO results, and their scores by pycocotools if it is installed."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from utils.batch import Batch
from utils.datasets.index import DatasetIndex
from utils.distributed import from_all
from utils.errors import UserError
from utils.inference.writers import NameBook

# The 80 classes of COCO have ids between 1 and 90; these were planned but never used.
_UNUSED_COCO_IDS = frozenset((12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
COCO_CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in _UNUSED_COCO_IDS)
Annotations = dict[str, list[dict[str, Any]] | dict[str, Any]]
ImageId = int | str
_HEAD = 64  # characters to read, enough for an empty list


def is_coco(names: Sequence[str]) -> bool:
    """Return whether these are COCO's 80 classes, judging by their number and the first and last name."""
    return len(names) == len(COCO_CATEGORY_IDS) and names[0] == "person" and names[-1] == "toothbrush"


def category_ids(names: Sequence[str]) -> tuple[int, ...]:
    """Return each class's id in a COCO file: COCO's own for its classes, else the class number."""
    return COCO_CATEGORY_IDS if is_coco(names) else tuple(range(len(names)))


def image_ids(paths: Sequence[str]) -> dict[str, ImageId]:
    """Return each image's id: its file name without suffix, as a number if all of them are distinct numbers.

    Files of the same name in several folders get a running number appended.
    """
    book = NameBook()
    stems = {path: book.name(path, Path(path).stem) for path in paths}
    plain = all(stem.isascii() and stem.isdigit() for stem in stems.values())
    if plain and len({int(stem) for stem in stems.values()}) == len(stems):
        return {path: int(stem) for path, stem in stems.items()}
    return dict(stems)


class CocoResults:
    """Observer for `evaluate` that collects detections."""

    def __init__(self, index: DatasetIndex) -> None:
        self._ids = image_ids(index.paths)
        self._categories = category_ids(index.names)
        self._found: list[tuple[ImageId, np.ndarray[Any, np.dtype[np.float32]]]] = []

    def __call__(self, batch: Batch, detections: list[Tensor]) -> None:
        """Add the detections of a batch, (n, 6) per image in original pixels."""
        for path, found in zip(batch.paths, detections, strict=True):
            self._found.append((self._ids[path], found.numpy()))

    def join_ranks(self) -> None:
        """Gather the detections of all ranks."""
        self._found = [entry for part in from_all(self._found) for entry in part]

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield COCO results: image_id, category_id, bbox (left, top, width, height in pixels), score."""
        for image_id, detections in self._found:
            for x1, y1, x2, y2, score, label in detections.tolist():
                box = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
                yield {
                    "image_id": image_id,
                    "category_id": self._categories[int(label)],
                    "bbox": box,
                    "score": round(score, 5),
                }

    def write(self, file: IO[str]) -> None:
        """Write the results as a JSON list, one entry per line."""
        # Entry by entry: a dataset like COCO yields over a million, too many to hold as dicts.
        file.write("[")
        for number, entry in enumerate(self.entries()):
            file.write(("\n" if number == 0 else ",\n") + json.dumps(entry))
        file.write("\n]\n")


def annotations_from_index(index: DatasetIndex) -> Annotations:
    """Return the labels of an index in COCO's annotation format, boxes in pixels."""
    ids, categories = image_ids(index.paths), category_ids(index.names)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for path, labels, size_wh in zip(index.paths, index.labels, index.sizes_wh, strict=True):
        width, height = (int(side) for side in size_wh)
        images.append({"id": ids[path], "file_name": Path(path).name, "width": width, "height": height})
        for label, cx, cy, w, h in labels.astype(np.float64).tolist():
            box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": ids[path],
                    "category_id": categories[int(label)],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    named = [{"id": number, "name": name} for number, name in zip(categories, index.names, strict=True)]
    return {"info": {}, "images": images, "annotations": boxes, "categories": named}


def official_annotations(root: Path, index: DatasetIndex) -> Path | None:
    """Return COCO's own annotation file for the images of an index, if the data is COCO and has it.

    It marks crowds, which text labels cannot.
    """
    if not is_coco(index.names) or not index.paths:
        return None
    path = root / "annotations" / f"instances_{Path(index.paths[0]).parent.name}.json"
    return path if os.path.isfile(path) else None


def score_with_pycocotools(
    results: Path, truth: Annotations | Path, paths: Sequence[str]
) -> tuple[float, float, str] | None:
    """Return mAP50-95, mAP50 and the evaluator's own table, over the images `paths`.

    results: a file of COCO results. truth: an annotation file or its content. None if pycocotools is not
    installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        return None
    if _is_empty(results):
        return 0.0, 0.0, "no detections"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if isinstance(truth, Path):
            annotations = COCO(str(truth))
        else:
            annotations = COCO()
            annotations.dataset = truth
            annotations.createIndex()
        try:
            scoring = COCOeval(annotations, annotations.loadRes(str(results)), "bbox")
        except AssertionError as error:
            what = f"the results do not belong to these annotations ({error})"
            raise UserError(what, results, "take the annotations of the split that was scored") from error
        scoring.params.imgIds = list(image_ids(paths).values())
        scoring.evaluate()
        scoring.accumulate()
        said.truncate(0)
        said.seek(0)
        scoring.summarize()
    return float(scoring.stats[0]), float(scoring.stats[1]), said.getvalue().rstrip()


def _is_empty(results: Path) -> bool:
    """Return whether a results file has no entry; reads only its start, as a long list may fill memory."""
    with open(results, encoding="utf-8") as file:
        return "".join(file.read(_HEAD).split()) == "[]"
