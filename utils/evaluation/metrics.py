"""Scores of detections against ground truth: matching, average precision, confusion matrix.

Shapes: n detections, m labels, C classes that occur in the labels, T = 10 IoU thresholds. Everything
here works on arrays alone; `evaluate.py` collects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from utils.boxes import pairwise_iou

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
RECALL_POINTS: Floats = np.linspace(0, 1, 101)
CONFIDENCE_POINTS: Floats = np.linspace(0, 1, 1000)
F1_WINDOW = 0.1  # of the confidence axis, smoothed so that a lucky spike of F1 does not set the threshold
TINY = 1e-16
_CONFUSION_CONFIDENCE, _CONFUSION_IOU = 0.25, 0.45


def match_detections(
    detections: Sequence[Tensor], labels: Sequence[Tensor], iou_thresholds: Tensor
) -> list[Tensor]:
    """Return which detections of each image are true positives, at each IoU threshold.

    detections: (n, 6) per image: x1, y1, x2, y2, confidence, class; labels: (m, 5) per image: class, x1, y1,
    x2, y2 in the same frame; iou_thresholds: (T,). Returns (n, T) bool per image.

    A detection may claim the label of its class with the highest IoU, if that reaches the threshold; a label
    goes to the most confident detection that claims it, and the others are false positives. (Assigning the
    label by best IoU instead would reward the detector's own second choice: COCO's rule and the original's
    both go by confidence.)
    """
    counts, steps = [len(found) for found in detections], len(iou_thresholds)
    most = max(counts, default=0)
    if most == 0 or not any(map(len, labels)):
        return [torch.zeros(count, steps, dtype=torch.bool, device=iou_thresholds.device) for count in counts]
    # All images at once; detections and labels are padded with two classes that never match.
    found, true = (
        pad_sequence(list(rows), batch_first=True, padding_value=value)
        for rows, value in ((detections, -1.0), (labels, -2.0))
    )
    same_class = true[:, :, None, 0] == found[:, None, :, 5]  # (B, m, n)
    overlap, claimed = (pairwise_iou(true[..., 1:5], found[..., :4]) * same_class).max(dim=1)
    claims = (overlap[..., None] >= iou_thresholds) & same_class.any(dim=1)[..., None]  # (B, n, T)
    by_confidence = found[..., 4].argsort(dim=1, descending=True, stable=True)
    places = torch.arange(most, device=found.device).expand_as(by_confidence)
    place = torch.empty_like(by_confidence).scatter_(1, by_confidence, places)
    # The winner of label l at threshold t is the claimant with the best (smallest) rank by confidence.
    label_of = claimed[..., None].expand(-1, -1, steps)
    bids = torch.where(claims, place[..., None], most)
    winners = torch.full((len(found), true.shape[1], steps), most, device=found.device)
    winners.scatter_reduce_(1, label_of, bids, reduce="amin")
    hits = claims & (winners.gather(1, label_of) == bids)
    return [rows[:count] for rows, count in zip(hits, counts, strict=True)]


@dataclass(frozen=True)
class ClassMetrics:
    """Scores for each of the C classes that occur in the labels, in ascending class order.

    classes (C,): class numbers; labels (C,): number of labels of each class.
    ap (C, T): average precision at each IoU threshold.
    precision, recall (C,): at IoU .5 and at `confidence`, the one with the best mean F1 (smoothed).
    precision_curve, recall_curve, f1_curve (C, 1000): at IoU .5 over `confidence_axis` (1000,).
    pr_curve (C, 1000): precision at IoU .5 over `recall_axis` (1000,), for plotting.
    """

    classes: Ints
    labels: Ints
    ap: Floats
    precision: Floats
    recall: Floats
    confidence: float
    confidence_axis: Floats
    precision_curve: Floats
    recall_curve: Floats
    f1_curve: Floats
    recall_axis: Floats
    pr_curve: Floats

    @property
    def ap50(self) -> Floats:
        """(C,) average precision at IoU .5."""
        return self.ap[:, 0]

    @property
    def ap50_95(self) -> Floats:
        """(C,) average precision, mean over the IoU thresholds."""
        return np.asarray(self.ap.mean(axis=1))

    def means(self) -> tuple[float, float, float, float]:
        """Return precision, recall, mAP50 and mAP50-95; zeros without labels."""
        if len(self.classes) == 0:
            return 0.0, 0.0, 0.0, 0.0
        columns = (self.precision, self.recall, self.ap50, self.ap50_95)
        precision, recall, map50, map50_95 = (float(column.mean()) for column in columns)
        return precision, recall, map50, map50_95


def average_precision_per_class(
    hits: NDArray[np.bool_],
    confidence: NDArray[np.floating],
    predicted_class: NDArray[np.generic],
    true_class: NDArray[np.generic],
) -> ClassMetrics:
    """Compute average precision and the curves behind it for every class that occurs in the labels.

    hits: (n, T) from `match_detections`; confidence and predicted_class: (n,); true_class: (m,).
    The order of detections matters only among equal confidences. A class without detections scores 0
    everywhere.
    """
    classes, labels = np.unique(np.asarray(true_class, dtype=np.int64), return_counts=True)
    thresholds = hits.shape[1]
    ap = np.zeros((len(classes), thresholds))
    precision_curve = np.zeros((len(classes), len(CONFIDENCE_POINTS)))
    recall_curve, pr_curve = np.zeros_like(precision_curve), np.zeros_like(precision_curve)
    detection_groups = _confident_first_by_class(confidence, predicted_class, classes)
    for index, members in enumerate(detection_groups):
        if len(members) == 0:
            continue
        confidences = np.asarray(confidence[members], dtype=np.float64)
        hits_by_threshold = np.ascontiguousarray(hits[members].T)
        for threshold in range(thresholds):
            precision, recall = _precision_and_recall(hits_by_threshold[threshold], int(labels[index]))
            recall_grid, envelope = _precision_envelope(precision, recall)
            at_points = np.interp(RECALL_POINTS, recall_grid, envelope)
            ap[index, threshold] = (at_points[1:] + at_points[:-1]).mean() / 2  # the trapezoid rule
            if threshold == 0:
                precision_curve[index] = np.interp(-CONFIDENCE_POINTS, -confidences, precision, left=1)
                recall_curve[index] = np.interp(-CONFIDENCE_POINTS, -confidences, recall, left=0)
                pr_curve[index] = np.interp(CONFIDENCE_POINTS, recall_grid, envelope)
    f1_curve = 2 * precision_curve * recall_curve / (precision_curve + recall_curve + TINY)
    best = int(_smooth(f1_curve.mean(axis=0)).argmax()) if len(classes) else 0
    return ClassMetrics(
        classes=classes,
        labels=np.asarray(labels, dtype=np.int64),
        ap=ap,
        precision=precision_curve[:, best],
        recall=recall_curve[:, best],
        confidence=float(CONFIDENCE_POINTS[best]),
        confidence_axis=CONFIDENCE_POINTS,
        precision_curve=precision_curve,
        recall_curve=recall_curve,
        f1_curve=f1_curve,
        recall_axis=CONFIDENCE_POINTS,
        pr_curve=pr_curve,
    )


def _confident_first_by_class(
    confidence: NDArray[np.floating], predicted_class: NDArray[np.generic], classes: Ints
) -> list[Ints]:
    """Return the indices of each class's detections, most confident first; one sort serves all classes."""
    predicted = np.asarray(predicted_class, dtype=np.int64)
    order = np.lexsort((-np.asarray(confidence), predicted))
    ranked = predicted[order]
    starts, ends = np.searchsorted(ranked, classes), np.searchsorted(ranked, classes, side="right")
    return [order[start:end] for start, end in zip(starts, ends, strict=True)]


