"""COCO results and annotations, scored by COCO's own evaluator."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.batch import Batch
from utils.datasets.index import DatasetIndex
from utils.errors import UserError
from utils.evaluation.coco import (
    COCO_CATEGORY_IDS,
    CocoResults,
    annotations_from_index,
    category_ids,
    image_ids,
    is_coco,
    official_annotations,
    score_with_pycocotools,
)
from utils.evaluation.metrics import IOU_THRESHOLDS, average_precision_per_class, match_detections

COCO_NAMES = ["person", *(f"class {n}" for n in range(78)), "toothbrush"]


def _index(paths: list[str], names: list[str], seed: int = 0) -> DatasetIndex:
    random = np.random.default_rng(seed)
    labels = []
    for _ in paths:
        # Objects a cell each of a 3 x 2 grid, so that their boxes hardly overlap.
        cells = np.stack((np.arange(6) % 3 / 3 + 1 / 6, np.arange(6) // 3 / 2 + 1 / 4), 1)
        centres = cells + random.uniform(-0.05, 0.05, (6, 2))
        boxes = np.concatenate((centres, random.uniform(0.15, 0.35, (6, 2))), 1)
        labels.append(np.concatenate((random.integers(0, len(names), (6, 1)), boxes), 1).astype(np.float32))
    sizes = np.full((len(paths), 2), (200, 100), np.int64)
    return DatasetIndex(paths, labels, sizes, np.ones(len(paths), bool), [], names)


def _batch(paths: tuple[str, ...]) -> Batch:
    images = torch.zeros(len(paths), 3, 1, 1)
    return Batch(images, torch.zeros(0, 6), torch.ones(len(paths), dtype=torch.bool), paths)


def _noisy_detections(index: DatasetIndex, seed: int) -> list[torch.Tensor]:
    random = np.random.default_rng(seed)
    found = []
    for labels in index.labels:
        centre, size = labels[:, 1:3], labels[:, 3:]
        boxes = np.concatenate((centre - size / 2, centre + size / 2), 1) * np.array([200, 100, 200, 100])
        boxes = np.concatenate((boxes, boxes + np.tile(random.uniform(-30, 30, (len(boxes), 2)), 2)))
        boxes += random.normal(0, 2, boxes.shape)
        confidence = random.uniform(0.01, 1, (len(boxes), 1))
        classes = np.concatenate((labels[:, :1], random.permutation(labels[:, :1])))
        # As from a real network, a tail of unlikely boxes: COCO counts nothing beyond the last recall.
        corner = random.uniform(0, 90, (80, 2))
        tail = np.concatenate((corner, corner + 5), 1)
        boxes = np.concatenate((boxes, tail))
        confidence = np.concatenate((confidence, random.uniform(0, 0.01, (80, 1))))
        classes = np.concatenate((classes, random.integers(0, 3, (80, 1))))
        found.append(torch.tensor(np.concatenate((boxes, confidence, classes), 1), dtype=torch.float32))
    return found


def test_the_91_ids_of_coco_are_used_for_its_classes_alone() -> None:
    assert len(COCO_CATEGORY_IDS) == 80 and COCO_CATEGORY_IDS[:12] == (*range(1, 12), 13)
    assert COCO_CATEGORY_IDS[-1] == 90
    assert is_coco(COCO_NAMES) and category_ids(COCO_NAMES) == COCO_CATEGORY_IDS
    assert category_ids(["a", "b"]) == (0, 1)


def test_image_ids_are_numbers_where_the_names_are_and_never_double() -> None:
    assert image_ids(["a/000000000139.jpg", "a/285.jpg"]) == {"a/000000000139.jpg": 139, "a/285.jpg": 285}
    assert image_ids(["x/cat.jpg", "y/cat.jpg"]) == {"x/cat.jpg": "cat", "y/cat.jpg": "cat_2"}
    assert sorted(map(str, image_ids(["x/1.jpg", "x/01.jpg"]).values())) == ["01", "1"]


def test_results_are_in_cocos_form() -> None:
    index = _index(["x/139.jpg", "x/200.jpg"], COCO_NAMES)
    coco = CocoResults(index)
    coco(
        _batch(("x/200.jpg", "x/139.jpg")),
        [torch.tensor([[10.0, 20, 30, 60, 0.123456, 79]]), torch.zeros(0, 6)],
    )
    text = io.StringIO()
    coco.write(text)
    expected = {"image_id": 200, "category_id": 90, "bbox": [10.0, 20.0, 20.0, 40.0], "score": 0.12346}
    assert json.loads(text.getvalue()) == [expected]


def test_annotations_hold_boxes_in_pixels() -> None:
    index = _index(["x/a.jpg"], ["one"])
    index = replace(index, labels=[np.array([[0, 0.5, 0.5, 0.5, 0.2]], np.float32)])
    truth = annotations_from_index(index)
    (box,) = truth["annotations"]
    assert box["bbox"] == pytest.approx([50, 40, 100, 20]) and box["area"] == pytest.approx(2000)
    assert truth["categories"] == [{"id": 0, "name": "one"}]


def test_our_scores_agree_with_cocos_evaluator(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    index = _index([f"x/image {n}.jpg" for n in range(60)], ["a", "b", "c"])
    detections = _noisy_detections(index, seed=1)
    coco = CocoResults(index)
    coco(_batch(tuple(index.paths)), detections)
    path = tmp_path / "results.json"
    with path.open("w") as file:
        coco.write(file)
    scores = score_with_pycocotools(path, annotations_from_index(index), index.paths)
    assert scores is not None
    thresholds = torch.tensor(IOU_THRESHOLDS, dtype=torch.float32)
    hits, labels = [], []
    for found, truth in zip(detections, index.labels, strict=True):
        centre, size = truth[:, 1:3], truth[:, 3:]
        corners = np.concatenate((centre - size / 2, centre + size / 2), 1) * np.array([200, 100, 200, 100])
        labels.append(torch.tensor(np.concatenate((truth[:, :1], corners), 1), dtype=torch.float32))
        hits.append(match_detections([found], [labels[-1]], thresholds)[0].numpy())
    found = torch.cat(detections).numpy()
    metrics = average_precision_per_class(
        np.concatenate(hits), found[:, 4], found[:, 5], torch.cat(labels)[:, 0].numpy()
    )
    _, _, map50, map50_95 = metrics.means()
    # The two differ in the interpolation between recall points and in that COCO lets a detection claim
    # its second best label, which shows at the lowest threshold.
    assert map50_95 == pytest.approx(scores[0], abs=0.003) and map50 == pytest.approx(scores[1], abs=0.006)
    assert 0.2 < map50_95 < 0.8 and "Average Precision" in scores[2]


def test_no_detections_score_zero_and_foreign_results_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    index = _index(["x/a.jpg"], ["one"])
    path = tmp_path / "results.json"
    path.write_text("[]")
    scores = score_with_pycocotools(path, annotations_from_index(index), index.paths)
    assert scores is not None and scores[:2] == (0.0, 0.0)
    path.write_text('[{"image_id": "other", "category_id": 0, "bbox": [0, 0, 1, 1], "score": 1}]')
    with pytest.raises(UserError, match="do not belong"):
        score_with_pycocotools(path, annotations_from_index(index), index.paths)


def test_whether_there_are_results_is_known_without_reading_all_of_them(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("pycocotools")
    index = _index(["x/a.jpg"], ["one"])
    path = tmp_path / "results.json"
    with path.open("w") as file:
        CocoResults(index).write(file)
    monkeypatch.setattr("utils.evaluation.coco.json", SimpleNamespace(dumps=json.dumps))
    assert score_with_pycocotools(path, annotations_from_index(index), index.paths)[2] == "no detections"
    coco = CocoResults(index)
    coco(_batch(("x/a.jpg",)), [torch.tensor([[10.0, 20, 30, 60, 0.5, 0]])])
    with path.open("w") as file:
        coco.write(file)
    assert score_with_pycocotools(path, annotations_from_index(index), index.paths)[2] != "no detections"


def test_cocos_own_annotations_are_found_for_coco_alone(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text("{}")
    image = str(tmp_path / "images" / "val2017" / "1.jpg")
    assert official_annotations(tmp_path, _index([image], COCO_NAMES)) == file
    assert official_annotations(tmp_path, _index([image], ["one"])) is None
    assert official_annotations(tmp_path / "images", _index([image], COCO_NAMES)) is None
