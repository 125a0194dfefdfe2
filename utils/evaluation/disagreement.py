"""On which pictures two networks disagree most, and how.

Shapes: B images of H W pixels, n and m detections of an image by the one and by the other, L levels.
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
from torchvision.ops import batched_nms

from models.yolo import Model
from utils.batch import Batch, Letterbox
from utils.boxes import pairwise_iou
from utils.evaluation.evaluate import (
    EvaluationSettings,
    evaluation_mode,
    in_original_pixels,
    labels_in_original_pixels,
)
from utils.evaluation.pictures import SHOWN_CONFIDENCE
from utils.inference.predictor import Predictor

if TYPE_CHECKING:
    from utils.reporting.scenes import Scene

PARTNER_CONFIDENCE = 0.05  # least confidence of a detection that counts as another's partner
OVERLAP = 0.5  # least IoU of partners
SUPPRESSION = 0.45  # largest IoU of two detections of a class, as in detect.py
SCENES = 6  # pictures that are shown
MOST_IMAGES = 1000  # that are looked at: the other network is to cost no more than so many forward passes


class Detector(Protocol):
    """The parts of a network that are looked into; `stride` is (L,), in pixels of the picture."""

    @property
    def stride(self) -> Tensor: ...  # noqa: D102

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]: ...  # noqa: D102

    def forward_head(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]: ...  # noqa: D102


@dataclass(frozen=True)
class Difference:
    """How far two sets of detections of one image are apart.

    amount: see `compare_detections`. alone: (n,) and (m,) bool, True for a detection to be shown that has
    no partner which is shown too.
    """

    amount: float
    alone: tuple[Tensor, Tensor]


def compare_detections(first: Tensor, second: Tensor) -> Difference:
    """How much two networks differ on an image, from their detections (n, 6) and (m, 6), in one frame.

    Partners are a detection of each, of the same class, with an IoU of at least .5; each detection has one
    at the most, those that overlap most find each other first. With confidences a >= b, a pair counts
    a - IoU * b: nothing where both say the same with the same certainty, and up to a where the one is sure
    of what the other hardly sees or places elsewhere. A detection without a partner counts its
    confidence. The amount is the sum over all pairs and single detections of which the larger confidence
    is at least .25: those that detect.py shows. It is 0 for equal sets, and the same both ways round.
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
    """Those of an evaluation (n, 6) that detection would leave: an evaluation keeps more for its curves."""
    detections = _best_of_each_box(detections[detections[:, 4] >= PARTNER_CONFIDENCE])
    kept = batched_nms(detections[:, :4], detections[:, 4], detections[:, 5].long(), SUPPRESSION)
    return detections[kept]


def _best_of_each_box(detections: Tensor) -> Tensor:
    """Each box once, with its best class: an evaluation keeps all classes that pass, detection one."""
    detections = detections[detections[:, 4].argsort(descending=True, stable=True)]
    boxes, place = torch.unique(detections[:, :4], dim=0, return_inverse=True)
    rows = torch.arange(len(detections), device=detections.device)
    first = torch.full((len(boxes),), len(detections), device=detections.device)
    return detections[first.scatter_reduce(0, place, rows, "amin").sort().values]


def _partners(first: Tensor, second: Tensor) -> list[tuple[int, int, float]]:
    """Rows that belong together, and their IoU; the best overlaps first."""
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
    """Where a network sees any object: (B, H, W), 0..1, of images (B, 3, H, W).

    The largest objectness of all anchors and levels whose cells cover a place, each level laid over the
    picture with straight lines between the centres of its cells.
    """
    height, width = images.shape[2:]
    levels = network.forward_head(network.forward_features(images))
    maps = []
    for level, stride in zip(levels, network.stride.tolist(), strict=True):
        cells = level[..., 4].float().sigmoid().amax(dim=1)[:, None]  # (B, 1, rows, columns)
        size = (round(cells.shape[2] * stride), round(cells.shape[3] * stride))
        # A teacher of larger strides saw some grey on the right and below, which is no part of the picture.
        maps.append(F.interpolate(cells, size, mode="bilinear")[:, 0, :height, :width])
    return torch.stack(maps).amax(dim=0)


@dataclass
class _Seen:
    """An image with what both say of it: detections in original pixels, labels (m, 5) or None."""

    image: Tensor
    path: str
    letterbox: Letterbox
    labels: Tensor | None
    found: tuple[Tensor, Tensor]
    difference: Difference


@dataclass
class DisagreementPictures:
    """An observer of an evaluation that asks a second network about the same images.

    It keeps the images on which the two disagree most, see `compare_detections`, and at the end
    draws them beside the labels, and the objectness maps of both. Looks at the first 1000 images.

    model: the network that is evaluated. titles: what to call the two.
    """

    model: Model
    other: Model
    titles: tuple[str, str]
    names: Sequence[str]
    settings: EvaluationSettings = EvaluationSettings()
    _worst: list[tuple[float, int, _Seen]] = field(default_factory=list)
    _images: int = 0
    _order: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self._predictor = Predictor(self.other, self.settings.nms_rules(), half=self.settings.half)

    def __call__(self, batch: Batch, detections: list[Tensor]) -> None:
        """Compares one batch; detections (n, 6) an image in original pixels."""
        if self._images >= MOST_IMAGES:
            return
        self._images += len(detections)
        with evaluation_mode(self.other):
            passed = self._predictor.forward(batch.images)
        found = in_original_pixels(self._predictor.suppress(passed), batch, self.settings.single_cls)
        labels = labels_in_original_pixels(batch)
        for place, both in enumerate(zip(detections, found, strict=True)):
            pair = (as_shown(both[0]), as_shown(both[1]))
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

    def save(self, folder: Path, number: str = "") -> list[Path]:
        """Draws disagreement.jpg and objectness.jpg and gives them; none where the two agree everywhere."""
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
        """An image without the grey around it, and all that is said of it in its pixels."""
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
            with evaluation_mode(network):
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
