"""What a test asks of its loader, and how it writes its results."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from models.checkpoint import save_checkpoint
from models.yolo import Model
from utils.config.dataset import DatasetConfig
from utils.config.options import TestOptions as Options  # not a class of tests
from utils.datasets.index import DatasetIndex
from utils.errors import UserError
from utils.evaluation.coco import CocoResults
from utils.evaluation.run import _loader, _Report, run_test
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
@pytest.mark.parametrize("found", [[], [[1.0, 1, 5, 5, 0.9, 0]]], ids=["nothing found", "something found"])
def test_pycocotools_has_nothing_to_score_where_no_image_has_a_box(tmp_path: Path, capsys, found) -> None:
    pytest.importorskip("pycocotools")
    index = DatasetIndex(
        ["x/1.jpg"], [np.zeros((0, 5), np.float32)], np.array([(9, 9)]), np.full(1, True), [], ["cat"]
    )
    report = _Report(Options(project=str(tmp_path), weights=("w.pt",), noplots=True), index)
    config = DatasetConfig(tmp_path / "set.yaml", tmp_path, "yolo", {}, ["cat"], 1, None)
    coco = CocoResults(index)
    coco(SimpleNamespace(paths=index.paths), [torch.tensor(found).view(-1, 6)])
    report._score_with_coco(coco, config, Console())
    said = capsys.readouterr().out
    assert "pycocotools against the labels: nothing to score, as no image has a box" in said
    assert "mAP50" not in said


def test_predictions_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = DatasetIndex(
        ["x/ü.jpg"], [np.zeros((0, 5), np.float32)], np.array([(9, 9)]), np.full(1, True), [], ["cat"]
    )
    report = _Report(Options(project=str(tmp_path), weights=("w.pt",), noplots=True), index)
    config = DatasetConfig(tmp_path / "set.yaml", tmp_path, "yolo", {}, ["cat"], 1, None)
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


def test_a_split_without_labels_is_predicted_for_and_not_scored(tmp_path: Path, capfd) -> None:
    """A benchmark whose labels nobody has takes predictions alone; without them to write it is a mistake."""
    torch.manual_seed(0)
    model = Model("models/demo-student.yaml", nc=2)
    model.names = ["a", "b"]
    with torch.no_grad():
        for convolution in model.head.m:
            convolution.bias.view(3, -1)[:, 4:] += 5.0  # it finds something everywhere
    save_checkpoint(tmp_path / "w.pt", model=model.eval(), epoch=0, best_fitness=None, meta={})
    (tmp_path / "images/test").mkdir(parents=True)
    for number in range(2):
        cv2.imwrite(str(tmp_path / f"images/test/{number}.png"), np.full((48, 64, 3), 90 * number, np.uint8))
    path = tmp_path / "set.yaml"
    path.write_text("train: images/test\nval: images/test\ntest: images/test\nnames: [a, b]\n")

    def tested(**given) -> None:
        run_test(
            Options(
                weights=(str(tmp_path / "w.pt"),),
                data=str(path),
                task="test",
                imgsz=64,
                device="cpu",
                workers=0,
                project=str(tmp_path / "runs"),
                **given,
            )  # fmt: skip
        )

    with pytest.raises(UserError, match="not one label file"):
        tested()
    tested(save_json=True, save_txt=True)
    said = capfd.readouterr()
    assert "'test' has no label file: nothing is scored" in said.err and "mAP50" not in said.out
    written = {found.name for found in (tmp_path / "runs/exp").iterdir()}
    assert {"w_predictions.json", "labels"} <= written and "metrics.json" not in written
    entries = json.loads((tmp_path / "runs/exp/w_predictions.json").read_text(encoding="utf-8"))
    assert {entry["image_id"] for entry in entries} == {0, 1}
