"""Losses between the outputs of student and teacher.

Shapes: B images, A anchors, H W grid, K classes, N predictions per image, M targets, P pairs.
Notation: o objectness logit, z class logits, b raw box; S student, T teacher; w = sigmoid(o_T).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.batch import Batch, StudentOutput
from utils.boxes import NmsRules, suppress, xyxy_to_cxcywh
from utils.distillation.teacher import TeacherOutput
from utils.losses.assignment import Pairs
from utils.losses.detection import DetectionLoss, LossGains
from utils.losses.recipe import Terms
from utils.losses.terms import TermsOfTensors, softmax_divergence


class Preset(Protocol):
    """A loss between the outputs of student and teacher: named, weighted float32 scalars."""

    names: tuple[str, ...]

    def __call__(self, batch: Batch, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the terms for a batch.

        A preset may have `ahead(batch, teacher)`, which returns a function from the student's output to the
        terms. Its GPU work overlaps with the student's forward pass, and it may synchronise.
        """
        ...


def ahead_of(preset: Preset, batch: Batch, teacher: TeacherOutput) -> Terms:
    """Do the part of a preset that needs only the teacher's output; return the function for the rest."""
    ahead = getattr(preset, "ahead", None)
    if ahead is None:
        return lambda student: preset(batch, student, teacher)
    return cast(Terms, ahead(batch, teacher))


