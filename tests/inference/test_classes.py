"""A network's classes, matched to those that are wanted of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.yolo import Model
from utils.errors import UserError
from utils.inference.classes import fit_classes
from utils.inference.exported import ExportedNetwork
from utils.inference.facts import ExportFacts, NmsInside
from utils.reporting.console import Console


def _network(names: list[str]) -> Model:
    torch.manual_seed(0)
    network = Model("models/yolov5n.yaml", nc=len(names))
    network.names = names
    return network.eval()


def test_a_network_of_more_classes_answers_in_the_datas(capsys) -> None:
    network = _network(["airplane", "bicycle", "truck", "tv"])
    images = torch.rand(1, 3, 64, 64)
    before = network(images)[0]
    fit_classes(network, ["TV monitor", "aeroplane"], Path("w.pt"), "the data d.yaml", False, Console())
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
    fit_classes(network, ["dog", "cat"], Path("w.pt"), "the data d.yaml", False, Console())
    assert torch.equal(network.head.m[0].bias.view(3, 7), bias[:, [0, 1, 2, 3, 4, 6, 5]])
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("single_cls", [False, True, None])
@pytest.mark.parametrize("wanted", [["cat", "bird"], ["dog", "cat", "bird", "cow"]])
def test_classes_that_a_network_does_not_know_are_refused(wanted, single_cls) -> None:
    network = _network(["cat", "dog", "cow"])
    case = (network, wanted, Path("w.pt"), "the data d.yaml", single_cls, Console())
    if single_cls:
        fit_classes(*case)
    else:
        with pytest.raises(UserError, match=rf"knows 3 classes .*d\.yaml has {len(wanted)} classes \("):
            fit_classes(*case)
    assert network.nc == 3


def test_other_names_of_the_same_number_are_told(capsys) -> None:
    network = _network(["class0", "aeroplane", "class2"])
    fit_classes(network, ["cat", "airplane", "dog"], Path("w.pt"), "the data d.yaml", None, Console())
    assert (
        "called differently in w.pt and the data d.yaml: 'class0' / 'cat', 'class2'"
        in capsys.readouterr().err
    )
    assert network.names == ["class0", "aeroplane", "class2"]
    fit_classes(_network(["a", "b", "c"]), ["b", "x", "c"], Path("w.pt"), "the data d.yaml", None, Console())
    assert "called differently in w.pt and the data d.yaml: 'a' / 'b', 'b' / 'x'\n" in capsys.readouterr().err


def test_names_that_nobody_has_given_match_none(capsys) -> None:
    network = Model("models/yolov5n.yaml", nc=3)
    fit_classes(network, list(network.names), Path("w.pt"), "the data d.yaml", None, Console())
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="knows 3 classes"):
        fit_classes(network, ["class1", "class0"], Path("w.pt"), "the data d.yaml", None, Console())


class _Given(ExportedNetwork):
    """Gives what it was given."""

    kind = "given"
    output: torch.Tensor

    def run(self, images: torch.Tensor) -> torch.Tensor:
        return self.output


@pytest.mark.parametrize("nms", [None, NmsInside(conf_thres=0.25, iou_thres=0.45, max_det=300)])
def test_an_exported_network_of_more_classes_answers_in_the_datas(nms) -> None:
    facts = ExportFacts(stride=32, names=("a", "b", "c"), shape=(None, None, None), nms=nms)
    network = _Given(Path("w.onnx"), facts, torch.device("cpu"))
    fit_classes(network, ["c", "a"], Path("w.onnx"), "the data d.yaml", False, Console())
    assert list(network.names) == ["c", "a"] and network.nc == 2
    row = [1.0, 2, 3, 4]
    if nms is None:
        network.output = torch.tensor([[[*row, 0.5, 0.1, 0.2, 0.3]]])
        wanted = [[*row, 0.5, 0.3, 0.1]]
    else:
        network.output = torch.tensor([[[*row, 0.5, 2], [*row, 0.4, 1], [*row, 0.3, 0]]])
        wanted = [[*row, 0.5, 0], [*row, 0.0, 0], [*row, 0.3, 1]]
    assert torch.equal(network(torch.zeros(1, 3, 32, 32)), torch.tensor([wanted]))
