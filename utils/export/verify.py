"""Compares an exported network with the one it was made of, on pictures.

Shapes: B images, N predictions an image, K classes, n detections of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.yolo import Model
from utils.boxes import NmsRules, suppress
from utils.datasets.images import Image
from utils.errors import UserError
from utils.inference.exported import Exported
from utils.inference.facts import NmsInside
from utils.inference.preprocess import letterbox_image

# Of scores, and of boxes relative to their coordinates (px) where these are above 1.
TOLERANCE = 1e-3
# Of float16: its numbers are a two-thousandth apart, and some sixty layers add up.
HALF_TOLERANCE = 3e-2
PICTURES = 4
_SMALLER = ((1.0, 0.75), (0.5, 1.0))  # of height and width: further shapes where they are free


@dataclass
class Comparison:
    """The largest differences: of scores, of boxes in px and as a part of what is allowed."""

    score: float = 0.0
    box_px: float = 0.0
    worst: float = 0.0
    shapes: int = 0
    detections: int = 0

    def take(self, boxes: tuple[Tensor, Tensor], scores: tuple[Tensor, Tensor], tolerance: float) -> None:
        """Takes in boxes (n, 4) and scores (n, k), each wanted and got."""
        if not len(boxes[0]):
            return
        wanted = boxes[0].double()
        off = (wanted - boxes[1].double()).abs()
        score_off = (scores[0].double() - scores[1].double()).abs()
        # A NaN compares as nothing: it must not pass for a small number.
        off, score_off = off.nan_to_num(torch.inf), score_off.nan_to_num(torch.inf)
        self.box_px = max(self.box_px, float(off.max()))
        self.score = max(self.score, float(score_off.max()))
        relative = off / (tolerance * wanted.abs().clamp(min=1))
        self.worst = max(self.worst, float(relative.max()), float(score_off.max()) / tolerance)


def compare(
    model: Model, written: Exported, pictures: Sequence[Image], size_hw: tuple[int, int], tolerance: float
) -> Comparison:
    """How far a written network is from its model, both on the same pictures (BGR).

    model: float32, on the CPU. Raises UserError where they differ by more than `tolerance`.
    """
    result = Comparison()
    for shape_hw in _shapes(written, size_hw):
        images = torch.cat([letterbox_image(picture, shape_hw, 1, whole=True)[0] for picture in pictures])
        batch = images.float() / 255
        with torch.no_grad():
            levels = model.forward_head(model.forward_features(batch))
            decoded = model.decode_levels(levels)
        # Alone and together, where any batch goes.
        parts = [batch] if written.facts.shape[0] is not None else [batch[:1], batch]
        for part in parts:
            got = written(part).cpu()
            if written.facts.nms is None:
                _compare_all(decoded[: len(part)], got, tolerance, result)
            else:
                wanted = [
                    kept.detections for kept in suppress(decoded[: len(part)], _rules(written.facts.nms))
                ]
                _compare_detections(wanted, got, written, tolerance, result)
        result.shapes += 1
    if result.worst > 1:
        raise UserError(
            f"differs from PyTorch: scores by {result.score:.2g}, boxes by {result.box_px:.2g} px "
            f"(allowed: {tolerance:g})",
            written.path,
            "do not use it; try another --opset, or without --half",
        )
    return result


def check_pictures(found: Sequence[Image], source: str) -> list[Image]:
    """The first few of the pictures; raises UserError where there are none."""
    if not found:
        raise UserError("no picture to compare on", source, "name one with --source")
    return list(found[:PICTURES])


def _shapes(written: Exported, size_hw: tuple[int, int]) -> list[tuple[int, int]]:
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


def _rules(nms: NmsInside) -> NmsRules:
    return NmsRules(
        conf_thres=nms.conf_thres, iou_thres=nms.iou_thres, agnostic=nms.agnostic, max_det=nms.max_det
    )


def _compare_all(wanted: Tensor, got: Tensor, tolerance: float, result: Comparison) -> None:
    """Every prediction (B, N, 5 + K), those that no one would ever see included."""
    if wanted.shape != got.shape:
        result.worst = torch.inf
        return
    wanted, got = wanted.flatten(0, 1), got.flatten(0, 1)
    result.take((wanted[:, :4], got[:, :4]), (wanted[:, 4:], got[:, 4:]), tolerance)


def _compare_detections(
    wanted: Sequence[Tensor], got: Tensor, written: Exported, tolerance: float, result: Comparison
) -> None:
    """Detections: each (n, 6) wanted has its like among the rows (D, 6) got, and the other way round.

    Those whose confidence is within the tolerance of the threshold may be on one side alone.
    """
    nms = written.facts.nms
    assert nms is not None
    for expected, rows in zip(wanted, got, strict=True):
        found = rows[rows[:, 4] > 0]
        result.detections += len(found)
        left = torch.ones(len(found), dtype=torch.bool)
        for one in expected:
            alike = left & (found[:, 5] == one[5])
            if not alike.any():
                _missed(float(one[4]), nms, tolerance, result)
                continue
            places = alike.nonzero().flatten()
            place = places[(found[places, :5] - one[:5]).abs().amax(1).argmin()]
            left[place] = False
            match = found[place][None]
            result.take((one[None, :4], match[:, :4]), (one[None, 4:5], match[:, 4:5]), tolerance)
        for surplus in found[left]:
            _missed(float(surplus[4]), nms, tolerance, result)


def _missed(confidence: float, nms: NmsInside, tolerance: float, result: Comparison) -> None:
    if confidence > nms.conf_thres + tolerance:
        result.score, result.worst = max(result.score, confidence), torch.inf


def describe(result: Comparison, path: Path) -> str:
    """The outcome in one line."""
    detections = f"{result.detections} detections, " if result.detections else ""
    return (
        f"{path} agrees with PyTorch: {detections}{result.shapes} shape{'s' if result.shapes > 1 else ''}, "
        f"scores within {result.score:.1g}, boxes within {result.box_px:.1g} px"
    )
