"""Matching, average precision and confusion: reference values, slow references, worked examples."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.evaluation.metrics import (
    IOU_THRESHOLDS,
    ConfusionMatrix,
    average_precision_per_class,
    fitness,
)
from utils.evaluation.metrics import (
    match_detections as match_images,
)

REFERENCE = json.loads((Path(__file__).parent / "ap_reference.json").read_text())
THRESHOLDS = torch.tensor(IOU_THRESHOLDS, dtype=torch.float32)


def match_detections(detections: torch.Tensor, labels: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    (hits,) = match_images([detections], [labels], limits)
    return hits


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: f"seed{case['seed']}")
def test_reference_values_hold(case: dict[str, object]) -> None:
    random = np.random.RandomState(case["seed"])
    count, classes = int(str(case["detections"])), int(str(case["classes"]))
    confidence = random.uniform(0, 1, count)
    predicted = random.randint(0, classes, count)
    true = random.randint(0, classes, count // 2)
    quality = random.uniform(0, 1, count) * (0.3 + 0.7 * confidence)
    hits = quality[:, None] > np.linspace(0.35, 0.8, 10)
    metrics = average_precision_per_class(hits, confidence, predicted, true)
    np.testing.assert_allclose(metrics.ap50, case["ap50"], rtol=1e-9)
    np.testing.assert_allclose(metrics.ap50_95, case["ap"], rtol=1e-9)
    np.testing.assert_allclose(metrics.precision, case["precision"], rtol=1e-9)
    np.testing.assert_allclose(metrics.recall, case["recall"], rtol=1e-9)
    assert metrics.classes.tolist() == case["unique_classes"]


def test_perfect_detections_score_nearly_one() -> None:
    # Not quite: above the last recall point the curve falls to 0 within one of 100 steps.
    true = np.repeat([0, 4], 50)
    metrics = average_precision_per_class(np.ones((100, 10), bool), np.linspace(1, 0.5, 100), true, true)
    assert metrics.ap.min() > 0.99 and metrics.classes.tolist() == [0, 4]
    precision, recall, map50, map50_95 = metrics.means()
    assert precision == pytest.approx(1) and recall == pytest.approx(1)
    assert fitness(map50, map50_95) == pytest.approx(0.1 * map50 + 0.9 * map50_95)


def test_average_precision_of_a_worked_example() -> None:
    # Hit, miss, hit of 4 labels: precision 1 up to recall 1/4, 2/3 up to 1/2, then down to 0 at 1.
    hits = np.array([[True], [False], [True]])
    metrics = average_precision_per_class(hits, np.array([0.9, 0.8, 0.7]), np.zeros(3), np.zeros(4))
    points = np.linspace(0, 1, 101)
    expected = np.select(
        [points < 0.25, points <= 0.5], [np.ones(101), np.full(101, 2 / 3)], 2 / 3 * (1 - points) / 0.5
    )
    assert metrics.ap[0, 0] == pytest.approx(np.sum((expected[1:] + expected[:-1]) / 200), abs=2e-3)


def test_curves_begin_beyond_the_most_confident_detection_and_end_with_all_of_them() -> None:
    """Where nothing is confident enough, nothing is wrong and nothing is found."""
    hits = np.array([[True], [False], [True]])
    metrics = average_precision_per_class(hits, np.array([0.8, 0.5, 0.2]), np.zeros(3), np.zeros(4))
    axis, above, below = metrics.confidence_axis, slice(-200, None), slice(200)
    assert axis[above][0] > 0.8 and axis[below][-1] < 0.2 and axis[-1] == 1
    assert (metrics.precision_curve[0, above] == 1).all() and (metrics.recall_curve[0, above] == 0).all()
    assert (metrics.f1_curve[0, above] == 0).all()
    assert metrics.precision_curve[0, below] == pytest.approx(2 / 3)
    assert metrics.recall_curve[0, below] == pytest.approx(1 / 2)


def test_classes_without_labels_do_not_count_and_those_without_detections_score_zero() -> None:
    hits = np.ones((2, 10), bool)
    metrics = average_precision_per_class(hits, np.array([0.9, 0.8]), np.array([0, 7]), np.array([0, 2]))
    assert metrics.classes.tolist() == [0, 2] and metrics.labels.tolist() == [1, 1]
    assert metrics.ap[1].max() == 0 and metrics.precision[1] == 0 and metrics.recall[1] == 0
    assert metrics.ap[0].min() > 0.99


def test_nothing_found_and_nothing_labelled_give_zeros() -> None:
    empty, no_hits = np.zeros(0), np.zeros((0, 10), bool)
    nothing_found = average_precision_per_class(no_hits, empty, empty, np.array([1, 1]))
    assert nothing_found.means() == (0.0, 0.0, 0.0, 0.0) and nothing_found.ap.shape == (1, 10)
    nothing_labelled = average_precision_per_class(np.zeros((3, 10), bool), np.ones(3), np.ones(3), empty)
    assert nothing_labelled.means() == (0.0, 0.0, 0.0, 0.0) and nothing_labelled.ap.shape == (0, 10)


def test_order_of_detections_does_not_matter() -> None:
    random = np.random.default_rng(0)
    hits = random.random((500, 10)) > np.linspace(0.3, 0.9, 10)
    confidence, predicted = random.random(500), random.integers(0, 5, 500)
    true, shuffled = random.integers(0, 5, 200), random.permutation(500)
    a = average_precision_per_class(hits, confidence, predicted, true)
    b = average_precision_per_class(hits[shuffled], confidence[shuffled], predicted[shuffled], true)
    np.testing.assert_array_equal(a.ap, b.ap)
    assert a.confidence == b.confidence


def test_a_million_detections_take_seconds() -> None:
    random = np.random.default_rng(1)
    hits = random.random((1_000_000, 1)) > np.linspace(0.5, 0.95, 10)
    confidence = random.random(1_000_000, dtype=np.float32)
    begun = time.process_time()
    average_precision_per_class(hits, confidence, random.integers(0, 80, 1_000_000), np.arange(30_000) % 80)
    assert time.process_time() - begun < 10  # takes .6 s


def _box(x: float, y: float, side: float = 10) -> list[float]:
    return [x, y, x + side, y + side]


def test_overlap_decides_at_each_threshold() -> None:
    labels = torch.tensor([[0, *_box(0, 0)]])
    shifted = torch.tensor([[*_box(2, 0), 0.9, 0]])  # overlap 8 of 12: .667
    assert match_detections(shifted, labels, THRESHOLDS)[0].tolist() == [True] * 4 + [False] * 6


def test_another_class_is_no_match() -> None:
    labels = torch.tensor([[1, *_box(0, 0)]])
    detections = torch.tensor([[*_box(0, 0), 0.9, 0]])
    assert not match_detections(detections, labels, THRESHOLDS).any()
    assert not match_detections(detections, labels, torch.tensor([0.0])).any()


def test_a_label_is_found_once_by_its_most_confident_claimant() -> None:
    labels = torch.tensor([[0, *_box(0, 0)]])
    detections = torch.tensor([[*_box(0, 0), 0.3, 0], [*_box(2, 0), 0.9, 0], [*_box(1, 0), 0.5, 0]])
    hits = match_detections(detections, labels, THRESHOLDS)
    assert hits.sum(0).max() == 1
    # Where the confident one overlaps enough it wins; above .65 the next one, above .8 the exact one.
    assert hits.int().argmax(0).tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0, 0]


def test_a_detection_finds_one_label_the_one_it_overlaps_best() -> None:
    labels = torch.tensor([[0, *_box(3, 0)], [0, *_box(1, 0)]])
    detections = torch.tensor([[*_box(0, 0), 0.9, 0], [*_box(3, 0), 0.8, 0]])
    hits = match_detections(detections, labels, torch.tensor([0.5]))
    assert hits.flatten().tolist() == [True, True]
    assert match_detections(detections[:1], labels, torch.tensor([0.5])).sum() == 1


def _match_slowly(detections: torch.Tensor, labels: torch.Tensor, threshold: float) -> list[bool]:
    from utils.boxes import pairwise_iou

    taken: set[int] = set()
    hits = [False] * len(detections)
    for index in sorted(range(len(detections)), key=lambda i: -float(detections[i, 4])):
        same = labels[:, 0] == detections[index, 5]
        overlaps = pairwise_iou(labels[:, 1:], detections[index : index + 1, :4])[:, 0] * same
        best = int(overlaps.argmax())
        if same.any() and overlaps[best] >= threshold and best not in taken:
            taken.add(best)
            hits[index] = True
    return hits


def test_matching_agrees_with_the_definition_on_crowded_images() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        corner = torch.rand(40, 2, generator=generator) * 40
        boxes = torch.cat((corner, corner + 10 + 10 * torch.rand(40, 2, generator=generator)), 1)
        classes = torch.randint(0, 2, (40, 1), generator=generator).float()
        labels = torch.cat((classes[:12], boxes[:12]), 1)
        noise = torch.randn(28, 4, generator=generator)
        confidence = torch.rand(28, 1, generator=generator)
        near = torch.cat((boxes[:12], boxes[:12], boxes[36:]), 0) + noise
        detections = torch.cat((near, confidence, classes[12:]), 1)
        hits = match_detections(detections, labels, THRESHOLDS)
        for column, threshold in enumerate(THRESHOLDS.tolist()):
            assert hits[:, column].tolist() == _match_slowly(detections, labels, threshold)


def test_matching_without_detections_or_labels_is_empty() -> None:
    assert match_detections(torch.zeros(0, 6), torch.zeros(3, 5), THRESHOLDS).shape == (0, 10)
    assert not match_detections(torch.ones(3, 6), torch.zeros(0, 5), THRESHOLDS).any()
    assert match_images([], [], THRESHOLDS) == []


def test_images_of_a_batch_are_matched_each_for_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    detections, labels = [], []
    for count, true in ((40, 9), (0, 4), (7, 0), (0, 0), (300, 2)):
        corners = torch.rand(count + true, 2, generator=generator) * 60
        boxes = torch.cat((corners, corners + 20 + torch.rand(count + true, 2, generator=generator) * 20), 1)
        classes = torch.randint(0, 2, (count + true, 1), generator=generator)
        confidence = torch.randint(0, 20, (count, 1), generator=generator) / 20  # with ties
        detections.append(torch.cat((boxes[:count], confidence, classes[:count]), 1))
        labels.append(torch.cat((classes[count:], boxes[count:]), 1))
    together = match_images(detections, labels, THRESHOLDS)
    assert any(hits.any() for hits in together)
    for hits, found, true in zip(together, detections, labels, strict=True):
        assert torch.equal(hits, match_detections(found, true, THRESHOLDS))


def test_confusion_counts_hits_mistakes_misses_and_false_alarms() -> None:
    confusion = ConfusionMatrix(3)
    labels = torch.tensor([[0, *_box(0, 0)], [1, *_box(50, 0)], [2, *_box(100, 0)]])
    detections = torch.tensor(
        [
            [*_box(0, 0), 0.9, 0],  # right
            [*_box(1, 0), 0.8, 0],  # a second box on the same label: a false alarm
            [*_box(50, 0), 0.7, 2],  # taken for another class
            [*_box(100, 0), 0.2, 2],  # not confident enough to count: the label is missed
            [*_box(200, 0), 0.6, 1],  # nothing there
        ]
    )
    confusion.update(detections, labels)
    expected = np.zeros((4, 4), int)
    expected[0, 0] = expected[0, 3] = expected[2, 1] = expected[3, 2] = expected[1, 3] = 1
    np.testing.assert_array_equal(confusion.matrix, expected)


def test_confusion_counts_images_without_any_match() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([[*_box(0, 0), 0.9, 1]]), torch.zeros(0, 5))
    confusion.update(torch.zeros(0, 6), torch.tensor([[0, *_box(0, 0)]]))
    confusion.update(torch.tensor([[*_box(0, 0), 0.9, 1]]), torch.tensor([[0, *_box(80, 0)]]))
    np.testing.assert_array_equal(confusion.matrix, [[0, 0, 0], [0, 0, 2], [2, 0, 0]])
