"""Losses between the outputs of student and teacher.

Shapes: B images, A anchors, H W grid, K classes.
Notation: o objectness logit, z class logits, b raw box; S student, T teacher; w = sigmoid(o_T).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from utils.batch import Batch, StudentOutput
from utils.distillation.teacher import TeacherOutput
from utils.losses.detection import LossGains
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

    def replay_terms(self, replayed: Callable[[TermsOfTensors], TermsOfTensors]) -> None:
        """Wrap the computation of the terms in `replayed`."""
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
        shared = self.shared(teacher.levels)
        if self._replayed is None:
            return self.terms(student.levels, teacher.levels, *shared)
        values = self._replayed(student.levels, (*teacher.levels, *shared)).unbind()
        return dict(zip(self.names, values, strict=True))

    def shared(self, teacher_levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return what the terms need from other ranks, which cannot be exchanged within a CUDA graph."""
        return ()

    @abstractmethod
    def terms(
        self, student_levels: Sequence[Tensor], teacher_levels: Sequence[Tensor], *shared: Tensor
    ) -> dict[str, Tensor]:
        """Return the three terms of raw levels, float32 scalars; `shared` as from the method."""

    def replay_terms(self, replayed: Callable[[TermsOfTensors], TermsOfTensors]) -> None:
        """Wrap the computation of the terms in `replayed`."""

        def in_order(student_levels: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
            count = len(student_levels)
            terms = self.terms(student_levels, others[:count], *others[count:])
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

    def terms(
        self, student_levels: Sequence[Tensor], teacher_levels: Sequence[Tensor], *shared: Tensor
    ) -> dict[str, Tensor]:
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

    def terms(
        self, student_levels: Sequence[Tensor], teacher_levels: Sequence[Tensor], *shared: Tensor
    ) -> dict[str, Tensor]:
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
