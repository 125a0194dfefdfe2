"""Verification of an exported network against the original on images.

Shapes: B images, N predictions per image, K classes, n detections of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.yolo import Model
from utils.boxes import NmsRules, pairwise_iou, suppress
from utils.datasets.images import Image
from utils.errors import UserError
from utils.inference.exported import ExportedNetwork
from utils.inference.facts import NmsInside
from utils.inference.preprocess import letterbox_image
from utils.words import counted


@dataclass(frozen=True)
class Tolerance:
    """Tolerances of the comparison.

    difference: absolute for scores and box coordinates in px, relative for coordinates above 1.
    objectness: predictions up to it are not compared.
    """

    difference: float
    objectness: float = 0.0


EXACT = Tolerance(1e-3)
# float16 has a relative precision of 1/2000, and the errors of some sixty layers add up: boxes of negligible
# objectness are off by 4% of their side, those at objectness .25 by 1%.
HALF = Tolerance(5e-2, objectness=0.1)
PICTURES = 4
_SMALLER = ((1.0, 0.75), (0.5, 1.0))  # factors of height and width for further shapes if these are dynamic


@dataclass
class Comparison:
    """The largest differences: of scores, of boxes in px, and of both relative to the tolerance (`worst`).

    shapes: number of shapes tried. predictions, detections: numbers compared.
    """

    score: float = 0.0
    box_px: float = 0.0
    worst: float = 0.0
    shapes: int = 0
    predictions: int = 0
    detections: int = 0

    def take(self, boxes: tuple[Tensor, Tensor], scores: tuple[Tensor, Tensor], allowed: Tolerance) -> None:
        """Update with boxes (n, 4) and scores (n, k), each as (expected, actual)."""
        if not len(boxes[0]):
            return
        wanted = boxes[0].double()
        off = (wanted - boxes[1].double()).abs()
        score_off = (scores[0].double() - scores[1].double()).abs()
        # Comparisons with NaN are false, so it must not be mistaken for a small difference.
        off, score_off = off.nan_to_num(torch.inf), score_off.nan_to_num(torch.inf)
        self.box_px = max(self.box_px, float(off.max()))
        self.score = max(self.score, float(score_off.max()))
        relative = off / (allowed.difference * wanted.abs().clamp(min=1))
        self.worst = max(self.worst, float(relative.max()), float(score_off.max()) / allowed.difference)


def compare(
    model: Model,
    written: ExportedNetwork,
    images: Sequence[Image],
    size_hw: tuple[int, int],
    allowed: Tolerance,
) -> Comparison:
    """Compare an exported network with its model on the same images (BGR).

    model: float32, on the CPU. Raises UserError if they differ by more than `allowed`.
    """
    result = Comparison()
    for shape_hw in _shapes(written, size_hw):
        pixels = torch.cat([letterbox_image(image, shape_hw, 1, whole=True)[0] for image in images])
        batch = pixels.float() / 255
        with torch.no_grad():
            levels = model.forward_head(model.forward_features(batch))
            decoded = model.decode_levels(levels)
        # With a dynamic batch size, a single image and all of them.
        parts = [batch] if written.facts.shape[0] is not None else [batch[:1], batch]
        for part in parts:
            got = written(part).cpu()
            if written.facts.nms is None:
                _compare_all(decoded[: len(part)], got, allowed, result)
            else:
                nms = written.facts.nms
                candidates = _candidates(decoded[: len(part)], nms, allowed)
                _compare_detections(candidates, got, nms, allowed, result)
        result.shapes += 1
    if result.worst > 1:
        what = f"scores by {result.score:.2g}, boxes by {result.box_px:.2g} px"
        if result.worst == torch.inf:
            what = f"it gives other boxes ({what} among those alike)"
        raise UserError(
            f"differs from PyTorch: {what}; allowed is {allowed.difference:g}",
            written.path,
            "try another --opset, or without --half",
        )
    return result


def check_images(found: Sequence[Image], source: str) -> list[Image]:
    """Return the first `PICTURES` of the images; raises UserError if there are none."""
    if not found:
        raise UserError("no image to compare on", source, "name one with --source")
    return list(found[:PICTURES])


def _shapes(written: ExportedNetwork, size_hw: tuple[int, int]) -> list[tuple[int, int]]:
    shapes = [size_hw]
    if written.facts.size_hw is None:
        multiple = written.size_multiple
        for factors in _SMALLER:
            sides = [
                max(int(side * by) // multiple, 1) * multiple
                for side, by in zip(size_hw, factors, strict=True)
            ]
            shapes.append((sides[0], sides[1]))
    return list(dict.fromkeys(shapes))


def _candidates(decoded: Tensor, nms: NmsInside, allowed: Tolerance) -> list[Tensor]:
    """Return the boxes (n, 6) of each image that are candidates for NMS, within the tolerance."""
    least = max(nms.conf_thres - allowed.difference, 0.0)
    rules = NmsRules(conf_thres=least, iou_thres=1.0, max_det=decoded.shape[1])
    return [kept.detections for kept in suppress(decoded, rules)]


def _compare_all(wanted: Tensor, got: Tensor, allowed: Tolerance, result: Comparison) -> None:
    """Compare the predictions (B, N, 5 + K) above the objectness limit."""
    if wanted.shape != got.shape:
        result.worst = torch.inf
        return
    wanted, got = wanted.flatten(0, 1), got.flatten(0, 1)
    if allowed.objectness:
        seen = wanted[:, 4] > allowed.objectness
        wanted, got = wanted[seen], got[seen]
    result.predictions += len(wanted)
    result.take((wanted[:, :4], got[:, :4]), (wanted[:, 4:], got[:, 4:]), allowed)


def _compare_detections(
    candidates: Sequence[Tensor], got: Tensor, nms: NmsInside, allowed: Tolerance, result: Comparison
) -> None:
    """Check that the detections among the rows `got` (B, D, 6) are candidates and a valid result of NMS.

    Valid means: no two overlap too much, and each candidate left out overlaps a better one that was kept, or
    ranks after `max_det`. This allows a box right at a threshold to fall on either side, with all the
    consequences.
    """
    for image, rows in zip(candidates, got, strict=True):
        found = rows[rows[:, 4] > 0]
        result.detections += len(found)
        kept = torch.zeros(len(image), dtype=torch.bool)
        for one in found:
            same = (image[:, 5] == one[5]).nonzero().flatten()
            if not len(same):
                result.worst = torch.inf
                continue
            place = same[(image[same, :5] - one[:5]).abs().amax(1).argmin()]
            kept[place] = True
            match = image[place][None]
            result.take((match[:, :4], one[None, :4]), (match[:, 4:5], one[None, 4:5]), allowed)
        if not _is_suppressed(found, image[~kept], nms, allowed):
            result.worst = torch.inf


def _is_suppressed(found: Tensor, others: Tensor, nms: NmsInside, allowed: Tolerance) -> bool:
    """Return whether NMS may keep `found` (n, 6) and leave out `others` (m, 6), within the tolerance."""
    slack = allowed.difference

    def rivals(first: Tensor, second: Tensor, threshold: float) -> Tensor:
        overlap = pairwise_iou(first[:, :4], second[:, :4]) > threshold
        return overlap if nms.agnostic else overlap & (first[:, None, 5] == second[None, :, 5])

    twice = rivals(found, found, nms.iou_thres + slack)
    if len(found) > nms.max_det or (twice & ~torch.eye(len(found), dtype=torch.bool)).any():
        return False
    better = found[None, :, 4] >= others[:, None, 4] - slack
    excused = (rivals(others, found, nms.iou_thres - slack) & better).any(1)
    excused |= others[:, 4] <= nms.conf_thres + slack
    if len(found) == nms.max_det:
        excused |= others[:, 4] <= found[:, 4].min() + slack
    return bool(excused.all())


def describe(result: Comparison, path: Path) -> str:
    """Describe the outcome in one line."""
    found, raw = counted(result.detections, "detection"), counted(result.predictions, "prediction")
    compared = found if result.detections else raw
    return (
        f"{path} agrees with PyTorch: {compared}, {counted(result.shapes, 'shape')}, "
        f"scores within {result.score:.1g}, boxes within {result.box_px:.1g} px"
    )
