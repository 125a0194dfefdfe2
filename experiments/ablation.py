"""`train_distill.py` with one cause of a weak distillation put back: the first word names it.

    python -m experiments.ablation softmax --teacher teacher.pt --distill-loss response ...

The causes are those of the first public distillation scripts for YOLOv5; docs/why-distillation-failed.md
shows what each one costs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from models.checkpoint import build_model, read_checkpoint
from models.places import resolve_weights
from utils.batch import Batch, StudentOutput
from utils.config.cli import run
from utils.config.options import DistillOptions
from utils.distillation.distiller import Distiller
from utils.distillation.recipe import distillation_recipe
from utils.distillation.response import Response, focused_cross_entropy
from utils.distillation.teacher import Teacher, TeacherOutput
from utils.losses.recipe import Loss, LossContext, LossRecipe
from utils.losses.terms import softmax_divergence
from utils.training.start import run_training


class AllCells(Response):
    """Class and box terms averaged over all cells, of which a few in a thousand contain an object."""

    def __call__(self, batch: Batch, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the three loss terms, float32 scalars."""
        terms = super().__call__(batch, student, teacher)
        objectness = [level[..., 4] for level in teacher.levels]
        seen = sum(float(level.sigmoid().sum()) for level in objectness)
        part = max(seen, 1.0) / sum(level.numel() for level in objectness)
        return {"box": terms["box"] * part, "obj": terms["obj"], "cls": terms["cls"] * part}


class Softmax(Response):
    """Classes compared by KL of softmax at temperature 20, which is invariant to a common shift."""

    def class_sum(self, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted class loss, summed over all cells."""
        return (softmax_divergence(student, teacher, 20.0) * weight).sum() / student.shape[-1]


class Gated(Response):
    """Objectness weighted by the teacher's: the student's false positives cost nothing."""

    def objectness_sum(self, student: Tensor, teacher: Tensor, share: Tensor | float) -> Tensor:
        """Return the objectness loss, summed over all cells."""
        return focused_cross_entropy(student, teacher, teacher[..., 0].sigmoid() * share)


class RawBoxes(Response):
    """Boxes compared by the squared error of the raw outputs."""

    def box_distance(self, student: Tensor, teacher: Tensor, anchors: Tensor) -> Tensor:
        """Return the box loss of each cell."""
        return (student - teacher).square().mean(-1)


class ConstantFactor(Response):
    """The factor |p_T - p_S| is treated as a constant: no cause of weakness, a variant to compare with.

    With the factor's own gradient the loss has a kink where both agree, like an L1 loss.
    """

    def class_sum(self, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted class loss, summed over all cells."""
        return weighted_by_difference(student, teacher, weight[..., None] / student.shape[-1])

    def objectness_sum(self, student: Tensor, teacher: Tensor, share: Tensor | float) -> Tensor:
        """Return the objectness loss, summed over all cells."""
        shares = torch.as_tensor(share, device=student.device)[..., None]
        return weighted_by_difference(student, teacher, shares)


def weighted_by_difference(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Return the sum of the cross-entropy of logits, weighted also by the difference of probabilities."""
    target = teacher.sigmoid()
    factor = (student.detach().sigmoid() - target).abs() * weight
    return (factor * F.binary_cross_entropy_with_logits(student, target, reduction="none")).sum()


class TrainingMode(Teacher):
    """A teacher in training mode, whose batch norms use and update batch statistics."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TeacherOutput:
        """Run the forward pass on a batch."""
        self.model.train()
        levels = self.model.forward_head(self.model.forward_features(images))
        return TeacherOutput(self.fit.of_teacher(levels))


def in_training_mode(distiller: Distiller, context: LossContext) -> None:
    """Replace the teacher by an unfused one in training mode."""
    (member,) = distiller.teachers.members
    loaded = build_model(read_checkpoint(resolve_weights(str(member.source)))).to(context.device)
    teacher = TrainingMode(loaded, member.source, frozen=False)
    teacher.fit_to(context.model, context.names)
    distiller.teachers.members[0] = teacher


def replaced_by(kind: type[Response]) -> Callable[[Distiller, LossContext], None]:
    """Return a function that replaces the preset by a weaker variant with the same settings."""

    def exchange(distiller: Distiller, _context: LossContext) -> None:
        assert type(distiller.preset) is Response, "give --distill-loss response"
        distiller.preset.__class__ = kind

    return exchange


CAUSES: dict[str, Callable[[Distiller, LossContext], None]] = {
    "training-mode": in_training_mode,
    "all-cells": replaced_by(AllCells),
    "softmax": replaced_by(Softmax),
    "gated": replaced_by(Gated),
    "raw-boxes": replaced_by(RawBoxes),
    "constant-factor": replaced_by(ConstantFactor),
}


def recipe_with(cause: str, options: DistillOptions) -> LossRecipe:
    """Return the loss recipe of the options, with the cause put back."""
    whole = distillation_recipe(options)

    def recipe(context: LossContext) -> Sequence[Loss]:
        losses = whole(context)
        CAUSES[cause](cast(Distiller, losses[-1]), context)
        return losses

    return recipe


def main() -> int:
    """Train and return the exit code."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(f"{__doc__}\ncauses: {', '.join(CAUSES)}; then the options of train_distill.py")
        return 0
    cause = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if cause not in CAUSES:
        print(f"error: the first word must be one of {', '.join(CAUSES)}", file=sys.stderr)
        return 2

    def train(options: DistillOptions) -> None:
        run_training(options, lambda resumed: recipe_with(cause, resumed))

    return run(DistillOptions, train, __doc__)


if __name__ == "__main__":
    sys.exit(main())