def _precision_and_recall(hits: Bools, labels: int) -> tuple[Floats, Floats]:
    """Return precision and recall of the first 1, 2, ... n detections, most confident first."""
    found = np.cumsum(hits, dtype=np.float64)
    return found / np.arange(1, len(hits) + 1), found / (labels + TINY)


def _precision_envelope(precision: Floats, recall: Floats) -> tuple[Floats, Floats]:
    """Return recall from 0 to 1, and the best precision at that recall or any higher one."""
    recall_grid = np.concatenate(([0.0], recall, [1.0]))
    padded = np.concatenate(([1.0], precision, [0.0]))
    return recall_grid, np.maximum.accumulate(padded[::-1])[::-1]


def _smooth(values: Floats) -> Floats:
    """Return a moving average over `F1_WINDOW` of the axis, padded with the edge values."""
    half = round(len(values) * F1_WINDOW) // 2
    padded = np.pad(values, half, mode="edge")
    return np.convolve(padded, np.full(2 * half + 1, 1 / (2 * half + 1)), mode="valid")


class ConfusionMatrix:
    """Counts pairs of predicted and true class; class `classes` is background.

    A label and a detection are matched, whatever their classes, if both the detection's confidence and their
    IoU are above a threshold, highest IoU first.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        # Not counted until the matrix is wanted: of thousands of classes it takes half a gigabyte.
        self._pairs: list[Ints] = []

    def update(self, detections: Tensor, labels: Tensor) -> None:
        """Add one image: detections (n, 6) and labels (m, 5) as in `match_detections`."""
        detections = detections[detections[:, 4] > _CONFUSION_CONFIDENCE].cpu()
        predicted: Ints = detections[:, 5].numpy().astype(np.int64)
        true: Ints = labels[:, 0].cpu().numpy().astype(np.int64)
        iou = pairwise_iou(labels[:, 1:5].cpu(), detections[:, :4]).numpy()
        label_index, detection_index = np.nonzero(iou > _CONFUSION_IOU)
        partners: Ints = np.full(len(predicted), self.classes)
        free_labels = np.ones(len(true), bool)
        for pair in np.argsort(-iou[label_index, detection_index], kind="stable"):
            label, detection = label_index[pair], detection_index[pair]
            if free_labels[label] and partners[detection] == self.classes:
                free_labels[label], partners[detection] = False, true[label]
        missed = true[free_labels]
        self._pairs += [
            np.stack((predicted, partners)),
            np.stack((np.full_like(missed, self.classes), missed)),
        ]

    @property
    def pairs(self) -> Ints:
        """All pairs so far, (2, P): predicted and true class of each."""
        self._pairs = [np.concatenate([np.zeros((2, 0), np.int64), *self._pairs], 1)]
        return self._pairs[0]

    @pairs.setter
    def pairs(self, pairs: Ints) -> None:
        self._pairs = [pairs]

    @property
    def matrix(self) -> Ints:
        """The counts [predicted, true], (K + 1, K + 1).

        The last row counts labels without a detection, the last column detections without a label.
        """
        counts: Ints = np.zeros((self.classes + 1, self.classes + 1), np.int64)
        np.add.at(counts, tuple(self.pairs), 1)
        return counts


def fitness(map50: float, map50_95: float) -> float:
    """Return the score by which the best epoch is chosen: mostly mAP50-95."""
    return 0.1 * map50 + 0.9 * map50_95
