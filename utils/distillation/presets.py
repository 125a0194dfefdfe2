"""Losses between the outputs of student and teacher.

Shapes: B images, A anchors, H W grid, K classes, N predictions of an image, M targets, P pairs.
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
    """A way to compare outputs: named, weighted float32 scalars."""

    names: tuple[str, ...]

    def __call__(self, batch: Batch, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """The terms for one batch.

        A preset may have `ahead(batch, teacher)`, which gives the rest: from the student's output to the
        terms. What it asks of a GPU is done beside the student's pass, and may be waited for.
        """
        ...


def ahead_of(preset: Preset, batch: Batch, teacher: TeacherOutput) -> Terms:
    """What a preset makes of the teacher's answer alone; gives the rest."""
    ahead = getattr(preset, "ahead", None)
    if ahead is None:
        return lambda student: preset(batch, student, teacher)
    return cast(Terms, ahead(batch, teacher))


class DensePreset(ABC):
    """A preset that compares all outputs of both networks, whatever they are.

    Outputs are raw levels of student and teacher, (B, A, H_l, W_l, 5 + K) each.
    """

    names: tuple[str, ...] = ("box", "obj", "cls")
    _replayed: TermsOfTensors | None = None

    def __call__(self, batch: Batch, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """The three terms, float32 scalars."""
        if self._replayed is None:
            return self.terms(student.levels, teacher.levels)
        values = self._replayed(student.levels, teacher.levels).unbind()
        return dict(zip(self.names, values, strict=True))

    @abstractmethod
    def terms(self, own: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, Tensor]:
        """The three terms of raw levels, float32 scalars."""

    def replay_terms(self, replayed: Callable[[TermsOfTensors], TermsOfTensors]) -> None:
        """Lets the terms be worked out as `replayed` makes it."""

        def in_order(own: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
            terms = self.terms(own, other)
            return torch.stack([terms[name] for name in self.names])

        self._replayed = replayed(in_order)


class DenseOutputs(DensePreset):
    """Every cell's raw outputs pulled towards the teacher's, weighted by w (presets `l2` and `kl`).

    Per level the mean over all cells of w times the squared error of box and objectness logits and,
    for the classes, their squared error or KL(softmax(z_T/T) || softmax(z_S/T)) T^2 / K.

    Source: the public distillation scripts for YOLOv5; Hinton et al. (arXiv 1503.02531).
    """

    def __init__(self, gains: LossGains, class_loss: Literal["l2", "kl"], temperature: float) -> None:
        """`gains` as applied by the ground-truth loss; `temperature` is that of the KL."""
        self.gains, self.class_loss, self.temperature = gains, class_loss, temperature

    def terms(self, own: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, Tensor]:
        """The three terms, each a mean over cells, summed over levels."""
        box, obj, cls = torch.zeros(3, device=own[0].device).unbind()
        for mine, theirs in zip(own, other, strict=True):
            level, target = mine.float(), theirs.float()
            weight = target[..., 4].sigmoid()
            error = (level[..., :5] - target[..., :5]).square()
            box = box + (error[..., :4].mean(-1) * weight).mean()
            obj = obj + (error[..., 4] * weight).mean()
            cls = cls + (self.classes(level[..., 5:], target[..., 5:]) * weight).mean()
        return {"box": box * self.gains.box, "obj": obj * self.gains.obj, "cls": cls * self.gains.cls}

    def classes(self, own: Tensor, target: Tensor) -> Tensor:
        """The class loss of each cell, (B, A, H, W), from logits (B, A, H, W, K)."""
        if self.class_loss == "kl":
            return softmax_divergence(own, target, self.temperature) / own.shape[-1]
        return (own - target).square().mean(-1)


class ObjectnessGated(DensePreset):
    """Box and class outputs count where the teacher sees an object (preset `objectness`).

    Per level the mean over all cells of w times the squared error of raw boxes and class logits, and
    the ungated squared error of the objectness probabilities.

    Source: Mehta and Ozturk, Object Detection at 200 Frames Per Second (arXiv 1805.06361), eq. 3-5.
    """

    def __init__(self, gains: LossGains, *, complete: bool = True) -> None:
        """`gains` as applied by the ground-truth loss.

        complete: whether the teacher knows all classes of the data. If not, what it calls background
        may be an object, and objectness is gated like the rest.
        """
        self.gains, self.complete = gains, complete

    def terms(self, own: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, Tensor]:
        """The three terms, each a mean over cells, summed over levels."""
        box, obj, cls = torch.zeros(3, device=own[0].device).unbind()
        for mine, theirs in zip(own, other, strict=True):
            level, target = mine.float(), theirs.float()
            weight = target[..., 4].sigmoid()
            box = box + ((level[..., :4] - target[..., :4]).square().mean(-1) * weight).mean()
            objectness = (level[..., 4].sigmoid() - weight).square()
            obj = obj + (objectness if self.complete else objectness * weight).mean()
            cls = cls + ((level[..., 5:] - target[..., 5:]).square().mean(-1) * weight).mean()
        return {"box": box * self.gains.box, "obj": obj * self.gains.obj, "cls": cls * self.gains.cls}


class PseudoBoxes:
    """The teacher's detections become extra targets (preset `boxes`).

    Box and objectness losses are those for the ground truth; the class loss compares the student's
    class logits at the matched cells with the logits of the teacher's detection: squared error, or
    KL of tempered softmax (`soft`).
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
        """`confidence` and `overlap` are the teacher's NMS limits.

        detection: the ground-truth loss of the levels and classes that are compared. decode: from the
        teacher's raw levels to predictions (B, N, 5 + C) in px.
        """
        self.detection, self.decode = detection, decode
        self.rules = NmsRules(conf_thres=confidence, iou_thres=overlap)
        self.soft, self.temperature = soft, temperature

    def __call__(self, batch: Batch, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """The three terms of the ground-truth loss, against the teacher's detections."""
        return self.ahead(batch, teacher)(student)

    def ahead(self, batch: Batch, teacher: TeacherOutput) -> Terms:
        """Finds the detections, for whose number a GPU has to be waited for; gives the rest."""
        targets, logits = self.pseudo_targets(batch, teacher)
        # In main memory, as the labels: elsewise each level would wait for the number of its pairs.
        here, everywhere = targets.cpu(), torch.ones_like(batch.labelled)

        def against_teacher(own: Tensor, pairs: Pairs) -> Tensor:
            wanted = logits[pairs.target]
            if self.soft:
                return softmax_divergence(own, wanted, self.temperature)[:, None]
            return F.mse_loss(own, wanted, reduction="none")

        return lambda student: self.detection.terms(here, student.levels, everywhere, against_teacher)

    @torch.no_grad()
    def pseudo_targets(self, batch: Batch, teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
        """Targets (M, 6) like a batch's own, and the class logits (M, K) of each detection."""
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
