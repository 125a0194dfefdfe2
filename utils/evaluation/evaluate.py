"""Evaluation of a network on a labelled dataset.

Shapes: B images, n detections and m labels of an image, M targets of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from models.ensemble import Network
from models.modes import in_mode
from utils.batch import Batch, StudentOutput
from utils.boxes import NmsRules, cxcywh_to_xyxy
from utils.distributed import from_all, world_size
from utils.evaluation.metrics import (
    IOU_THRESHOLDS,
    ClassMetrics,
    ConfusionMatrix,
    average_precision_per_class,
    fitness,
    match_detections,
)
from utils.inference.exported import ExportedNetwork
from utils.inference.predictor import Phase, Predictor, rescale_boxes, rescale_each
from utils.reporting.console import Console

ValidationLoss = Callable[[Batch, StudentOutput], dict[str, Tensor]]
# Called with each batch (float images, on the device) and its detections: B tensors (n, 6) on the
# CPU, boxes in pixels of the original images.
Observer = Callable[[Batch, list[Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How a network is evaluated; the defaults are those of every published score.

    half: forward pass in float16, CUDA only. augment: test-time augmentation with scales and flips.
    single_cls: every detection counts as class 0.
    """

    conf_thres: float = 0.001
    iou_thres: float = 0.6
    max_det: int = 300
    half: bool = False
    augment: bool = False
    single_cls: bool = False

    def nms_rules(self) -> NmsRules:
        """Return the NMS rules of an evaluation: multi-label, with a box for every class of an anchor."""
        return NmsRules(
            conf_thres=self.conf_thres,
            iou_thres=self.iou_thres,
            max_det=self.max_det,
            agnostic=self.single_cls,
            multi_label=True,
        )


@dataclass(frozen=True)
class EvaluationResult:
    """Scores over a dataset; the first four are means over the classes that occur in its labels.

    precision and recall are at IoU .5 and at the confidence with the best mean F1. losses: mean of each term
    per image, empty without a loss. speed_ms: milliseconds per image for preprocess, inference and nms.
    images and labels: how many were scored; images_with_class (K,): images that contain each class.
    """

    precision: float
    recall: float
    map50: float
    map50_95: float
    names: tuple[str, ...]
    per_class: ClassMetrics
    confusion: ConfusionMatrix
    losses: dict[str, float]
    speed_ms: dict[Phase, float]
    images: int
    labels: int
    images_with_class: NDArray[np.int64]

    @property
    def fitness(self) -> float:
        """The score by which the best epoch is chosen."""
        return fitness(self.map50, self.map50_95)

    def __str__(self) -> str:
        """Return the four scores in one line."""
        return (
            f"P {self.precision:.3f}  R {self.recall:.3f}  mAP50 {self.map50:.4f}  "
            f"mAP50-95 {self.map50_95:.4f}"
        )

    def over(self, classes: Sequence[int] | None = None) -> tuple[float, float]:
        """Return mAP50 and mAP50-95 over these classes, None for all; 0 if the labels have none of them."""
        if classes is None:
            return self.map50, self.map50_95
        chosen = np.isin(self.per_class.classes, np.array(classes, np.int64))
        if not chosen.any():
            return 0.0, 0.0
        return float(self.per_class.ap50[chosen].mean()), float(self.per_class.ap50_95[chosen].mean())

    def ap_by_class(self) -> NDArray[np.float64]:
        """Return (K,) mAP50-95 of every class; the mean for classes that do not occur in the labels."""
        ap = np.full(len(self.names), self.map50_95)
        ap[self.per_class.classes] = self.per_class.ap50_95
        return ap

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain values for a machine-readable file."""
        scores = self.per_class
        columns = (scores.labels, scores.precision, scores.recall, scores.ap50, scores.ap50_95)
        keys = ("labels", "precision", "recall", "map50", "map50_95")
        return {
            "precision": self.precision,
            "recall": self.recall,
            "map50": self.map50,
            "map50_95": self.map50_95,
            "images": self.images,
            "labels": self.labels,
            "speed_ms": dict(self.speed_ms),
            "classes": {
                self._key(number): {
                    key: values[row].item() for key, values in zip(keys, columns, strict=True)
                }
                for row, number in enumerate(scores.classes.tolist())
            },
        }

    def _key(self, number: int) -> str:
        """Return a class's name, followed by its number if another class has the same name."""
        name = self.names[number]
        return name if list(self.names).count(name) == 1 else f"{name} ({number})"

    def table(self, verbose: bool = True) -> tuple[list[list[str]], list[str]]:
        """Return rows and header: all classes together, then (`verbose`) each class in the labels."""
        header = ["class", "images", "labels", "P", "R", "mAP50", "mAP50-95"]
        means = (self.precision, self.recall, self.map50, self.map50_95)
        rows = [["all", str(self.images), str(self.labels), *(f"{value:.3f}" for value in means)]]
        if not verbose:
            return rows, header
        scores = self.per_class
        columns = zip(
            scores.classes,
            scores.labels,
            scores.precision,
            scores.recall,
            scores.ap50,
            scores.ap50_95,
            strict=True,
        )
        for number, labels, *values in columns:
            images = str(self.images_with_class[number])
            rows.append([self.names[number], images, str(labels), *(f"{value:.3f}" for value in values)])
        return rows, header


