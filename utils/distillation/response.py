"""The response loss: what a teacher says of each cell, in probabilities and boxes.

Shapes: B images, A anchors, H W grid, K classes. Notation: o objectness logit, z class logits, b box;
S student, T teacher; w = sigmoid(o_T) of a cell and anchor, W the sum of w over the batch and all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
            own, target = mine.float(), theirs.float()
            weight = target[..., 4].sigmoid()
            seen = seen + weight.sum()
            box = box + (self.box_distance(own, target, index) * weight).sum()
            cls = cls + (self.class_distance(own[..., 5:], target[..., 5:]) * weight).sum()
            obj = obj + self.objectness_distance(own[..., 4], target[..., 4]).mean() * self.balance[index]
        seen = mean_count(seen, len(batch.images))
        return {"box": box / seen * self.box, "obj": obj * self.obj, "cls": cls / seen * self.cls}

    def class_distance(self, own: Tensor, target: Tensor) -> Tensor:
        """The class loss of each cell, (B, A, H, W), from logits (B, A, H, W, K)."""
        return focused_cross_entropy(own, target).mean(-1)

    def objectness_distance(self, own: Tensor, target: Tensor) -> Tensor:
        """The objectness loss of each cell, (B, A, H, W), from logits of that shape."""
        distance = focused_cross_entropy(own, target)
        return distance if self.complete else distance * target.sigmoid()

    def box_distance(self, own: Tensor, target: Tensor, index: int) -> Tensor:
        """1 - CIoU of each cell's boxes, (B, A, H, W), from raw levels (B, A, H, W, 5 + K)."""
        anchors = self.anchors_grid[index].to(own.device)[:, None, None]
        boxes = [boxes_cxcywh_grid(raw[..., :4], anchors) for raw in (own, target)]
        return 1 - aligned_iou(boxes[0], boxes[1], "ciou")


class _FocusedCrossEntropy(torch.autograd.Function):
    """Value and gradient in one go; by parts, autograd passes over all cells and classes far more often."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_logits: Tensor) -> Tensor:
        """|p_T - p_S| BCE(p_S, p_T)."""
        target, own = target_logits.sigmoid(), logits.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        difference = own - target
        distance = difference.abs()
        # d|p_S - p_T| / dz BCE + |p_S - p_T| dBCE / dz; the latter is p_S - p_T.
        slope = difference.sign().mul_(own).mul_(1 - own).mul_(entropy).addcmul_(distance, difference)
        ctx.save_for_backward(slope)
        return distance.mul_(entropy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Of the logits; the teacher's side never gets one."""
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None


def focused_cross_entropy(logits: Tensor, target_logits: Tensor) -> Tensor:
    """|p_T - p_S| BCE(p_S, p_T) of each element, float32: nothing where both agree."""
    value: Tensor = _FocusedCrossEntropy.apply(logits.float(), target_logits.float())
    return value
