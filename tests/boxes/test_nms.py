"""Suppression against the original's reference values, a slow reference and its promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from utils import boxes
from utils.boxes import NmsRules, non_max_suppression, pairwise_iou, suppress, suppress_best

CASES = json.loads((Path(__file__).parent / "nms_reference.json").read_text())


def _predictions(seed: int, rows: int, classes: int, images: int = 2) -> torch.Tensor:
    random = np.random.RandomState(seed)
    predictions = np.zeros((images, rows, 5 + classes))
    predictions[..., :2] = random.uniform(0, 300, (images, rows, 2))
    predictions[..., 2:4] = random.uniform(10, 120, (images, rows, 2))
    predictions[..., 4:] = random.uniform(0, 1, (images, rows, 1 + classes)) ** 2
    return torch.tensor(predictions, dtype=torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
def test_reference_values_hold(case: dict[str, Any]) -> None:
    kept = non_max_suppression(_predictions(case["seed"], case["n"], case["nc"]), **case["kwargs"])
    assert [len(detections) for detections in kept] == case["kept"]
    for detections, column_sums, top in zip(kept, case["sum"], case["top"], strict=True):
        # The references are float32 sums of up to 300 coordinates of some hundred pixels.
        torch.testing.assert_close(
            detections.double().sum(0), torch.tensor(column_sums).double(), rtol=1e-6, atol=1e-3
        )
        torch.testing.assert_close(detections[: len(top)], torch.tensor(top), rtol=1e-5, atol=1e-4)


def _slowly(predictions: torch.Tensor, conf: float, iou: float) -> list[list[float]]:
    """Every class of every anchor, one at a time, best first: the definition written down."""
    candidates = [
        (float(row[4] * row[5 + label]), label, row)
        for row in predictions
        for label in range(len(row) - 5)
        if row[4] > conf and row[4] * row[5 + label] > conf
    ]
    kept: list[list[float]] = []
    for score, label, row in sorted(candidates, key=lambda candidate: -candidate[0]):
        x, y, w, h = (float(value) for value in row[:4])
        box = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        rivals = [other for other in kept if other[5] == label]
        if all(pairwise_iou(torch.tensor([box]), torch.tensor([r[:4]])).item() <= iou for r in rivals):
            kept.append([*box, score, label])
    return kept


def test_agrees_with_the_definition() -> None:
    predictions = _predictions(seed=5, rows=60, classes=4, images=1)
    (kept,) = non_max_suppression(predictions, 0.1, 0.4, multi_label=True)
    torch.testing.assert_close(kept, torch.tensor(_slowly(predictions[0], 0.1, 0.4)), rtol=1e-5, atol=1e-3)


def test_rows_point_back_at_the_predictions() -> None:
    predictions = _predictions(seed=6, rows=300, classes=3)
    for image, kept in enumerate(suppress(predictions, NmsRules(conf_thres=0.1))):
        source = predictions[image, kept.rows]
        scores, labels = (source[:, 4:5] * source[:, 5:]).max(1)
        assert torch.equal(kept.detections[:, 4], scores)
        assert torch.equal(kept.detections[:, 5].long(), labels)
        assert len(kept.rows) > 10


def test_images_of_a_batch_do_not_touch_each_other() -> None:
    predictions = _predictions(seed=7, rows=200, classes=3, images=4)
    predictions[2, :, 4] = 0  # an image without candidates in the middle
    together = non_max_suppression(predictions)
    alone = [non_max_suppression(predictions[i : i + 1])[0] for i in range(4)]
    assert len(together[2]) == 0 and together[2].shape == (0, 6)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_classes_compete_only_when_agnostic() -> None:
    twins = torch.tensor([[[50.0, 50, 20, 20, 0.9, 0.9, 0.1], [50.0, 50, 20, 20, 0.9, 0.1, 0.8]]])
    assert len(non_max_suppression(twins)[0]) == 2
    (kept,) = non_max_suppression(twins, agnostic=True)
    assert kept[:, 5].tolist() == [0.0]


def test_neighbouring_classes_stay_apart_at_negative_coordinates() -> None:
    # Moved apart by "class x (largest coordinate + 1)", the second box would land on the first.
    boxes = torch.tensor([[[10.0, 10, 20, 20, 0.9, 0.9, 0.0], [-11.0, -11, 20, 20, 0.9, 0.0, 0.8]]])
    assert len(non_max_suppression(boxes, iou_thres=0.1)[0]) == 2


def test_only_wanted_classes_are_kept() -> None:
    predictions = _predictions(seed=8, rows=200, classes=3)
    everything = non_max_suppression(predictions)
    wanted = non_max_suppression(predictions, classes=[2, 99])
    for a, b in zip(everything, wanted, strict=True):
        assert torch.equal(a[a[:, 5] == 2], b) and len(b) > 0
    assert all(len(none) == 0 for none in non_max_suppression(predictions, classes=[]))
    several = non_max_suppression(predictions, classes=[2], multi_label=True)
    assert all(set(kept[:, 5].tolist()) == {2.0} for kept in several)


def test_limits_hold_and_keep_the_best() -> None:
    predictions = _predictions(seed=9, rows=500, classes=3)
    full = non_max_suppression(predictions, 0.01, 0.9)
    cut = non_max_suppression(predictions, 0.01, 0.9, max_det=7)
    assert all(torch.equal(a[:7], b) for a, b in zip(full, cut, strict=True))
    few = suppress(predictions, NmsRules(conf_thres=0.01, iou_thres=1.0, max_candidates=5))
    everything = suppress(predictions, NmsRules(conf_thres=0.01, iou_thres=1.0))
    assert all(torch.equal(a.detections[:5], b.detections) for a, b in zip(everything, few, strict=True))


def test_half_precision_predictions_are_decided_in_full_precision() -> None:
    predictions = _predictions(seed=10, rows=200, classes=3).half()
    half, full = non_max_suppression(predictions), non_max_suppression(predictions.float())
    for a, b in zip(half, full, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_values_that_are_not_numbers_are_no_candidates() -> None:
    predictions = _predictions(seed=11, rows=50, classes=2, images=1)
    predictions[0, ::2, 4:] = float("nan")
    (kept,) = non_max_suppression(predictions, 0.01)
    assert len(kept) > 0 and kept.isfinite().all()


def test_one_class_is_the_same_with_and_without_multi_label() -> None:
    predictions = _predictions(seed=12, rows=200, classes=1)
    plain, multi = non_max_suppression(predictions), non_max_suppression(predictions, multi_label=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, multi, strict=True))


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("multi_label", [False, True])
def test_images_together_keep_what_each_keeps_alone(agnostic: bool, multi_label: bool) -> None:
    predictions = _predictions(seed=14, rows=300, classes=5, images=4)
    predictions[1, :, 4] = 0  # an image without any
    predictions[2, :3, :4] = float("inf")
    rules = NmsRules(conf_thres=0.05, iou_thres=0.5, agnostic=agnostic, multi_label=multi_label, max_det=40)
    image, row = (predictions[..., 4] > rules.conf_thres).nonzero(as_tuple=True)
    found = boxes._candidates(image, row, predictions[image, row], rules)
    together = boxes._suppress_together(*found, 4, rules)
    assert len(together) == 4 and len(together[1].rows) == 0
    for number, (alone, shared) in enumerate(zip(suppress(predictions, rules), together, strict=True)):
        if number != 2:
            assert torch.equal(alone.detections, shared.detections) and torch.equal(alone.rows, shared.rows)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("side", [30.0, 300.0, 3000.0])
def test_looking_at_the_best_first_keeps_what_looking_at_all_does(monkeypatch, agnostic, side) -> None:
    """With small boxes the first few yield enough, with large ones all have to be looked at."""
    predictions = _predictions(seed=15, rows=3000, classes=3)
    predictions[..., 2:4] *= side / 100
    rules = NmsRules(conf_thres=0.01, iou_thres=0.3, agnostic=agnostic, multi_label=True, max_det=60)
    monkeypatch.setattr(boxes, "_CANDIDATES_PER_RESULT", 1 << 20)
    everything = suppress(predictions, rules)
    monkeypatch.setattr(boxes, "_CANDIDATES_PER_RESULT", 1)
    for a, b in zip(everything, suppress(predictions, rules), strict=True):
        assert torch.equal(a.detections, b.detections) and torch.equal(a.rows, b.rows)
        assert (len(a.rows) < 60) == (side > 1000)


def test_all_classes_at_once_keep_what_each_keeps_alone(monkeypatch) -> None:
    """As on a GPU, where an image has too many candidates for all images to be taken together."""
    predictions = _predictions(seed=18, rows=3000, classes=7)
    predictions[0, :3, :4] -= 200
    rules = NmsRules(conf_thres=0.01, iou_thres=0.4, multi_label=True)
    monkeypatch.setattr(boxes, "_PAIRS_OF_A_CLASS", 0)
    one_by_one = suppress(predictions, rules)
    monkeypatch.setattr(boxes, "_PAIRS_OF_A_CLASS", 1 << 60)
    for a, b in zip(one_by_one, suppress(predictions, rules), strict=True):
        assert torch.equal(a.detections, b.detections) and torch.equal(a.rows, b.rows)


def _best(predictions: torch.Tensor, most: int) -> torch.Tensor:
    scores, label = (predictions[..., 5:] * predictions[..., 4:5]).max(-1)
    confidence, row = scores.topk(min(most, scores.shape[1]))
    picked = [predictions[image, rows, :4] for image, rows in enumerate(row)]
    facts = torch.stack((confidence, label.gather(1, row), row), -1)
    return torch.cat((torch.stack(picked), facts), -1)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("wanted", [None, [0, 3], []])
def test_the_best_alone_keep_what_all_predictions_keep(agnostic, wanted) -> None:
    predictions = _predictions(seed=19, rows=800, classes=4, images=3)
    predictions[1, :, 4] = 0  # an image without any
    predictions[2, :, 4] = (predictions[2, :, 4] * 4).ceil() / 4
    predictions[2, :, 5:] = predictions[2, :, 5:].round()  # equal confidences
    rules = NmsRules(conf_thres=0.3, agnostic=agnostic, classes=wanted, max_det=40)
    expected = suppress(predictions, rules)
    for most in (400, 800, 5000):
        kept = suppress_best(_best(predictions, most), 800, rules)
        for a, b in zip(expected, kept, strict=True):
            assert torch.equal(a.detections, b.detections) and torch.equal(a.rows, b.rows)
    passing = int((predictions[..., 5:].amax(-1) * predictions[..., 4] > 0.3).sum(1).max())
    assert 50 < passing < 400
    assert suppress_best(_best(predictions, passing), 800, rules) is None  # there may be more
    assert suppress_best(_best(predictions, passing + 1), 800, rules) is not None


def test_tens_of_thousands_of_candidates_take_no_longer_than_some_hundred(monkeypatch) -> None:
    """As an untrained network makes them: only what can be among the results is compared."""
    compared = []

    def counted(boxes_xyxy: torch.Tensor, *others: Any) -> torch.Tensor:
        compared.append(len(boxes_xyxy))
        return original(boxes_xyxy, *others)

    original = boxes.nms
    monkeypatch.setattr(boxes, "nms", counted)
    predictions = _predictions(seed=16, rows=18_900, classes=3, images=1)
    (kept,) = non_max_suppression(predictions, 0.001, 0.6, multi_label=True)
    assert len(kept) == 300
    assert sum(compared) <= 1500


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_box_that_is_no_number_does_not_protect_others(agnostic, broken, place) -> None:
    rows = torch.tensor(
        [[100.0, 100, 50, 50, 0.9, 0.9], [101, 100, 50, 50, 0.9, 0.8], [0, 0, 9, 9, 0.95, 0.9]]
    )
    rows[2, place] = broken
    (kept,) = suppress(rows[None], NmsRules(agnostic=agnostic))
    assert kept.rows.tolist() in ([2, 0], [0])


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("classes", [1, 4])
def test_equal_confidences_keep_the_order_of_the_predictions(agnostic, classes) -> None:
    predictions = _predictions(seed=17, rows=4000, classes=classes, images=1)
    predictions[..., 4] = (predictions[..., 4] * 4).ceil() / 4
    predictions[..., 5:] = 0
    predictions[0, torch.arange(4000), 5 + torch.arange(4000) % classes] = 1.0
    (kept,) = suppress(predictions, NmsRules(conf_thres=0.01, agnostic=agnostic, max_det=4000))
    assert len(kept.rows) > 300
    by_confidence = sorted(range(len(kept.rows)), key=lambda i: (-kept.detections[i, 4], kept.rows[i]))
    assert by_confidence == list(range(len(kept.rows)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_cpu_keep_the_same() -> None:
    predictions = _predictions(seed=13, rows=3000, classes=20)
    for multi_label in (False, True):
        on_cpu = non_max_suppression(predictions, 0.05, 0.6, multi_label=multi_label)
        on_gpu = non_max_suppression(predictions.cuda(), 0.05, 0.6, multi_label=multi_label)
        for a, b in zip(on_cpu, on_gpu, strict=True):
            torch.testing.assert_close(a, b.cpu())
