"""Boxes: formats, IoU and non-maximum suppression.

Shapes: B images, N predictions per image, K classes, n boxes kept. Boxes are `xyxy` (left, top, right,
bottom) or `cxcywh` (centre, width, height), always in the coordinate frame and unit of the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.nms_operator import nms

Boxes = TypeVar("Boxes", Tensor, NDArray[Any])
IouKind = Literal["iou", "giou", "diou", "ciou"]


def cxcywh_to_xyxy(boxes: Boxes) -> Boxes:
    """Convert boxes to corners; (..., 4) in and out, torch or NumPy."""
    half = boxes[..., 2:4] / 2
    return _join(boxes[..., :2] - half, boxes[..., :2] + half)


def xyxy_to_cxcywh(boxes: Boxes) -> Boxes:
    """Convert boxes to centre and size; (..., 4) in and out, torch or NumPy."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:4]
    return _join((top_left + bottom_right) / 2, bottom_right - top_left)


def _join(first: Boxes, second: Boxes) -> Boxes:
    if isinstance(first, Tensor):
        return torch.cat((first, second), dim=-1)
    return np.concatenate((first, second), axis=-1)


def pairwise_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Compute the IoU of every box of one set with every box of another.

    a_xyxy (..., N, 4) and b_xyxy (..., M, 4) give (..., N, M) in 0..1; boxes without area have IoU 0.
    Without batch dimensions the values are those of torchvision's `box_iou`, which supports none.
    """
    a, b = a_xyxy.float()[..., :, None, :], b_xyxy.float()[..., None, :, :]
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    area_a, area_b = ((box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (a, b))
    return (shared / (area_a + area_b - shared)).nan_to_num_(0.0)


def aligned_iou(a_cxcywh: Tensor, b_cxcywh: Tensor, kind: IouKind = "ciou", eps: float = 1e-7) -> Tensor:
    """Compute the IoU of each box with its counterpart, differentiable in both.

    a_cxcywh and b_cxcywh are (..., 4) in any common unit; the result is (...) float32, whatever the
    precision of the input: at most 1 (up to rounding); at least 0 (iou), -1 (giou, diou) or somewhat
    below -1 (ciou). No gradient flows through the trade-off factor of CIoU.

    Source: GIoU, Rezatofighi et al. 2019, eq. 1; DIoU and CIoU, Zheng et al. 2020, eq. 6 to 11.
    """
    a_x, a_y, a_w, a_h = a_cxcywh.float().unbind(-1)
    b_x, b_y, b_w, b_h = b_cxcywh.float().unbind(-1)
    overlap_w = _overlap(a_x, a_w, b_x, b_w)
    overlap_h = _overlap(a_y, a_h, b_y, b_h)
    intersection = overlap_w.clamp(min=0) * overlap_h.clamp(min=0)
    union = a_w * a_h + b_w * b_h - intersection + eps
    iou = intersection / union
    if kind == "iou":
        return iou
    hull_w = _hull(a_x, a_w, b_x, b_w)
    hull_h = _hull(a_y, a_h, b_y, b_h)
    if kind == "giou":
        hull = hull_w * hull_h + eps
        return iou - (hull - union) / hull
    centre_distance = (a_x - b_x).square() + (a_y - b_y).square()
    diou = iou - centre_distance / (hull_w.square() + hull_h.square() + eps)
    if kind == "diou":
        return diou
    shape_gap = torch.atan(b_w / (b_h + eps)) - torch.atan(a_w / (a_h + eps))
    shape_term = (4 / math.pi**2) * shape_gap.square()
    with torch.no_grad():
        # Rounding can lift the IoU of equal boxes above 1: without the clamp that gave 0 / 0 here.
        trade_off = shape_term / (shape_term + (1 - iou).clamp(min=0) + eps)
    return diou - trade_off * shape_term


def _overlap(a_centre: Tensor, a_size: Tensor, b_centre: Tensor, b_size: Tensor) -> Tensor:
    """Return the length of the intersection of two intervals, negative if they are disjoint."""
    right = torch.minimum(a_centre + a_size / 2, b_centre + b_size / 2)
    left = torch.maximum(a_centre - a_size / 2, b_centre - b_size / 2)
    return right - left


def _hull(a_centre: Tensor, a_size: Tensor, b_centre: Tensor, b_size: Tensor) -> Tensor:
    """Return the length of the shortest interval that covers both."""
    right = torch.maximum(a_centre + a_size / 2, b_centre + b_size / 2)
    left = torch.minimum(a_centre - a_size / 2, b_centre - b_size / 2)
    return right - left


@dataclass(frozen=True, kw_only=True)
class NmsRules:
    """The parameters of non-maximum suppression.

    conf_thres: objectness, and objectness times class score, must be above it.
    iou_thres: a box is dropped if its IoU with a better one of its class is larger.
    classes: keep only these (None: all). agnostic: boxes of different classes suppress each other too.
    multi_label: a prediction yields a box for every class above the threshold (evaluation) instead of
        one for its best class.
    max_candidates: the number of best boxes per image that enter NMS; max_det: the number that it returns.
    """

    conf_thres: float = 0.25
    iou_thres: float = 0.45
    classes: Sequence[int] | None = None
    agnostic: bool = False
    multi_label: bool = False
    max_det: int = 300
    max_candidates: int = 30_000


# Candidates up to which NMS runs on all images at once: memory and time grow quadratically.
MAX_JOINT_NMS, MAX_JOINT_NMS_ON_CPU = 1 << 14, 1 << 10
# So many of the best candidates mostly contain all results of an evaluation.
_CANDIDATES_PER_RESULT = 5
# Predictions of an image that `suppress_best` is given.
MOST_OF_BEST = 1024
# Pairs of boxes that a CPU compares in the time of a call of NMS.
_PAIRS_OF_A_CLASS = 40_000
_FINITE = (1e6, -1e6)  # pixels, instead of infinity


class Kept(NamedTuple):
    """The detections of one image after NMS, most confident first.

    detections: (n, 6) float32: x1, y1, x2, y2 in the frame of the predictions, confidence, class.
    rows: (n,) int64: the index of each among the image's N predictions.
    """

    detections: Tensor
    rows: Tensor


def non_max_suppression(
    predictions: Tensor,
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    *,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    max_det: int = 300,
) -> list[Tensor]:
    """Return the detections of each image (`suppress` also returns the predictions they come from).

    predictions: (B, N, 5 + K) decoded: cx, cy, w, h in pixels, objectness, class scores in 0..1.
    Returns B tensors (n, 6) float32: x1, y1, x2, y2 in pixels, confidence, class; most confident first.
    """
    rules = NmsRules(
        conf_thres=conf_thres,
        iou_thres=iou_thres,
        classes=classes,
        agnostic=agnostic,
        multi_label=multi_label,
        max_det=max_det,
    )
    return [kept.detections for kept in suppress(predictions, rules)]


@torch.no_grad()
def suppress(predictions: Tensor, rules: NmsRules) -> list[Kept]:
    """Return the detections of each image and the indices of the predictions they come from.

    predictions: as for `non_max_suppression`. There is no time limit: every image of a batch gets
    its complete result.
    """
    image, row = (predictions[..., 4] > rules.conf_thres).nonzero(as_tuple=True)
    return suppress_rows(image, row, predictions[image, row], len(predictions), rules)


@torch.no_grad()
def suppress_rows(image: Tensor, row: Tensor, predictions: Tensor, count: int, rules: NmsRules) -> list[Kept]:
    """As `suppress`, given only the predictions (C, 5 + K) whose objectness is above the threshold.

    image: (C,) index of its image out of `count`, ascending. row: (C,) its index there, for `Kept.rows`.
    """
    image, row, candidates = _candidates(image, row, predictions, rules)
    return _suppress_all(image, row, candidates, count, rules)


@torch.no_grad()
def suppress_best(best: Tensor, count: int, rules: NmsRules) -> list[Kept] | None:
    """As `suppress`, in main memory, given each image's most confident predictions alone.

    best: (B, n, 7) centre x, y, width, height, confidence, best class and row of the most confident of
    `count` predictions, in main memory. Return None if an image may have more above the threshold.
    """
    assert not rules.multi_label
    passing = best[..., 4] > rules.conf_thres
    if best.shape[1] < count and bool(passing.all(1).any()):
        return None
    if rules.classes is not None:
        passing &= torch.isin(best[..., 5], torch.tensor(list(rules.classes)).float())
    image, place = passing.nonzero(as_tuple=True)
    # Of equally confident ones the first prediction counts.
    order = (image * count + best[image, place, 6].long()).argsort()
    image, found = image[order], best[image, place][order]
    candidates = torch.cat((cxcywh_to_xyxy(found[:, :4]), found[:, 4:6]), 1)
    return _suppress_all(image, found[:, 6].long(), candidates, len(best), rules)


def _suppress_all(image: Tensor, row: Tensor, candidates: Tensor, count: int, rules: NmsRules) -> list[Kept]:
    """Run NMS on candidates (C, 6) of `count` images, together if they are few; `image` (C,) ascends."""
    limit = MAX_JOINT_NMS if image.device.type == "cuda" else MAX_JOINT_NMS_ON_CPU
    if 0 < len(image) <= min(limit, rules.max_candidates):
        return _suppress_together(image, row, candidates, count, rules)
    # `image` ascends, so a single split separates the images.
    counts = torch.bincount(image, minlength=count).tolist()
    parts = zip(torch.split(candidates, counts), torch.split(row, counts), strict=True)
    return [_suppress_image(detections, rows, rules) for detections, rows in parts]


def _candidates(
    image: Tensor, row: Tensor, predictions: Tensor, rules: NmsRules
) -> tuple[Tensor, Tensor, Tensor]:
    """Return image (C,), row (C,) and box, confidence, class (C, 6) of all that passes the thresholds."""
    rows = predictions.float()  # float32: half precision resolves .5 px at x = 1000
    scores = rows[:, 5:] * rows[:, 4:5]
    if rules.classes is not None:
        wanted = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        wanted[[c for c in rules.classes if 0 <= c < scores.shape[1]]] = True
    if rules.multi_label and scores.shape[1] > 1:
        passing = scores > rules.conf_thres
        if rules.classes is not None:
            passing &= wanted
        kept, label = passing.nonzero(as_tuple=True)
        confidence = scores[kept, label]
    else:
        best, best_label = scores.max(dim=1)
        passing = best > rules.conf_thres
        if rules.classes is not None:
            passing &= wanted[best_label]
        kept = passing.nonzero(as_tuple=True)[0]
        confidence, label = best[kept], best_label[kept]
    boxes = cxcywh_to_xyxy(rows[kept, :4])
    return image[kept], row[kept], torch.cat((boxes, confidence[:, None], label[:, None].float()), dim=1)


def _suppress_together(
    image: Tensor, row: Tensor, candidates: Tensor, count: int, rules: NmsRules
) -> list[Kept]:
    """Run NMS on all images at once, since on a GPU each call synchronises.

    Images and classes are offset so as not to overlap, in float64: with large offsets float32 loses
    fractions of a pixel.
    """
    group = image if rules.agnostic else image * (candidates[:, 5].max() + 1) + candidates[:, 5]
    apart = _apart(candidates[:, :4], group)
    kept = nms(apart, candidates[:, 4].double(), rules.iou_thres)
    kept = kept[image[kept].argsort(stable=True)]  # best first within each image
    counts = torch.bincount(image[kept], minlength=count).tolist()
    parts = zip(torch.split(candidates[kept], counts), torch.split(row[kept], counts), strict=True)
    return [Kept(detections[: rules.max_det], rows[: rules.max_det]) for detections, rows in parts]


def _apart(boxes: Tensor, group: Tensor) -> Tensor:
    """Return boxes (n, 4) in float64, offset so that those of different groups (n,) do not overlap."""
    # NaN or inf in one box must not shift all others.
    wide = boxes.double().nan_to_num(0.0, *_FINITE)
    low, high = wide.aminmax()
    return wide - low + group.double()[:, None] * (high - low + 1)


def _suppress_image(detections: Tensor, rows: Tensor, rules: NmsRules) -> Kept:
    """Run NMS on the candidates of one image, best first, until `max_det` are kept.

    A candidate is affected only by better ones, so that the rest need not be looked at: an untrained
    network may have tens of thousands, and the time grows quadratically.
    """
    most, count = min(len(detections), rules.max_candidates), _CANDIDATES_PER_RESULT * max(rules.max_det, 1)
    while True:
        best = _best(detections[:, 4], min(count, most))
        kept = best[survivors(detections[best], rules)[: rules.max_det]]
        if len(kept) == rules.max_det or count >= most:
            return Kept(detections[kept], rows[kept])
        count *= 4


def _best(confidence: Tensor, count: int) -> Tensor:
    """Return the indices (count,) of the highest values, descending, equal ones in their order."""
    if count == len(confidence):
        return confidence.argsort(descending=True, stable=True)
    if count == 0:
        return torch.zeros(0, dtype=torch.long, device=confidence.device)
    # Sorting everything would take longer.
    lowest = confidence.topk(count).values[-1]
    chosen = (confidence >= lowest).nonzero(as_tuple=True)[0]
    return chosen[confidence[chosen].argsort(descending=True, stable=True)[:count]]


def survivors(detections: Tensor, rules: NmsRules) -> Tensor:
    """Return the indices of the detections (n, 6), sorted by confidence, that NMS keeps, in their order.

    Only `iou_thres` and `agnostic` of the rules apply.
    """
    if rules.agnostic or len(detections) == 0:
        # NaN or inf in one box must not keep others from suppressing each other.
        return _sorted(nms(detections[:, :4].nan_to_num(0.0, *_FINITE), detections[:, 4], rules.iou_thres))
    together = detections.device.type == "cuda" or _is_cheap_together(detections)
    return _sorted((_at_once if together else _one_by_one)(detections, rules.iou_thres))


def _is_cheap_together(detections: Tensor) -> bool:
    """Return whether comparing all pairs of detections (n, 6) takes less than a call for each class."""
    classes = int(torch.bincount(detections[:, 5].long()).count_nonzero())
    return len(detections) ** 2 <= _PAIRS_OF_A_CLASS * classes


def _sorted(indices: Tensor) -> Tensor:
    return indices.sort().values


def _at_once(detections: Tensor, iou_thres: float) -> Tensor:
    """Run NMS on all classes together: on a GPU each call synchronises, and on a CPU it takes a while."""
    return nms(_apart(detections[:, :4], detections[:, 5]), detections[:, 4].double(), iou_thres)


def _one_by_one(detections: Tensor, iou_thres: float) -> Tensor:
    """Run NMS on each class: n boxes take n^2 comparisons."""
    boxes, confidence = detections[:, :4].nan_to_num(0.0, *_FINITE), detections[:, 4]
    order = detections[:, 5].argsort(stable=True)
    counts = torch.bincount(detections[:, 5].long()).tolist()
    groups = [own for own in torch.split(order, counts) if len(own)]
    return torch.cat([own[nms(boxes[own], confidence[own], iou_thres)] for own in groups])
