"""The predictor on a small network: the same boxes as the network's own forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.yolo import Model
from utils.boxes import NmsRules, non_max_suppression
from utils.inference import predictor as predictor_module
from utils.inference.predictor import Predictor, half_precision, prepare_model

CFG = Path(__file__).parents[2] / "models" / "yolov5n.yaml"
RULES = NmsRules(conf_thres=0.1, iou_thres=0.5, max_det=50)


@pytest.fixture
def model() -> Model:
    """An untrained network that finds something everywhere, its batch norms set to what they see."""
    torch.manual_seed(0)
    network = Model(CFG, nc=4)
    with torch.no_grad():
        for convolution in network.head.m:
            convolution.bias.view(3, -1)[:, 4:] += 4.0
        network.train()(torch.rand(4, 3, 96, 96))
    return network.eval()


def test_prediction_is_the_forward_pass_and_suppression(model: Model) -> None:
    images = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        expected = non_max_suppression(model(images)[0], 0.1, 0.5, max_det=50)
    found = Predictor(model, RULES).predict(images)
    assert all(len(detections) > 5 for detections in found)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_prepared_model_predicts_the_same(model: Model) -> None:
    images = torch.rand(2, 3, 96, 64)
    before = model.decode_levels(Predictor(model, RULES).forward(images).levels)
    prepared = prepare_model(model.train(), torch.device("cpu"))
    passed = Predictor(prepared, RULES).forward(images)
    after, output = prepared.decode_levels(passed.levels), passed.output
    assert not any(module.training for module in prepared.modules())
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in prepared.modules())
    assert output is not None and len(output.levels) == 3
    # Folding the norms reorders float32 sums over up to 1,000 products.
    torch.testing.assert_close(after, before, atol=2e-3, rtol=1e-3)


def test_a_model_in_float16_keeps_its_anchors(model: Model) -> None:
    anchors = model.head.anchors.clone()
    prepared = prepare_model(model, torch.device("cpu"), half=True)
    assert all(parameter.dtype == torch.float16 for parameter in prepared.parameters())
    assert prepared.head.anchors.dtype == torch.float32 and torch.equal(prepared.head.anchors, anchors)


def test_times_are_kept_an_image(model: Model) -> None:
    predictor = Predictor(model, RULES)
    predictor.predict(torch.rand(2, 3, 64, 64))
    predictor.predict(torch.rand(1, 3, 64, 64))
    watch = predictor.watch
    assert watch.images == 3 and watch.seconds["inference"] > watch.last["inference"] > 0
    assert watch.milliseconds_per_image()["inference"] == pytest.approx(watch.seconds["inference"] * 1000 / 3)
    watch.reset()
    assert watch.images == 0 and sum(watch.seconds.values()) == 0


class _Heard:
    """Stands for the console."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


@pytest.mark.parametrize("most", [5, 1024])
def test_the_best_alone_give_the_detections_of_all(model: Model, monkeypatch, most: int) -> None:
    """As on a GPU, from which only the best are copied; five are too few."""
    monkeypatch.setattr(predictor_module, "MOST_OF_BEST", most)
    prepared = prepare_model(model, torch.device("cpu"))
    batches = [torch.rand(3, 3, 96, 64), torch.rand(2, 3, 64, 64)]
    expected = [Predictor(prepared, RULES).predict(images) for images in batches]
    predictor = Predictor(prepared, RULES)
    predictor.best_alone = True
    complete = [predictor.begin(images) for images in batches]  # both before the first is completed
    for wanted, finish in zip(expected, complete, strict=True):
        found = finish()
        assert [len(one) for one in found] == [len(one) for one in wanted] and max(map(len, found)) > 5
        torch.testing.assert_close(found, wanted)
    assert predictor.watch.images == 5 and predictor.watch.seconds["nms"] > 0


def test_half_precision_is_for_cuda_and_says_so() -> None:
    heard = _Heard()
    assert half_precision(True, torch.device("cpu"), heard) is False  # type: ignore[arg-type]
    assert len(heard.said) == 1 and "--half" in heard.said[0]
    assert half_precision(True, torch.device("cuda:0"), heard) is True  # type: ignore[arg-type]
    assert half_precision(False, torch.device("cpu"), heard) is False and len(heard.said) == 1  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_finds_the_same_boxes(model: Model) -> None:
    images = torch.rand(2, 3, 96, 64, device="cuda")
    device = torch.device("cuda:0")
    full, half = (
        prepared.decode_levels(Predictor(prepared, RULES, half=reduced).forward(images).output.levels)
        for prepared, reduced in ((prepare_model(model, device, half), half) for half in (False, True))
    )
    assert half.dtype == torch.float32 and model.head.anchors.dtype == torch.float32
    torch.testing.assert_close(half[..., :4], full[..., :4], atol=1.0, rtol=0.02)