def evaluate(
    model: Network | ExportedNetwork,
    loader: DataLoader[Batch] | Sequence[Batch],
    *,
    names: Sequence[str],
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008 (frozen)
    loss: ValidationLoss | None = None,
    observers: Sequence[Observer] = (),
    progress: Console | None = None,
) -> EvaluationResult:
    """Evaluate a model on the device it is on, over a loader's letterboxed batches.

    names: the K class names of the data. loss: returns named scalars, as means per image, for a batch and the
    raw outputs; not with `augment` or an exported network. observers: called with every batch and its
    detections. progress: shows a bar. The model is returned in its previous mode. Unlabelled images are not
    scored. Each of several ranks evaluates its share of the batches (see `eval_loader`); the result covers
    all of them, the same on every rank and to the last digit that of a single process.

    Boxes are matched in pixels of the original images, clipped to them.
    """
    raw = not (settings.augment or isinstance(model, ExportedNetwork))
    assert loss is None or raw, "neither an augmented pass nor an exported network has raw outputs for a loss"
    predictor = Predictor(model, settings.nms_rules(), half=settings.half, augment=settings.augment)
    scores, means = _Scores(len(names)), _LossMeans()
    shown = loader if progress is None else progress.progress(loader, len(loader), "scoring")
    with nullcontext() if isinstance(model, ExportedNetwork) else in_mode(model, training=False):
        for batch in shown:
            seen, detections = _score_batch(predictor, batch, settings, scores, means, loss)
            for observe in observers:
                observe(seen, detections)
    scores.join_ranks()
    means.join_ranks()
    per_class = scores.class_metrics()
    return EvaluationResult(
        *per_class.means(),
        names=tuple(names),
        per_class=per_class,
        confusion=scores.confusion,
        losses=means.values(),
        speed_ms=predictor.watch.milliseconds_per_image(),
        images=scores.images,
        labels=int(per_class.labels.sum()),
        images_with_class=scores.images_with_class,
    )


def _score_batch(
    predictor: Predictor,
    batch: Batch,
    settings: EvaluationSettings,
    scores: _Scores,
    means: _LossMeans,
    loss: ValidationLoss | None,
) -> tuple[Batch, list[Tensor]]:
    """Score one batch; return it on the device, and its detections in original pixels."""
    assert len(batch.letterboxes) == len(batch.images), "evaluation needs letterboxed images"
    watch = predictor.watch
    watch.start()
    batch = batch.to(predictor.device).to_float()
    watch.lap("preprocess")
    with torch.no_grad():
        passed = predictor.forward(batch.images)
        watch.lap("inference")
        if loss is not None and (output := passed.output) is not None:
            means.add(loss(batch, output), len(batch.images))
            watch.start()
        found = predictor.suppress(passed)
    watch.lap("nms")
    watch.images += len(batch.images)
    detections = in_original_pixels(found, batch, settings.single_cls)
    labels = labels_in_original_pixels(batch)
    scored = batch.labelled.nonzero()[:, 0].tolist()
    scores.add([detections[image] for image in scored], [labels[image] for image in scored])
    return batch, detections


