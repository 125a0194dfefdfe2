"""The response loss: what a teacher says of each cell, in probabilities and boxes.

Shapes: B images, A anchors, H W grid, K classes. Notation: o objectness logit, z class logits, b box;
S student, T teacher; w = sigmoid(o_T) of a cell and anchor, W the sum of w over the batch and all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.decode import boxes_cxcywh_grid
from utils.batch import Batch, StudentOutput
from utils.boxes import aligned_iou
from utils.distillation.teacher import TeacherOutput
from utils.losses.detection import LossGains, level_balance, mean_count


@dataclass(frozen=True)
class ResponseGains:
    """Weights of the three terms, relative to the ground-truth loss's gains of the same name.

    At these the gradient is about twice that of the labels' loss. A third of them closes less of the gap
    between student and teacher, nearly three times as much closes no more: see docs/experiments.md.
    """

    box: float = 6.0
    obj: float = 3.0
    cls: float = 3.0


class Response:
    """Classes and boxes count where the teacher sees an object, objectness everywhere (preset `response`).

    cls: (1/W) sum w mean_k |sigmoid(z_T) - sigmoid(z_S)| BCE(z_S, sigmoid(z_T)).
    box: (1/W) sum w (1 - CIoU(b_S, b_T)).
    obj: the levels' means, in the balance of the ground-truth loss, of
        |sigmoid(o_T) - sigmoid(o_S)| BCE(o_S, sigmoid(o_T)).

    Normalised by what the teacher sees and not by the number of cells, a term is as strong as its
    twin of the ground-truth loss. Objectness is not weighted by the teacher's: else a student that
    sees what is not there would hardly be told.

    Source: Yang et al., Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object
    Detection (arXiv 2308.14286), eq. 4 to 7; the factor on a cross-entropy is that of Li et al.,
    Generalized Focal Loss (arXiv 2006.04388), eq. 3.
    """

    names: tuple[str, ...] = ("box", "obj", "cls")

    def __init__(
        self,
        gains: LossGains,
        anchors_grid: Tensor,
        own: ResponseGains = ResponseGains(),  # noqa: B008
        *,
        balance: Sequence[float] | None = None,
        complete: bool = True,
    ) -> None:
        """`gains` as applied by the ground-truth loss; `anchors_grid` (levels, A, 2) the student's.

        balance: weights of the levels' objectness; None for those of a head with just these levels.
        complete: whether the teacher knows all classes of the data. If not, what it calls background
        may be an object, and objectness counts only where it sees one.
        """
        self.box, self.obj, self.cls = gains.box * own.box, gains.obj * own.obj, gains.cls * own.cls
        self.anchors_grid = anchors_grid.detach().float()
        self.balance = level_balance(len(anchors_grid)) if balance is None else tuple(balance)
        self.complete = complete

    def __call__(self, batch: Batch, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """The three terms, float32 scalars."""
        box, obj, cls, seen = torch.zeros(4, device=batch.images.device).unbind()
        for index, (mine, theirs) in enumerate(zip(student.levels, teacher.levels, strict=True)):
            parts = (4, 1, mine.shape[-1] - 5)
            # Split, not sliced: the backward pass then fills one tensor of all outputs instead of three.
            own_box, own_obj, own_cls = mine.float().split_with_sizes(parts, -1)
            box_t, obj_t, cls_t = theirs.float().split_with_sizes(parts, -1)
            weight = obj_t[..., 0].sigmoid()
            seen = seen + weight.sum()
            box = box + (self.box_distance(own_box, box_t, index) * weight).sum()
            cls = cls + self.class_sum(own_cls, cls_t, weight)
            obj = obj + self.objectness_mean(own_obj, obj_t) * self.balance[index]
        seen = mean_count(seen, len(batch.images))
        return {"box": box / seen * self.box, "obj": obj * self.obj, "cls": cls / seen * self.cls}

    def class_sum(self, own: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """The class loss of all cells, weighted, from logits (B, A, H, W, K) and weights (B, A, H, W)."""
        return focused_cross_entropy(own, target, weight / own.shape[-1])

    def objectness_mean(self, own: Tensor, target: Tensor) -> Tensor:
        """The mean objectness loss of a cell, from logits (B, A, H, W, 1)."""
        counts = torch.ones_like(target) if self.complete else target.sigmoid()
        return focused_cross_entropy(own, target, counts[..., 0] / own.numel())

    def box_distance(self, own: Tensor, target: Tensor, index: int) -> Tensor:
        """1 - CIoU of each cell's boxes, (B, A, H, W), from raw boxes (B, A, H, W, 4)."""
        anchors = self.anchors_grid[index].to(own.device)[:, None, None]
        boxes = [boxes_cxcywh_grid(raw, anchors) for raw in (own, target)]
        return 1 - aligned_iou(boxes[0], boxes[1], "ciou")


CHUNK = 1 << 16  # elements that stay in a core's cache with all that is worked out from them


class _FocusedCrossEntropy(torch.autograd.Function):
    """Value and gradient in one go, a part that fits into the cache after the other.

    By autograd, a dozen passes over all cells and classes go through main memory, and cost more on a CPU
    than the rest of the loss.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_logits: Tensor, weight: Tensor) -> Tensor:
        """Sum of w |p_T - p_S| BCE(p_S, p_T) over rows (n, K) with weights (n)."""
        slope = torch.empty(logits.shape, device=logits.device)
        rows = max(CHUNK // logits.shape[1], 1) if logits.device.type == "cpu" else max(len(logits), 1)
        total = torch.zeros((), device=logits.device)
        parts = (torch.split(x, rows) for x in (logits, target_logits, weight, slope))
        for z, target, w, out in zip(*parts, strict=True):
            total += _focused_part(z, target.sigmoid(), w[:, None], out)
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Of the logits; the teacher's side never gets one."""
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None, None


def _focused_part(z: Tensor, target: Tensor, weight: Tensor, slope: Tensor) -> Tensor:
    """The weighted sum for logits (n, K) and target probabilities; its gradient is written to `slope`."""
    own = z.sigmoid()
    rest = 1 - own
    # BCE = softplus(z) - z p_T; with softplus(z) = max(z, 0) - log(max(p_S, 1 - p_S)) it costs one logarithm.
    entropy = torch.maximum(own, rest).log_().neg_().add_(z.clamp(min=0)).addcmul_(z, target, value=-1)
    difference = own - target
    distance = difference.abs()
    # d|p_S - p_T| / dz BCE + |p_S - p_T| dBCE / dz; the latter is p_S - p_T.
    torch.mul(own, rest, out=slope)
    slope.mul_(difference.sign()).mul_(entropy).addcmul_(distance, difference).mul_(weight)
    return distance.mul_(entropy).mul_(weight).sum()


def focused_cross_entropy(logits: Tensor, target_logits: Tensor, weight: Tensor) -> Tensor:
    """Sum of w |p_T - p_S| BCE(p_S, p_T) over cells and classes, float32: nothing where both agree.

    logits, target_logits: (..., K) of any memory order; weight: (...).
    """
    # Rows in the order of memory, cells before anchors: elsewise flattening would copy.
    own, target, weights = (
        x.movedim(1, 3) if x.dim() >= 4 else x for x in (logits.float(), target_logits.float(), weight)
    )
    value: Tensor = _FocusedCrossEntropy.apply(
        own.flatten(0, -2), target.flatten(0, -2), weights.detach().flatten()
    )
    return value
