"""A network's classes, matched to those that are wanted of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.yolo import Model
from utils.errors import UserError
from utils.inference.classes import WantedClasses, fit_as_one, fit_classes
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
    fit_classes(
        network, WantedClasses(["TV monitor", "aeroplane"], "the data d.yaml"), Path("w.pt"), Console()
    )
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
    fit_classes(network, WantedClasses(["dog", "cat"], "the data d.yaml"), Path("w.pt"), Console())
    assert torch.equal(network.head.m[0].bias.view(3, 7), bias[:, [0, 1, 2, 3, 4, 6, 5]])
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("names", [["cat", "bird"], ["dog", "cat", "bird", "cow"]])
def test_classes_that_a_network_does_not_know_are_refused(names) -> None:
    network = _network(["cat", "dog", "cow"])
    wanted = WantedClasses(names, "the data d.yaml", ", or sing")
    with pytest.raises(
        UserError, match=rf"knows 3 classes .*d\.yaml has {len(names)} classes \(.*, or sing$"
    ):
        fit_classes(network, wanted, Path("w.pt"), Console())
    assert network.nc == 3


def test_other_names_of_the_same_number_are_told(capsys) -> None:
    network = _network(["class0", "aeroplane", "class2"])
    fit_classes(
        network, WantedClasses(["cat", "airplane", "dog"], "the data d.yaml"), Path("w.pt"), Console()
    )
    assert (
        "called differently in w.pt and the data d.yaml: 'class0' / 'cat', 'class2'"
        in capsys.readouterr().err
    )
    assert network.names == ["class0", "aeroplane", "class2"]
    fit_classes(
        _network(["a", "b", "c"]), WantedClasses(["b", "x", "c"], "the data d.yaml"), Path("w.pt"), Console()
    )
    assert "called differently in w.pt and the data d.yaml: 'a' / 'b', 'b' / 'x'\n" in capsys.readouterr().err


def test_names_that_nobody_has_given_match_none(capsys) -> None:
    network = Model("models/yolov5n.yaml", nc=3)
    fit_classes(network, WantedClasses(list(network.names), "the data d.yaml"), Path("w.pt"), Console())
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="knows 3 classes"):
        fit_classes(network, WantedClasses(["class1", "class0"], "the data d.yaml"), Path("w.pt"), Console())


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
    fit_classes(network, WantedClasses(["c", "a"], "the data d.yaml"), Path("w.onnx"), Console())
    assert list(network.names) == ["c", "a"] and network.nc == 2
    row = [1.0, 2, 3, 4]
    if nms is None:
        network.output = torch.tensor([[[*row, 0.5, 0.1, 0.2, 0.3]]])
        wanted = [[*row, 0.5, 0.3, 0.1]]
    else:
        network.output = torch.tensor([[[*row, 0.5, 2], [*row, 0.4, 1], [*row, 0.3, 0]]])
        wanted = [[*row, 0.5, 0], [*row, 0.0, 0], [*row, 0.3, 1]]
    assert torch.equal(network(torch.zeros(1, 3, 32, 32)), torch.tensor([wanted]))


def test_as_one_class_only_those_of_the_data_count(capsys) -> None:
    data = WantedClasses(["aeroplane", "cat"], "the data d.yaml")
    network = _network(["truck", "cat", "airplane", "tv"])
    before = network(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))[0]
    fit_as_one(network, data, Path("w.pt"), Console())
    after = network(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))[0]
    assert network.names == ["airplane", "cat"]
    torch.testing.assert_close(after, before[..., [0, 1, 2, 3, 4, 7, 6]], rtol=1e-5, atol=1e-5)
    assert (
        "w.pt: counted as one: 2 classes (airplane, cat); its other 2 classes left out"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["dog", "bird"], "share no class by name: all 2 classes count"),
        (["object"], ""),  # trained as one class
        (["class0", "class1"], ""),  # nobody has named them
        (["cat", "aeroplane"], ""),
    ],
)
def test_as_one_class_all_count_where_none_is_to_be_left_out(names, told, capsys) -> None:
    network = _network(names)
    fit_as_one(network, WantedClasses(["aeroplane", "cat"], "the data d.yaml"), Path("w.pt"), Console())
    assert network.names == names and network.nc == len(names)
    said = capsys.readouterr()
    assert told in said.err and bool(told) == bool(said.err) and said.out == ""