def in_original_pixels(found: list[Tensor], batch: Batch, single_cls: bool) -> list[Tensor]:
    """Return detections on the CPU, boxes in pixels of the original images; one transfer per batch."""
    together = torch.cat(found).cpu()
    if single_cls:
        together[:, 5] = 0
    by_image = torch.split(together, [len(detections) for detections in found])
    return rescale_each(by_image, batch.letterboxes)


def labels_in_original_pixels(batch: Batch) -> list[Tensor]:
    """Return each image's labels on the CPU: B tensors (m, 5) class, x1, y1, x2, y2 in original pixels."""
    height, width = batch.images.shape[2:]
    targets = batch.targets
    boxes = cxcywh_to_xyxy(targets[:, 2:]) * targets.new_tensor((width, height, width, height))
    labels = []
    for image, letterbox in enumerate(batch.letterboxes):
        mine = targets[:, 0] == image
        labels.append(torch.cat((targets[mine, 1:2], rescale_boxes(boxes[mine], letterbox)), dim=1))
    return labels


# Per image: hits (n, thresholds), confidence and class (n, 2), true classes (m,).
_Found = tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.int64]]


class _Scores:
    """What is kept of every image, batch by batch, to compute the scores from."""

    def __init__(self, classes: int) -> None:
        self.confusion = ConfusionMatrix(classes)
        self.images = 0
        self.images_with_class = np.zeros(classes, dtype=np.int64)
        self._thresholds = torch.tensor(IOU_THRESHOLDS, dtype=torch.float32)
        self._batches: list[list[_Found]] = []

    def add(self, detections: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        """Add a batch: (n, 6) and (m, 5) per image, on the CPU, in one frame."""
        self.images += len(detections)
        hits = match_detections(detections, labels, self._thresholds)
        batch: list[_Found] = []
        for hit, found, labelled in zip(hits, detections, labels, strict=True):
            true = labelled[:, 0].numpy().astype(np.int64)
            batch.append((hit.numpy(), found[:, 4:6].numpy(), true))
            self.images_with_class[np.unique(true)] += 1
            self.confusion.update(found, labelled)
        self._batches.append(batch)

    def join_ranks(self) -> None:
        """Gather the data of all ranks, in the order in which a single process would have seen it."""
        if world_size() == 1:
            return
        own = (self._batches, self.images, self.images_with_class, self.confusion.pairs)
        parts, images, with_class, pairs = zip(*from_all(own), strict=True)
        longest = max(map(len, parts))
        self._batches = [part[turn] for turn in range(longest) for part in parts if turn < len(part)]
        self.images = sum(images)
        self.images_with_class = np.sum(with_class, axis=0)
        self.confusion.pairs = np.concatenate(pairs, 1)

    def class_metrics(self) -> ClassMetrics:
        """Compute the scores of all images so far."""
        nothing = (
            np.zeros((0, len(IOU_THRESHOLDS)), bool),
            np.zeros((0, 2), np.float32),
            np.zeros(0, np.int64),
        )
        found = [nothing, *(image for batch in self._batches for image in batch)]
        hits, detections, true = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return average_precision_per_class(hits, detections[:, 0], detections[:, 1], true)


@dataclass
class _LossMeans:
    """Means of named scalars, weighted by images and accumulated on the device."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    images: int = 0

    def add(self, terms: dict[str, Tensor], images: int) -> None:
        """Add the means of one batch."""
        self.images += images
        for name, value in terms.items():
            weighted = value.detach().double() * images
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted

    def join_ranks(self) -> None:
        """Add the sums of the other ranks."""
        if world_size() == 1:
            return
        parts = from_all(({name: float(total) for name, total in self.sums.items()}, self.images))
        names = dict.fromkeys(name for sums, _ in parts for name in sums)
        self.sums = {name: torch.tensor(sum(sums.get(name, 0.0) for sums, _ in parts)) for name in names}
        self.images = sum(images for _, images in parts)

    def values(self) -> dict[str, float]:
        """Return the means so far."""
        return {name: float(total) / self.images for name, total in self.sums.items()}