class DensePreset(ABC):
    """A preset that compares all raw levels of student and teacher, (B, A, H_l, W_l, 5 + K) each."""

    names: tuple[str, ...] = ("box", "obj", "cls")
    _replayed: TermsOfTensors | None = None

    def __call__(self, batch: Batch, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the three terms, float32 scalars."""
        if self._replayed is None:
            return self.terms(student.levels, teacher.levels)
        values = self._replayed(student.levels, teacher.levels).unbind()
        return dict(zip(self.names, values, strict=True))

    @abstractmethod
    def terms(self, student_levels: Sequence[Tensor], teacher_levels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the three terms of raw levels, float32 scalars."""

    def replay_terms(self, replayed: Callable[[TermsOfTensors], TermsOfTensors]) -> None:
        """Wrap the computation of the terms in `replayed`."""

        def in_order(student_levels: Sequence[Tensor], teacher_levels: Sequence[Tensor]) -> Tensor:
            terms = self.terms(student_levels, teacher_levels)
            return torch.stack([terms[name] for name in self.names])

        self._replayed = replayed(in_order)


class DenseOutputs(DensePreset):
    """Raw outputs of every cell are compared with the teacher's, weighted by w (presets `l2` and `kl`).

    Per level the mean over all cells of w times the squared error of raw boxes and objectness logits and,
    for the classes, their squared error or KL(softmax(z_T/T) || softmax(z_S/T)) T^2 / K.

    Source: the public distillation scripts for YOLOv5; Hinton et al. (arXiv 1503.02531).
    """

    def __init__(self, gains: LossGains, class_loss: Literal["l2", "kl"], temperature: float) -> None:
        """`gains` as applied by the ground-truth loss; `temperature` is that of the KL divergence."""
        self.gains, self.class_loss, self.temperature = gains, class_loss, temperature

    def terms(self, student_levels: Sequence[Tensor], teacher_levels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the three terms, each a mean over cells, summed over levels."""
        box, obj, cls = torch.zeros(3, device=student_levels[0].device).unbind()
        for student_level, teacher_level in zip(student_levels, teacher_levels, strict=True):
            student, teacher = student_level.float(), teacher_level.float()
            weight = teacher[..., 4].sigmoid()
            error = (student[..., :5] - teacher[..., :5]).square()
            box = box + (error[..., :4].mean(-1) * weight).mean()
            obj = obj + (error[..., 4] * weight).mean()
            cls = cls + (self.classes(student[..., 5:], teacher[..., 5:]) * weight).mean()
        return {"box": box * self.gains.box, "obj": obj * self.gains.obj, "cls": cls * self.gains.cls}

    def classes(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the class loss of each cell, (B, A, H, W), from logits (B, A, H, W, K)."""
        if self.class_loss == "kl":
            return softmax_divergence(student, teacher, self.temperature) / student.shape[-1]
        return (student - teacher).square().mean(-1)


class ObjectnessGated(DensePreset):
    """Box and class terms are gated by the teacher's objectness (preset `objectness`).

    Per level the mean over all cells of w times the squared error of raw boxes and class logits, and
    the ungated squared error of the objectness probabilities.

    Source: Mehta and Ozturk, Object Detection at 200 Frames Per Second (arXiv 1805.06361), eq. 3-5.
    """

    def __init__(self, gains: LossGains, *, complete: bool = True) -> None:
        """`gains` as applied by the ground-truth loss.

        complete: whether the teacher knows all classes of the data. If not, its background may be an
        object, and objectness is gated like the rest.
        """
        self.gains, self.complete = gains, complete

    def terms(self, student_levels: Sequence[Tensor], teacher_levels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the three terms, each a mean over cells, summed over levels."""
        box, obj, cls = torch.zeros(3, device=student_levels[0].device).unbind()
        for student_level, teacher_level in zip(student_levels, teacher_levels, strict=True):
            student, teacher = student_level.float(), teacher_level.float()
            weight = teacher[..., 4].sigmoid()
            box = box + ((student[..., :4] - teacher[..., :4]).square().mean(-1) * weight).mean()
            objectness = (student[..., 4].sigmoid() - weight).square()
            obj = obj + (objectness if self.complete else objectness * weight).mean()
            cls = cls + ((student[..., 5:] - teacher[..., 5:]).square().mean(-1) * weight).mean()
        return {"box": box * self.gains.box, "obj": obj * self.gains.obj, "cls": cls * self.gains.cls}


class PseudoBoxes:
    """The teacher's detections serve as extra targets (preset `boxes`).

    Box and objectness losses are those of the ground-truth loss; the class loss compares the student's class
    logits at the assigned cells with the logits of the teacher's detection: squared error, or KL divergence
    of softmax with temperature (`soft`).
    """

    names: tuple[str, ...] = ("box", "obj", "cls")

    def __init__(
        self,
        detection: DetectionLoss,
        decode: Callable[[Sequence[Tensor]], Tensor],
        *,
        confidence: float,
        overlap: float,
        soft: bool,
        temperature: float,
    ) -> None:
        """`confidence` and `overlap` are the teacher's NMS thresholds.

        detection: the ground-truth loss for the compared levels and classes. decode: maps the teacher's raw
        levels to predictions (B, N, 5 + C) in px.
        """
        self.detection, self.decode = detection, decode
        self.rules = NmsRules(conf_thres=confidence, iou_thres=overlap)
        self.soft, self.temperature = soft, temperature

    def __call__(self, batch: Batch, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the three terms of the ground-truth loss against the teacher's detections."""
        return self.ahead(batch, teacher)(student)

    def ahead(self, batch: Batch, teacher: TeacherOutput) -> Terms:
        """Find the detections, which synchronises with the GPU; return a function that computes the terms."""
        targets, logits = self.pseudo_targets(batch, teacher)
        # On the CPU, like the labels: otherwise the number of pairs would need further synchronisation.
        here, everywhere = targets.cpu(), torch.ones_like(batch.labelled)

        def against_teacher(student_logits: Tensor, pairs: Pairs) -> Tensor:
            teacher_logits = logits[pairs.target]
            if self.soft:
                return softmax_divergence(student_logits, teacher_logits, self.temperature)[:, None]
            return F.mse_loss(student_logits, teacher_logits, reduction="none")

        return lambda student: self.detection.terms(here, student.levels, everywhere, against_teacher)

    @torch.no_grad()
    def pseudo_targets(self, batch: Batch, teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
        """Return targets (M, 6) as in `Batch.targets`, and the class logits (M, K) of each detection."""
        levels = tuple(level.float() for level in teacher.levels)
        decoded = self.decode(levels)
        kept = suppress(decoded, self.rules)
        height, width = batch.images.shape[2:]
        image = torch.cat([k.rows.new_full((len(k.rows),), i) for i, k in enumerate(kept)])
        detections = torch.cat([k.detections for k in kept])
        x, y, w, h = xyxy_to_cxcywh(detections[:, :4]).unbind(1)
        boxes = (x / width, y / height, w / width, h / height)
        targets = torch.stack((image.to(x), detections[:, 5], *boxes), 1)
        raw = torch.cat([level.flatten(1, 3) for level in levels], 1)
        return targets, raw[image, torch.cat([k.rows for k in kept]), 5:]
