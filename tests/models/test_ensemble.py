"""Several networks as one: their predictions pooled, whatever their strides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.checkpoint import save_checkpoint
from models.ensemble import Ensemble
from models.yolo import Model
from utils.boxes import NmsRules
from utils.errors import UserError
from utils.inference.backends import load_networks
from utils.inference.classes import WantedClasses
from utils.inference.predictor import Predictor
from utils.reporting.console import Console

CPU = torch.device("cpu")
RULES = NmsRules(conf_thres=0.3, iou_thres=0.5, max_det=50)


def network(cfg: str, seed: int, nc: int = 3) -> Model:
    """A network of random weights that sees an object in every tenth cell or so."""
    torch.manual_seed(seed)
    model = Model(f"models/{cfg}", nc=nc).eval()
    with torch.no_grad():
        for convolution in model.head.m:
            rows = convolution.weight.view(model.head.na, -1, *convolution.weight.shape[1:])
            rows[:, 4:] *= 20
            convolution.bias.view(model.head.na, -1)[:, 4:] = 0.5
    return model


@pytest.fixture(scope="module")
def different() -> Ensemble:
    """Three levels beside four, finest first."""
    return Ensemble([network("yolov5n.yaml", 0), network("hub/yolov5n6.yaml", 1)])


def test_the_predictions_are_those_of_all_members(different: Ensemble) -> None:
    images = torch.rand(2, 3, 128, 64)
    with torch.no_grad():
        levels = different.forward_head(different.forward_features(images))
        alone = torch.cat([member(images)[0] for member in different], 1)
        assert len(levels) == 7 and different.size_multiple == 64
        assert torch.equal(different.decode_levels(levels), alone)
        scores = alone[..., 4].flatten().sort().values
        middle = int(scores.diff()[100:-100].argmax()) + 100  # of the widest gap: no rounding crosses it
        least = float(scores[middle : middle + 2].mean())
        image, row, found = different.decode_above(levels, least)
        augmented = torch.cat([member.forward_augmented(images) for member in different], 1)
        assert torch.equal(different.forward_augmented(images), augmented)
    expected_image, expected_row = (alone[..., 4] > least).nonzero(as_tuple=True)
    assert 100 <= len(image) <= len(scores) - 100
    assert torch.equal(image, expected_image) and torch.equal(row.sort().values, expected_row.sort().values)
    torch.testing.assert_close(found, alone[image, row], rtol=1e-5, atol=1e-4)


def test_a_network_twice_finds_what_it_finds_alone() -> None:
    one, images = network("yolov5n.yaml", 2), torch.rand(2, 3, 96, 64)
    alone, twice = (Predictor(model, RULES).predict(images) for model in (one, Ensemble([one, one])))
    assert all(len(boxes) > 3 for boxes in alone)
    for boxes, same in zip(alone, twice, strict=True):
        assert torch.equal(boxes, same)


def test_a_member_adds_what_it_alone_sees() -> None:
    blind, seeing = network("yolov5n.yaml", 3), network("yolov5n.yaml", 4)
    with torch.no_grad():
        for convolution in blind.head.m:
            convolution.bias.view(3, -1)[:, 4] = -1000
    images = torch.rand(1, 3, 64, 64)
    wanted = Predictor(seeing, RULES).predict(images)[0]
    assert torch.equal(Predictor(Ensemble([blind, seeing]), RULES).predict(images)[0], wanted)
    assert len(wanted) > 0


def test_sizes_add_up_and_classes_are_kept_in_every_member() -> None:
    members = [network("yolov5n.yaml", 0), network("hub/yolov5n6.yaml", 1)]
    both, (first, second) = Ensemble(members), (member.summary(128) for member in members)
    total = both.summary(128)
    assert total.parameters == first.parameters + second.parameters
    assert total.gflops == pytest.approx(first.gflops + second.gflops)
    images = torch.rand(1, 3, 64, 64)
    before = both.decode_levels(both.forward_head(both.forward_features(images)))
    both.keep_classes([2, 0], ["c", "a"])
    after = both.decode_levels(both.forward_head(both.forward_features(images)))
    assert both.names == members[1].names == ["c", "a"] and both.nc == 2
    torch.testing.assert_close(after, before[..., [0, 1, 2, 3, 4, 7, 5]], rtol=1e-4, atol=1e-4)


def test_members_need_the_same_number_of_classes() -> None:
    for members in ([], [network("yolov5n.yaml", 0), network("yolov5n.yaml", 0, nc=4)]):
        with pytest.raises(ValueError, match="same number of classes"):
            Ensemble(members)


def test_every_member_answers_in_the_classes_that_are_wanted(tmp_path: Path) -> None:
    names = (["cat", "dog", "cow"], ["dog", "bird"])
    for number, own in enumerate(names):
        model = network("yolov5n.yaml", number, len(own))
        model.names = own
        save_checkpoint(tmp_path / f"{number}.pt", model=model, epoch=0, best_fitness=None, meta={})
    files = [tmp_path / "0.pt", tmp_path / "1.pt"]
    with pytest.raises(UserError, match="knows 2 classes"):
        load_networks(files, CPU, False, Console())
    both = load_networks(files, CPU, False, Console(), WantedClasses(["dog"], "the data"))
    assert isinstance(both, Ensemble) and both.names == ["dog"]
    assert [member.head.no for member in both] == [6, 6]


def test_files_of_other_classes_and_exported_ones_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / "three.pt", tmp_path / "two.pt", tmp_path / "others.pt"]
    for path, names in zip(files, (["cat", "dog", "cow"], ["dog", "cow"], ["cow", "ant"]), strict=True):
        model = network("yolov5n.yaml", 0, len(names))
        model.names = names
        save_checkpoint(path, model=model, epoch=0, best_fitness=None, meta={})
    told = r"two\.pt: knows 2 classes .*three\.pt has 3 classes .*, or name this file first$"
    with pytest.raises(UserError, match=told):
        load_networks(files[:2], CPU, False, Console())
    load_networks(files[1::-1], CPU, False, Console())
    with pytest.raises(UserError, match=r"others\.pt: knows 2 classes .*take weights .*by name$"):
        load_networks([files[0], files[2]], CPU, False, Console())
    (tmp_path / "x.onnx").write_bytes(b"never read")
    with pytest.raises(UserError, match=r"x\.onnx: .*ensemble; name \.pt files only"):
        load_networks([files[0], tmp_path / "x.onnx"], CPU, False, Console())
