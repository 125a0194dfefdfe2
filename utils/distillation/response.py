"""The response loss: the teacher's and student's outputs compared per cell, as probabilities and boxes.

Shapes: B images, A anchors, H W grid, K classes. Notation: o objectness logit, z class logits, b box;
S student, T teacher; w = sigmoid(o_T) of a cell and anchor, W the sum of w over the batch and all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.decode import boxes_cxcywh_grid
from utils.boxes import aligned_iou
from utils.config.options_distill import FEW_CLASSES, TERM_WEIGHTS
from utils.distillation.presets import DensePreset
from utils.distributed import is_distributed
from utils.losses.detection import LossGains, global_normaliser, level_balance
from utils.losses.terms import differentiated_at_once


@dataclass(frozen=True)
class ResponseGains:
    """Weights of the three terms, relative to the ground-truth loss's gains of the same name.

    The defaults are for many classes: the class term's gradient is about as strong as that of the labels, the
    box term's a quarter. Boxes make up nearly all of a network's gradient: with more of it from the teacher
    than from the labels, many classes are learnt more slowly than without a teacher. See
    docs/experiments.md.
    """

    box: float = TERM_WEIGHTS["box"][1]
    obj: float = TERM_WEIGHTS["obj"][1]
    cls: float = TERM_WEIGHTS["cls"][1]

    @classmethod
    def for_classes(cls, count: int) -> ResponseGains:
        """Return the default weights for a number of classes."""
        return (
            cls(**{name: few for name, (few, _) in TERM_WEIGHTS.items()}) if count <= FEW_CLASSES else cls()
        )


@dataclass(frozen=True)
class Cells:
    """Raw outputs of both networks, float32, of one level or all of them.

    student, teacher: (..., 5 + K). anchors: the student's in grid units, broadcastable to (..., 2).
    share: the weight of each cell in the objectness term, broadcastable to (...).
    """

    student: Tensor
    teacher: Tensor
    anchors: Tensor
    share: Tensor | float


class Response(DensePreset):
    """Class and box terms weighted by the teacher's objectness, objectness everywhere (preset `response`).

    cls: (1/W) sum w mean_k |sigmoid(z_T) - sigmoid(z_S)| BCE(z_S, sigmoid(z_T)).
    box: (1/W) sum w (1 - CIoU(b_S, b_T)).
    obj: the mean over each level, with the level weights of the ground-truth loss, of
        |sigmoid(o_T) - sigmoid(o_S)| BCE(o_S, sigmoid(o_T)).

    Normalised by the teacher's total objectness rather than the number of cells, a term is as strong as its
    counterpart in the ground-truth loss. The objectness term is not weighted by the teacher's objectness:
    otherwise the student's false positives would hardly be penalised.

    Where both sides agree exactly, loss and gradient are 0, but close to it the gradient does not fade: like
    an L1 loss, each factor |sigmoid(T) - sigmoid(S)| and 1 - CIoU have a kink there.

    Source: Yang et al., Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object
    Detection (arXiv 2308.14286), eq. 4 to 7; the factor on a cross-entropy is that of Li et al.,
    Generalized Focal Loss (arXiv 2006.04388), eq. 3.
    """

    def __init__(
        self,
        gains: LossGains,
        anchors_grid: Tensor,
        term_weights: ResponseGains = ResponseGains(),  # noqa: B008
        *,
        balance: Sequence[float] | None = None,
        complete: bool = True,
    ) -> None:
        """`gains` as applied by the ground-truth loss; `anchors_grid` (levels, A, 2) of the student.

        balance: weights of the levels' objectness; None for the default of a head with these levels.
        complete: whether the teacher knows all classes of the data. If not, its background may be an
        object, and objectness is weighted by the teacher's.
        """
        self.box, self.obj, self.cls = (
            gains.box * term_weights.box,
            gains.obj * term_weights.obj,
            gains.cls * term_weights.cls,
        )
        self.anchors_grid = anchors_grid.detach().float()
        self.balance = level_balance(len(anchors_grid)) if balance is None else tuple(balance)
        self.complete = complete
        self.concatenate_levels: bool | None = None  # None: on a GPU only
        self._constants: dict[Any, tuple[Tensor, Tensor]] = {}

    def shared(self, teacher_levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the normaliser if it is a sum over ranks; in a single process `terms` has all it takes."""
        if not is_distributed():
            return ()
        weights = [level[..., 4].float().sigmoid().sum() for level in teacher_levels]
        return (global_normaliser(torch.stack(weights).sum(), len(teacher_levels[0])),)

    def terms(
        self, student_levels: Sequence[Tensor], teacher_levels: Sequence[Tensor], *shared: Tensor
    ) -> dict[str, Tensor]:
        """Return the three terms, float32 scalars."""
        box, obj, cls, total_weight = torch.zeros(4, device=student_levels[0].device).unbind()
        for cells in self._cells(student_levels, teacher_levels):
            parts = (4, 1, cells.student.shape[-1] - 5)
            # Split, not sliced: its backward pass fills one gradient tensor of all outputs instead of three.
            student_box, student_obj, student_cls = cells.student.split_with_sizes(parts, -1)
            teacher_box, teacher_obj, teacher_cls = cells.teacher.split_with_sizes(parts, -1)
            weight = teacher_obj[..., 0].sigmoid()
            total_weight = total_weight + weight.sum()
            box_sum = partial(self.box_sum, teacher=teacher_box, anchors=cells.anchors, weight=weight)
            box = box + differentiated_at_once(box_sum, student_box)
            cls = cls + self.class_sum(student_cls, teacher_cls, weight)
            obj = obj + self.objectness_sum(student_obj, teacher_obj, cells.share)
        if shared:
            (total_weight,) = shared
        else:
            total_weight = global_normaliser(total_weight, len(student_levels[0]), over_ranks=False)
        return {
            "box": box / total_weight * self.box,
            "obj": obj * self.obj,
            "cls": cls / total_weight * self.cls,
        }

    def class_sum(self, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted sum of the class loss from logits (..., K) and weights (...)."""
        return focused_cross_entropy(student, teacher, weight / student.shape[-1])

    def objectness_sum(self, student: Tensor, teacher: Tensor, share: Tensor | float) -> Tensor:
        """Return the sum of the objectness loss, weighted by `share`, from logits (..., 1)."""
        counts = torch.ones_like(teacher) if self.complete else teacher.sigmoid()
        return focused_cross_entropy(student, teacher, counts[..., 0] * share)

    def box_sum(self, student: Tensor, teacher: Tensor, anchors: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted sum of the box loss from raw boxes (..., 4), anchors (..., 2) and weights."""
        return (self.box_distance(student, teacher, anchors) * weight).sum()

    def box_distance(self, student: Tensor, teacher: Tensor, anchors: Tensor) -> Tensor:
        """Return 1 - CIoU of each cell's boxes, (...), from raw boxes (..., 4) and anchors (..., 2)."""
        boxes = [boxes_cxcywh_grid(raw, anchors) for raw in (student, teacher)]
        return 1 - aligned_iou(boxes[0], boxes[1], "ciou")

    def _cells(self, student_levels: Sequence[Tensor], teacher_levels: Sequence[Tensor]) -> Iterator[Cells]:
        """Yield the cells of each level, or on a GPU those of all levels together.

        On a GPU the number of kernels is what costs, on a CPU the memory traffic.
        """
        concatenated = (
            student_levels[0].device.type != "cpu"
            if self.concatenate_levels is None
            else self.concatenate_levels
        )
        if concatenated:
            grids = tuple(level.shape[1:-1] for level in student_levels)
            if grids not in self._constants:
                self._constants = {grids: self._constants_of(grids, student_levels[0].device)}
            anchors, shares = self._constants[grids]
            rows = [
                torch.cat([_rows(level.float()) for level in levels], 1)
                for levels in (student_levels, teacher_levels)
            ]
            yield Cells(rows[0], rows[1], anchors, shares / len(student_levels[0]))
            return
        for anchors, balance, student, teacher in zip(
            self.anchors_grid, self.balance, student_levels, teacher_levels, strict=True
        ):
            share = balance / student[..., 0].numel()
            yield Cells(student.float(), teacher.float(), anchors.to(student.device)[:, None, None], share)

    def _constants_of(self, grids: tuple[torch.Size, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return anchors (N, 2) and objectness shares (N,) of an image's cells, from (A, H, W) of all levels.

        Independent of the batch size: a captured CUDA graph may use them, so a smaller last batch must not
        replace them.
        """
        cells = [grid.numel() for grid in grids]
        anchors = [
            level_anchors.to(device).repeat(count // len(level_anchors), 1)
            for level_anchors, count in zip(self.anchors_grid, cells, strict=True)
        ]
        shares = [
            torch.full((n,), weight / n, device=device) for n, weight in zip(cells, self.balance, strict=True)
        ]
        return torch.cat(anchors), torch.cat(shares)


def _rows(maps: Tensor) -> Tensor:
    """Flatten maps (B, A, H, W, K) or (B, A, H, W) to (B, N, ...) in memory order: cells before anchors."""
    return maps.movedim(1, 3).flatten(1, 3)


# Elements per chunk: on a CPU such that the intermediates stay in a core's cache, on a GPU such that they
# leave the memory to the networks.
CPU_CHUNK, GPU_CHUNK = 1 << 16, 1 << 23


class _FocusedCrossEntropy(torch.autograd.Function):
    """Focused cross-entropy with value and gradient computed together, in chunks that fit into the cache.

    With autograd a dozen passes over all cells and classes go through main memory, which on a CPU costs
    more than the rest of the loss.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_logits: Tensor, weight: Tensor) -> Tensor:
        """Return the sum of w |p_T - p_S| BCE(p_S, p_T) over rows (n, K) with weights (n,)."""
        slope = torch.empty(logits.shape, device=logits.device)
        chunk = CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK
        rows = max(chunk // logits.shape[1], 1)
        total = torch.zeros((), device=logits.device)
        parts = (torch.split(x, rows) for x in (logits, target_logits, weight, slope))
        for z, target, w, out in zip(*parts, strict=True):
            total += _focused_part(z, target.sigmoid(), w[:, None], out)
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the student's logits; the other inputs get none."""
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None, None


def _focused_part(z: Tensor, p_t: Tensor, weight: Tensor, slope: Tensor) -> Tensor:
    """Return the weighted sum for logits (n, K) and probabilities p_T; write its gradient to `slope`."""
    p_s = z.sigmoid()
    rest = 1 - p_s
    # BCE = softplus(z) - z p_T; with softplus(z) = max(z, 0) - log(max(p_S, 1 - p_S)) it takes one logarithm.
    entropy = torch.maximum(p_s, rest).log_().neg_().add_(z.clamp(min=0)).addcmul_(z, p_t, value=-1)
    difference = p_s - p_t
    distance = difference.abs()
    # d|p_S - p_T| / dz BCE + |p_S - p_T| dBCE / dz; the latter is p_S - p_T.
    torch.mul(p_s, rest, out=slope)
    slope.mul_(difference.sign()).mul_(entropy).addcmul_(distance, difference).mul_(weight)
    return distance.mul_(entropy).mul_(weight).sum()


def focused_cross_entropy(logits: Tensor, target_logits: Tensor, weight: Tensor) -> Tensor:
    """Return the sum of w |p_T - p_S| BCE(p_S, p_T) over cells and classes, float32; 0 where both agree.

    logits, target_logits: (..., K) in any memory order; weight: (...).
    """
    student, teacher, weights = logits.float(), target_logits.float(), weight.detach()
    if logits.dim() == 5:  # flattening in (A, H, W) order would copy
        student, teacher, weights = _rows(student), _rows(teacher), _rows(weights)
    value: Tensor = _FocusedCrossEntropy.apply(
        student.reshape(-1, student.shape[-1]), teacher.reshape(-1, student.shape[-1]), weights.reshape(-1)
    )
    return value
