"""What a test asks of its loader, and how it writes its results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from utils.config.dataset import DatasetConfig
from utils.config.options import TestOptions as Options  # not a class of tests
from utils.datasets.index import DatasetIndex
from utils.evaluation.coco import CocoResults
from utils.evaluation.run import _loader, _Report
from utils.reporting.console import Console


@pytest.mark.parametrize(
    ("task", "rect", "shapes"),
    [("val", True, {(192, 352), (352, 192)}), ("val", False, {(320, 320)}), ("speed", True, {(320, 320)})],
)
def test_speed_is_measured_in_squares(task, rect, shapes) -> None:
    labels = [np.zeros((0, 5), np.float32)] * 4
    sizes_wh = np.array([(200, 100), (100, 200)] * 2)
    index = DatasetIndex(["x"] * 4, labels, sizes_wh, np.full(4, True), [], ["cat"])
    options = Options(task=task, rect=rect, batch_size=2, workers=0)
    assert {batch.shape_hw for batch in _loader(options, index, 320, 32).sampler} == shapes


@pytest.mark.fault(
    "`test.py` fails while writing its predictions",
    "the previous file is left intact; no partial file remains",
)
def test_predictions_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = DatasetIndex(
        ["x/ü.jpg"], [np.zeros((0, 5), np.float32)], np.array([(9, 9)]), np.full(1, True), [], ["cat"]
    )
    report = _Report(Options(project=str(tmp_path), weights=("w.pt",), noplots=True), index)
    config = DatasetConfig(tmp_path / "set.yaml", tmp_path, "yolo", {}, ["cat"], 1, None, "")
    path = tmp_path / "exp/w_predictions.json"
    coco = CocoResults(index)
    report._score_with_coco(coco, config, Console())
    assert json.loads(path.read_text(encoding="utf-8")) == []

    def broken(self):
        yield {"image_id": "ü", "score": 1.0}
        raise RuntimeError("stopped")

    monkeypatch.setattr(CocoResults, "entries", broken)
    with pytest.raises(RuntimeError, match="stopped"):
        report._score_with_coco(coco, config, Console())
    assert json.loads(path.read_text(encoding="utf-8")) == []
    assert [found.name for found in path.parent.iterdir()] == [path.name]
