"""Ensembles of teachers."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.yolo import Model
from utils.config.options import OWN_AVERAGE
from utils.distillation.teacher import Teacher, TeacherOutput
from utils.errors import UserError
from utils.words import listed

_EPS = 1e-6


class Teachers:
    """One or more teachers, at the levels and for the classes that all of them share with the student.

    fit: which of the student's outputs are compared. class_count: of the data. note: a message about the
    common classes if not all teachers know the same ones.
    """

    def __init__(
        self, members: Sequence[Teacher], student: Model, names: Sequence[str], merged: Sequence[str] = ()
    ) -> None:
        """`names` are the data's classes, `merged` those that are merged into one for the student.

        Raises UserError if a teacher does not fit the student, or if they share no level.
        """
        self.members, self.class_count = list(members), len(names)
        for member in self.members:
            member.fit_to(student, names, merged=merged)
        data_names = merged or names
        known = [member.known_of(data_names, is_one=bool(merged)) for member in self.members]
        common, self.note = set.intersection(*known), ""
        if any(classes != common for classes in known):
            lost = [name for number, name in enumerate(data_names) if number not in common]
            if common:
                in_common = f"{len(common)} of {len(data_names)} classes are known to all of them"
                what = "unknown" if merged else "no class term for"
                self.note = f"the teachers together: {in_common}; {what} {listed(lost)}"
            for member in self.members:
                member.fit_to(student, names, common, merged)
        levels = [{pair.student for pair in member.fit.levels} for member in self.members]
        shared = set.intersection(*levels)
        if not shared:
            fix = "leave one out, or take --teacher-img-size away"
            raise UserError("they have no level of the student in common", self.source, fix)
        for member in self.members:
            member.fit = member.fit.at(shared)
        # A class unknown to any teacher may appear as background in the ensemble's output.
        partial = (member.fit for member in self.members if member.fit.classes.unknown)
        self.fit = next(partial, self.members[0].fit)

    @property
    def source(self) -> str:
        """The sources of all teachers, for messages."""
        return " and ".join(str(member.source) for member in self.members)

    @property
    def ignorance(self) -> str:
        """The message for the case that data and teachers have no class in common."""
        if len(self.members) == 1:
            return f"{self.source} knows none of the data's classes"
        return f"{self.source} have no class of the data in common"

    def __call__(self, images: Tensor) -> tuple[TeacherOutput, list[TeacherOutput]]:
        """Return the ensemble's output for images (B, 3, H, W) and that of each teacher; one forward each."""
        each = [member(images) for member in self.members]
        if len(each) == 1:
            return each[0], each
        return TeacherOutput(
            tuple(mean_level(views) for views in zip(*(o.levels for o in each), strict=True))
        ), each

    def checksums(self) -> list[str]:
        """Return the checksum of each teacher, or a fixed word if it is not frozen."""
        return [member.identity if member.is_frozen else OWN_AVERAGE for member in self.members]

    def assert_unchanged(self) -> None:
        """Raise AssertionError if a weight of a frozen teacher has changed."""
        for member in self.members:
            member.assert_unchanged()


def mean_level(levels: Sequence[Tensor]) -> Tensor:
    """Average the raw levels (B, A, H, W, 5 + C) of several teachers, relative to the same anchors, to one.

    Objectness and classes are means of probabilities. Boxes are means of decoded centres and sizes, weighted
    by each teacher's objectness: one that sees nothing there does not affect the box.
    """
    stacked = torch.stack([level.float() for level in levels])
    weight = stacked[..., 4:5].sigmoid().clamp(min=1e-12)
    weight = weight / weight.sum(0)
    half = stacked[..., :4].sigmoid()
    centres = (half[..., :2] * weight).sum(0)
    # Decoded width and height are proportional to the square of the sigmoid.
    sizes = (half[..., 2:4].square() * weight).sum(0).sqrt()
    boxes = torch.cat((centres, sizes), -1).clamp(_EPS, 1 - _EPS).logit()
    return torch.cat((boxes, mean_probability(stacked[..., 4:])), -1).to(_widest(levels))


def _widest(levels: Sequence[Tensor]) -> torch.dtype:
    """Return the promoted dtype of the levels, as teachers may compute in different precisions."""
    return functools.reduce(torch.promote_types, (level.dtype for level in levels))


def mean_probability(logits: Tensor) -> Tensor:
    """Return the logit of the mean of sigmoid(logits) over dimension 0, accurate for extreme logits too."""
    return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)
