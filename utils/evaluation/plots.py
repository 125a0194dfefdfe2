"""Plots of an evaluation: predictions beside labels, curves, confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.batch import Batch
from utils.boxes import xyxy_to_cxcywh
from utils.evaluation.evaluate import EvaluationResult
from utils.inference.predictor import place_boxes
from utils.reporting.image_plots import plot_batch

SHOWN_CONFIDENCE = 0.25  # evaluation keeps everything above .001, which would cover the images
_MOST_CONFUSED = 1000  # classes of a confusion matrix


class BatchPlots:
    """Observer that draws the first batches: val_batchN_labels.jpg and val_batchN_pred.jpg."""

    def __init__(self, folder: Path, names: Sequence[str], count: int = 3) -> None:
        self.folder, self.names, self.count, self._number = folder, list(names), count, 0

    def __call__(self, batch: Batch, detections: list[Tensor]) -> None:
        """Draw one batch; detections are (n, 6) per image in original pixels."""
        if self._number >= self.count:
            return
        images = batch.images.float().cpu()
        found, confidences = targets_from_detections(batch, detections)
        stem = self.folder / f"val_batch{self._number}"
        path, known = Path(f"{stem}_labels.jpg"), batch.labelled
        plot_batch(path, images, batch.targets, batch.paths, self.names, labelled=known)
        plot_batch(Path(f"{stem}_pred.jpg"), images, found, batch.paths, self.names, confidences)
        self._number += 1


def targets_from_detections(batch: Batch, detections: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return a batch's confident detections in the form of its targets (M, 6), and their confidences (M,)."""
    height, width = batch.images.shape[2:]
    rows, confidences = [torch.zeros(0, 6)], [torch.zeros(0)]
    for image, (found, letterbox) in enumerate(zip(detections, batch.letterboxes, strict=True)):
        found = found[found[:, 4] >= SHOWN_CONFIDENCE]
        boxes = xyxy_to_cxcywh(place_boxes(found[:, :4], letterbox))
        boxes = boxes / boxes.new_tensor((width, height, width, height))
        place = torch.full((len(found), 1), float(image))
        rows.append(torch.cat((place, found[:, 5:6], boxes), dim=1))
        confidences.append(found[:, 4])
    return torch.cat(rows), torch.cat(confidences)


def save_score_plots(folder: Path, result: EvaluationResult) -> None:
    """Plot the curves and, unless there are too many classes to see anything, the confusion matrix."""
    from utils.reporting.plots import plot_confusion, plot_curves  # matplotlib takes half a second to import

    names = list(result.names)
    if result.labels:
        plot_curves(folder, result.per_class, names)
    if len(names) <= _MOST_CONFUSED:
        plot_confusion(folder / "confusion_matrix.png", result.confusion.matrix, names)
