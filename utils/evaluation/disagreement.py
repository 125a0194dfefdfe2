"""The images on which two networks disagree most, and how.

Shapes: B images of H W pixels, n and m detections of an image by the two networks, L levels.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.modes import in_mode
from models.yolo import Model
from utils.batch import Batch, Letterbox
from utils.boxes import NmsRules, pairwise_iou, survivors
from utils.evaluation.evaluate import (
    EvaluationSettings,
    in_original_pixels,
    labels_in_original_pixels,
)
from utils.evaluation.plots import SHOWN_CONFIDENCE
from utils.inference.predictor import Predictor

if TYPE_CHECKING:
    from utils.reporting.scenes import Scene

PARTNER_CONFIDENCE = 0.05  # minimum confidence of a detection that can be another's partner
OVERLAP = 0.5  # minimum IoU of partners
NMS_RULES = NmsRules(iou_thres=0.45)  # of detect.py
SCENES = 6  # images that are shown
MOST_IMAGES = 1000  # to compare: limits the cost of the other network to as many forward passes


class Detector(Protocol):
    """The parts of a network that are used here; `stride` is (L,), in image pixels."""

    @property
    def stride(self) -> Tensor: ...  # noqa: D102

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]: ...  # noqa: D102

    def forward_head(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]: ...  # noqa: D102


@dataclass(frozen=True)
class Difference:
    """How much two sets of detections of one image differ.

    amount: see `compare_detections`. alone: (n,) and (m,) bool, True for a detection to be shown without a
    partner that is shown, too.
    """

    amount: float
    alone: tuple[Tensor, Tensor]


def compare_detections(first: Tensor, second: Tensor) -> Difference:
    """Measure how much two networks differ on an image by their detections (n, 6) and (m, 6), in one frame.

    Partners are a detection of each, of the same class, with an IoU of at least .5; each detection has at
    most one, and the highest IoU is paired first. With confidences a >= b, a pair counts a - IoU * b: nothing
    if both say the same with equal confidence, and up to a if one is sure of what the other hardly detects or
    places elsewhere. A detection without a partner counts its confidence. The amount is the sum over all
    pairs and single detections whose larger confidence is at least .25: those that detect.py shows. It is
    symmetric, and 0 for equal sets.
    """
    partners = _partners(first, second)
    sure_first, sure_second = first[:, 4] >= SHOWN_CONFIDENCE, second[:, 4] >= SHOWN_CONFIDENCE
    alone_first, alone_second = sure_first.clone(), sure_second.clone()
    amount = 0.0
    paired_first, paired_second = torch.zeros_like(sure_first), torch.zeros_like(sure_second)
    for row, column, iou in partners:
        low, high = sorted((float(first[row, 4]), float(second[column, 4])))
        paired_first[row], paired_second[column] = True, True
        if high >= SHOWN_CONFIDENCE:
            amount += high - iou * low
        if low >= SHOWN_CONFIDENCE:
            alone_first[row], alone_second[column] = False, False
    amount += float(first[sure_first & ~paired_first, 4].sum())
    amount += float(second[sure_second & ~paired_second, 4].sum())
    return Difference(amount, (alone_first, alone_second))


def as_shown(detections: Tensor) -> Tensor:
    """Return the detections (n, 6) that detect.py would keep; an evaluation keeps more for its curves."""
    detections = _best_of_each_box(detections[detections[:, 4] >= PARTNER_CONFIDENCE])
    return detections[survivors(detections, NMS_RULES)]


def _best_of_each_box(detections: Tensor) -> Tensor:
    """Return each box once with its best class, most confident first.

    Evaluation keeps all classes that pass, detection one.
    """
    detections = detections[detections[:, 4].argsort(descending=True, stable=True)]
    boxes, place = torch.unique(detections[:, :4], dim=0, return_inverse=True)
    rows = torch.arange(len(detections), device=detections.device)
    first = torch.full((len(boxes),), len(detections), device=detections.device)
    return detections[first.scatter_reduce(0, place, rows, "amin").sort().values]


def _partners(first: Tensor, second: Tensor) -> list[tuple[int, int, float]]:
    """Return the row and column of each pair of partners with their IoU, highest IoU first."""
    iou = pairwise_iou(first[:, :4], second[:, :4])
    iou[first[:, 5][:, None] != second[:, 5][None]] = 0
    rows, columns = (iou >= OVERLAP).nonzero(as_tuple=True)
    order = iou[rows, columns].argsort(descending=True, stable=True).tolist()
    taken_rows: set[int] = set()
    taken_columns: set[int] = set()
    pairs = []
    for place in order:
        row, column = int(rows[place]), int(columns[place])
        if row not in taken_rows and column not in taken_columns:
            taken_rows.add(row)
            taken_columns.add(column)
            pairs.append((row, column, float(iou[row, column])))
    return pairs


@torch.no_grad()
def objectness_map(network: Detector, images: Tensor) -> Tensor:
    """Return where a network sees any object: (B, H, W), 0..1, for images (B, 3, H, W).

    It is the maximum objectness over all anchors and levels at each pixel, with each level's cells
    interpolated bilinearly to the size of the image.
    """
    height, width = images.shape[2:]
    levels = network.forward_head(network.forward_features(images))
    maps = []
    for level, stride in zip(levels, network.stride.tolist(), strict=True):
        cells = level[..., 4].float().sigmoid().amax(dim=1)[:, None]  # (B, 1, rows, columns)
        size = (round(cells.shape[2] * stride), round(cells.shape[3] * stride))
        # A teacher with larger strides saw grey padding on the right and bottom, which is cropped here.
        maps.append(F.interpolate(cells, size, mode="bilinear")[:, 0, :height, :width])
    return torch.stack(maps).amax(dim=0)


@dataclass
class _Seen:
    """An image with the output of both networks: detections in original pixels, labels (m, 5) or None."""

    image: Tensor
    path: str
    letterbox: Letterbox
    labels: Tensor | None
    found: tuple[Tensor, Tensor]
    difference: Difference


@dataclass
class DisagreementPlots:
    """Observer of an evaluation that runs a second network on the same images.

    It keeps the images on which the two disagree most, see `compare_detections`, and finally draws them with
    labels and detections, and with the objectness maps of both networks. Compares the first 1000 images.

    model: the network being evaluated. titles: display names of the two. classes: those to compare, where one
    of the networks does not know the others; None: all.
    """

    model: Model
    other: Model
    titles: tuple[str, str]
    names: Sequence[str]
    settings: EvaluationSettings = EvaluationSettings()
    classes: Sequence[int] | None = None
    _worst: list[tuple[float, int, _Seen]] = field(default_factory=list)
    _images: int = 0
    _order: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self._predictor = Predictor(self.other, self.settings.nms_rules(), half=self.settings.half)

    def __call__(self, batch: Batch, detections: list[Tensor]) -> None:
        """Compare one batch; detections are (n, 6) per image in original pixels."""
        if self._images >= MOST_IMAGES:
            return
        self._images += len(detections)
        with in_mode(self.other, training=False):
            passed = self._predictor.forward(batch.images)
        found = in_original_pixels(self._predictor.suppress(passed), batch, self.settings.single_cls)
        labels = labels_in_original_pixels(batch)
        for place, both in enumerate(zip(detections, found, strict=True)):
            pair = (as_shown(self._compared(both[0])), as_shown(self._compared(both[1])))
            difference = compare_detections(*pair)
            if difference.amount <= 0:
                continue
            seen = _Seen(
                (batch.images[place] * 255).round().byte().cpu(),
                batch.paths[place],
                batch.letterboxes[place],
                labels[place] if bool(batch.labelled[place]) else None,
                pair,
                difference,
            )
            heapq.heappush(self._worst, (difference.amount, -next(self._order), seen))
            if len(self._worst) > SCENES:
                heapq.heappop(self._worst)

    def _compared(self, detections: Tensor) -> Tensor:
        if self.classes is None:
            return detections
        return detections[torch.isin(detections[:, 5], detections.new_tensor(self.classes))]

    def save(self, folder: Path, number: str = "") -> list[Path]:
        """Draw disagreement.jpg and objectness.jpg and return their paths; none if both agree everywhere."""
        worst = [seen for *_, seen in sorted(self._worst, key=lambda entry: entry[:2], reverse=True)]
        if not worst:
            return []
        from utils.reporting.scenes import (  # matplotlib takes half a second to import
            plot_disagreement,
            plot_objectness,
        )

        scenes = [self._scene(seen) for seen in worst]
        paths = [folder / f"{name}{number}.jpg" for name in ("disagreement", "objectness")]
        plot_disagreement(paths[0], scenes, self.titles, self.names)
        plot_objectness(paths[1], scenes, self.titles)
        return paths

    def _scene(self, seen: _Seen) -> Scene:
        """Return an image without its letterbox padding, with all labels and detections in its pixels."""
        from utils.reporting.scenes import Scene

        top, left = (round(pad) for pad in seen.letterbox.pad)
        height, width = (
            round(side * scale)
            for side, scale in zip(seen.letterbox.original_hw, seen.letterbox.scale, strict=True)
        )
        inner = (slice(top, top + height), slice(left, left + width))
        image = seen.image[None].to(self._predictor.device).float() / 255
        maps = []
        for network in (self.model, self.other):
            with in_mode(network, training=False):
                maps.append(objectness_map(cast(Detector, network), image)[0].cpu().numpy()[inner])
        by_corner = np.array((*seen.letterbox.scale[::-1], *seen.letterbox.scale[::-1]))
        first, second = (found.numpy().astype(np.float64) for found in seen.found)
        for found in (first, second):
            found[:, :4] *= by_corner
        labels = None
        if seen.labels is not None:
            labels = seen.labels.numpy().astype(np.float64)
            labels[:, 1:] *= by_corner
        return Scene(
            image_rgb=np.ascontiguousarray(seen.image.permute(1, 2, 0).numpy()[inner]),
            name=Path(seen.path).name,
            amount=seen.difference.amount,
            labels=labels,
            found=(first, second),
            alone=(seen.difference.alone[0].numpy(), seen.difference.alone[1].numpy()),
            objectness=(maps[0], maps[1]),
            shown_confidence=SHOWN_CONFIDENCE,
        )
