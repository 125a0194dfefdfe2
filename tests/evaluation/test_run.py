"""What a test asks of its loader, and how it writes its results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.yolo import Model
from utils.config.dataset import DatasetConfig
from utils.config.options import TestOptions as Options  # not a class of tests
from utils.datasets.index import DatasetIndex
from utils.errors import UserError
from utils.evaluation.coco import CocoResults
from utils.evaluation.run import _loader, _Report, fit_classes
from utils.inference.exported import Exported
from utils.inference.facts import ExportFacts, NmsInside
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


@pytest.mark.fault("a test that ends while it writes its predictions", "the file of before is left as it was")
def test_predictions_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = DatasetIndex(
        ["x/ü.jpg"], [np.zeros((0, 5), np.float32)], np.array([(9, 9)]), np.full(1, True), [], ["cat"]
    )
    report = _Report(Options(project=str(tmp_path), weights="w.pt", noplots=True), index)
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


def _network(names: list[str]) -> Model:
    torch.manual_seed(0)
    network = Model("models/yolov5n.yaml", nc=len(names))
    network.names = names
    return network.eval()


def test_a_network_of_more_classes_answers_in_the_datas(capsys) -> None:
    network = _network(["airplane", "bicycle", "truck", "tv"])
    images = torch.rand(1, 3, 64, 64)
    before = network(images)[0]
    fit_classes(network, ["TV monitor", "aeroplane"], Path("w.pt"), Path("d.yaml"), False, Console())
    assert network.names == ["TV monitor", "aeroplane"]
    assert network.nc == network.head.nc == 2
    after = network(images)[0]
    torch.testing.assert_close(after, before[..., [0, 1, 2, 3, 4, 8, 5]], rtol=1e-5, atol=1e-5)
    told = capsys.readouterr().out
    assert "TV monitor = tv, aeroplane = airplane" in told
    assert "its other 2 classes left out" in told


def test_the_same_classes_in_another_order_are_taken_by_name(capsys) -> None:
    network = _network(["cat", "dog"])
    bias = network.head.m[0].bias.detach().view(3, 7).clone()
    fit_classes(network, ["dog", "cat"], Path("w.pt"), Path("d.yaml"), False, Console())
    assert torch.equal(network.head.m[0].bias.view(3, 7), bias[:, [0, 1, 2, 3, 4, 6, 5]])
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("single_cls", [False, True, None])
@pytest.mark.parametrize("wanted", [["cat", "bird"], ["dog", "cat", "bird", "cow"]])
def test_classes_that_a_network_does_not_know_are_refused(wanted, single_cls) -> None:
    network = _network(["cat", "dog", "cow"])
    case = (network, wanted, Path("w.pt"), Path("d.yaml"), single_cls, Console())
    if single_cls:
        fit_classes(*case)
    else:
        with pytest.raises(UserError, match=rf"knows 3 classes .*d\.yaml has {len(wanted)} classes \("):
            fit_classes(*case)
    assert network.nc == 3


def test_other_names_of_the_same_number_are_told(capsys) -> None:
    network = _network(["class0", "aeroplane", "class2"])
    fit_classes(network, ["cat", "airplane", "dog"], Path("w.pt"), Path("d.yaml"), None, Console())
    assert "called differently in w.pt and d.yaml: 'class0' / 'cat', 'class2'" in capsys.readouterr().err
    assert network.names == ["class0", "aeroplane", "class2"]
    fit_classes(_network(["a", "b", "c"]), ["b", "x", "c"], Path("w.pt"), Path("d.yaml"), None, Console())
    assert "called differently in w.pt and d.yaml: 'a' / 'b', 'b' / 'x'\n" in capsys.readouterr().err


def test_names_that_nobody_has_given_match_none(capsys) -> None:
    network = Model("models/yolov5n.yaml", nc=3)
    fit_classes(network, list(network.names), Path("w.pt"), Path("d.yaml"), None, Console())
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="knows 3 classes"):
        fit_classes(network, ["class1", "class0"], Path("w.pt"), Path("d.yaml"), None, Console())


class _Given(Exported):
    """Gives what it was given."""

    kind = "given"
    output: torch.Tensor

    def run(self, images: torch.Tensor) -> torch.Tensor:
        return self.output


@pytest.mark.parametrize("nms", [None, NmsInside(conf_thres=0.25, iou_thres=0.45, max_det=300)])
def test_an_exported_network_of_more_classes_answers_in_the_datas(nms) -> None:
    facts = ExportFacts(stride=32, names=("a", "b", "c"), shape=(None, None, None), nms=nms)
    network = _Given(Path("w.onnx"), facts, torch.device("cpu"))
    fit_classes(network, ["c", "a"], Path("w.onnx"), Path("d.yaml"), False, Console())
    assert list(network.names) == ["c", "a"] and network.nc == 2
    row = [1.0, 2, 3, 4]
    if nms is None:
        network.output = torch.tensor([[[*row, 0.5, 0.1, 0.2, 0.3]]])
        wanted = [[*row, 0.5, 0.3, 0.1]]
    else:
        network.output = torch.tensor([[[*row, 0.5, 2], [*row, 0.4, 1], [*row, 0.3, 0]]])
        wanted = [[*row, 0.5, 0], [*row, 0.0, 0], [*row, 0.3, 1]]
    assert torch.equal(network(torch.zeros(1, 3, 32, 32)), torch.tensor([wanted]))
