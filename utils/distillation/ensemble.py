"""Several teachers that speak with one voice."""

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
    """One teacher or more, at the levels and for the classes that all of them share with the student.

    fit: how the student's side is read. class_count: of the data. note: which classes are taught, in a
    sentence, where not all of them know the same.
    """

    def __init__(
        self, members: Sequence[Teacher], student: Model, names: Sequence[str], merged: Sequence[str] = ()
    ) -> None:
        """`names` are the data's classes, `merged` those that are one for the student.

        Raises UserError where one of them does not fit the student, or where they share no level.
        """
        self.members, self.class_count = list(members), len(names)
        for member in self.members:
            member.fit_to(student, names, merged=merged)
        wanted = merged or names
        known = [member.known_of(wanted, is_one=bool(merged)) for member in self.members]
        common, self.note = set.intersection(*known), ""
        if any(own != common for own in known):
            lost = [name for number, name in enumerate(wanted) if number not in common]
            if common:
                in_common = f"{len(common)} of {len(wanted)} classes are known to all of them"
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
        # What any of them does not know may be background to all of them together.
        partial = (member.fit for member in self.members if member.fit.classes.unknown)
        self.fit = next(partial, self.members[0].fit)

    @property
    def source(self) -> str:
        """Where they come from."""
        return " and ".join(str(member.source) for member in self.members)

    @property
    def ignorance(self) -> str:
        """What to say where there is no class that the data and all of them know."""
        if len(self.members) == 1:
            return f"{self.source} knows none of the data's classes"
        return f"{self.source} have no class of the data in common"

    def __call__(self, images: Tensor) -> tuple[TeacherOutput, list[TeacherOutput]]:
        """What all say of images (B, 3, H, W) together, and each by itself; one forward a teacher."""
        each = [member(images) for member in self.members]
        if len(each) == 1:
            return each[0], each
        return TeacherOutput(
            tuple(mean_level(views) for views in zip(*(o.levels for o in each), strict=True))
        ), each

    def checksums(self) -> list[str]:
        """Of each, a word for one that is not frozen."""
        return [member.identity if member.is_frozen else OWN_AVERAGE for member in self.members]

    def assert_unchanged(self) -> None:
        """Raises AssertionError if a weight of one that is frozen has changed."""
        for member in self.members:
            member.assert_unchanged()


def mean_level(levels: Sequence[Tensor]) -> Tensor:
    """One raw level (B, A, H, W, 5 + C) from those of several teachers, relative to the same anchors.

    Objectness and classes are means of probabilities. Boxes are means of decoded centres and sizes,
    each weighted by its teacher's objectness: one that sees nothing has no say in where it lies.
    """
    stacked = torch.stack([level.float() for level in levels])
    weight = stacked[..., 4:5].sigmoid().clamp(min=1e-12)
    weight = weight / weight.sum(0)
    half = stacked[..., :4].sigmoid()
    centres = (half[..., :2] * weight).sum(0)
    # Width and height grow with the square of the sigmoid.
    sizes = (half[..., 2:4].square() * weight).sum(0).sqrt()
    boxes = torch.cat((centres, sizes), -1).clamp(_EPS, 1 - _EPS).logit()
    return torch.cat((boxes, mean_probability(stacked[..., 4:])), -1).to(_widest(levels))


def _widest(levels: Sequence[Tensor]) -> torch.dtype:
    """The finest precision of any; teachers may answer in different ones."""
    return functools.reduce(torch.promote_types, (level.dtype for level in levels))


def mean_probability(logits: Tensor) -> Tensor:
    """The logit of the mean over the first dimension of sigmoid(logits), exact where they are far out."""
    return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)
