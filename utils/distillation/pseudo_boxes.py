"""The teacher's detections as extra targets for the student.

Shapes: B images, K classes, N predictions per image, M targets, P pairs of a cell's anchor and a target.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decode import decode, decode_best
from utils.batch import Batch, StudentOutput
from utils.boxes import MOST_OF_BEST, Kept, NmsRules, suppress, suppress_best, xyxy_to_cxcywh
from utils.device import to_device
from utils.distillation.teacher import TeacherOutput
from utils.losses.assignment import Pairs
from utils.losses.detection import AssignedTargets, DetectionLoss
from utils.losses.recipe import Terms
from utils.losses.terms import TermsOfTensors, softmax_divergence


class PseudoBoxes:
    """The teacher's detections serve as extra targets (preset `boxes`).

    Box and objectness losses are those of the ground-truth loss; the class loss compares the student's class
    logits at the assigned cells with the logits of the teacher's detection: squared error, or KL divergence
    of softmax with temperature (`soft`).

    On a GPU a step waits once, for the candidates of all images: NMS and assignment have results of varying
    size. They are found in main memory while the student's forward pass is computed.
    """

    names: tuple[str, ...] = ("box", "obj", "cls")

    def __init__(
        self,
        detection: DetectionLoss,
        strides: Tensor,
        *,
        confidence: float,
        overlap: float,
        soft: bool,
        temperature: float,
    ) -> None:
        """`confidence` and `overlap` are the teacher's NMS thresholds.

        detection: the ground-truth loss for the compared levels and classes. strides: (L,) of these levels,
        in px.
        """
        self.detection, self.strides = detection, strides
        self.anchors_px = detection.anchors_grid * strides.view(-1, 1, 1).to(detection.anchors_grid)
        self.rules = NmsRules(conf_thres=confidence, iou_thres=overlap)
        self.soft, self.temperature = soft, temperature
        self._replayed: TermsOfTensors | None = None

    def __call__(self, batch: Batch, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the three terms of the ground-truth loss against the teacher's detections."""
        return self.ahead(batch, teacher)(student)

    def ahead(self, batch: Batch, teacher: TeacherOutput) -> Terms:
        """Find and assign the detections, which waits for a GPU; return the function for the rest."""
        targets, rows = self.pseudo_targets(batch, teacher)
        everywhere = torch.ones_like(batch.labelled)
        # Their number varies: padded, they make few kinds of tensors, each of which may be a CUDA graph.
        assigned = self.detection.assign(targets, teacher.levels, everywhere, padded=True)
        given = (*assigned.tensors(), logits_of(teacher.levels, assigned, rows))
        compare = self._compared if self._replayed is None else self._replayed
        return lambda student: dict(zip(self.names, compare(student.levels, given).unbind(), strict=True))

    def replay_terms(self, replayed: Callable[[TermsOfTensors], TermsOfTensors]) -> None:
        """Wrap the computation after the assignment in `replayed`."""
        # On a copy: constants in a captured CUDA graph must not be replaced.
        snapshot = copy.copy(self)
        snapshot.detection = copy.copy(self.detection)
        self._replayed = replayed(snapshot._compared)

    def _compared(self, levels: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """Return the terms (3,) of the student's levels; tensors: the assigned targets and their logits."""
        *assigned, teacher_logits = tensors

        def against_teacher(student_logits: Tensor, _: Pairs) -> Tensor:
            if self.soft:
                return softmax_divergence(student_logits, teacher_logits, self.temperature)[:, None]
            return F.mse_loss(student_logits, teacher_logits, reduction="none")

        terms = self.detection.compare(levels, AssignedTargets.of(assigned, len(levels)), against_teacher)
        return torch.stack([terms[name] for name in self.names])

    @torch.no_grad()
    def pseudo_targets(self, batch: Batch, teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
        """Return targets (M, 6) as in `Batch.targets`, and the teacher's row (M,) of each, in main memory."""
        kept = [Kept(*(values.cpu() for values in one)) for one in self._detections(teacher.levels)]
        height, width = batch.images.shape[2:]
        counts = torch.tensor([len(one.rows) for one in kept])
        image = torch.arange(len(kept)).repeat_interleave(counts)
        detections = torch.cat([one.detections for one in kept])
        boxes = xyxy_to_cxcywh(detections[:, :4]) / torch.tensor([width, height, width, height])
        targets = torch.cat((image[:, None].to(boxes), detections[:, 5:], boxes), 1)
        return targets, torch.cat([one.rows for one in kept])

    def _detections(self, levels: Sequence[Tensor]) -> list[Kept]:
        """Return the detections of each image, mostly in main memory."""
        best = decode_best(levels, self.anchors_px, self.strides, MOST_OF_BEST).cpu()
        kept = suppress_best(best, sum(level[0, ..., 0].numel() for level in levels), self.rules)
        return suppress(decode(levels, self.anchors_px, self.strides), self.rules) if kept is None else kept


@torch.no_grad()
def logits_of(levels: Sequence[Tensor], assigned: AssignedTargets, rows: Tensor) -> Tensor:
    """Return the teacher's class logits (P, K) for each pair's target, float32; zeros for padding.

    levels: the teacher's, (B, A, H, W, 5 + K). assigned: padded. rows: (M,) of the targets' predictions, in
    main memory.
    """
    pairs, mask = assigned.pairs, assigned.mask
    assert mask is not None
    logits = torch.cat([level[..., 5:].flatten(1, 3) for level in levels], 1)
    # Padding has target 0, which need not exist.
    row = to_device(torch.cat((rows, rows.new_zeros(1))), logits.device)[pairs.target]
    picked = logits[pairs.image, row].float()
    # Those of padding may be infinite, and 0 * inf is NaN.
    return torch.where(mask[:, None] > 0, picked, 0.0)
