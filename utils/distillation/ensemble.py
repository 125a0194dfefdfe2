"""Ensembles of teachers."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.names import ClassMap
from models.yolo import Model
from utils.config.options import OWN_AVERAGE
from utils.distillation.teacher import Teacher, TeacherOutput
from utils.errors import UserError
from utils.words import listed

_EPS = 1e-6
_TINY = torch.finfo(torch.float32).tiny


class Teachers:
    """One or more teachers, at the levels that all of them share with the student.

    Each class is taught by those that know it, so specialists of different classes teach one student.

    fit: which of the student's outputs are compared. class_count: of the data. note: a message about the
    classes if not all teachers know the same ones.
    """

    def __init__(
        self, members: Sequence[Teacher], student: Model, names: Sequence[str], merged: Sequence[str] = ()
    ) -> None:
        """`names` are the data's classes, `merged` those that are merged into one for the student.

        Raises UserError if a teacher does not fit the student, or if they share no level.
        """
        self.members, self.class_count = list(members), len(names)
        for member in self.members:
            member.fit_to(student, names, merged)
        levels = [{pair.student for pair in member.fit.levels} for member in self.members]
        shared = set.intersection(*levels)
        if not shared:
            fix = "leave one out, or take --teacher-img-size away"
            raise UserError("they have no level of the student in common", self.source, fix)
        for member in self.members:
            member.fit = member.fit.at(shared)
        self.fit, self.note = self.members[0].fit, ""
        # Of each teacher's classes among those known together, if not all teachers know the same.
        self._columns: list[Tensor] = []
        self._share_classes(names, merged)

    def _share_classes(self, names: Sequence[str], merged: Sequence[str]) -> None:
        """Prepare the averages of classes if not all teachers know the same ones."""
        data_names = merged or names
        known = [member.known_of(data_names, is_one=bool(merged)) for member in self.members]
        together = sorted(set.union(*known))
        if all(len(classes) == len(together) for classes in known):
            return
        lost = tuple(name for number, name in enumerate(data_names) if number not in together)
        what = f"; {'unknown' if merged else 'no class term for'} {listed(list(lost))}" if lost else ""
        self.note = (
            f"the teachers together: {len(together)} of {len(data_names)} classes known, "
            f"each learnt from those that know it{what}"
        )
        numbers, one = ((0,), names[0]) if merged else (tuple(together), "")
        self.fit = self.fit.for_classes(ClassMap(numbers, tuple(together), lost, (), one))
        # Once: in a step the copy to a GPU would wait for it.
        device = self.fit.student_rows.device
        self._columns = [
            torch.tensor([numbers.index(number) for number in member.fit.classes.student], device=device)
            for member in self.members
        ]

    @property
    def source(self) -> str:
        """The sources of all teachers, for messages."""
        return " and ".join(str(member.source) for member in self.members)

    @property
    def ignorance(self) -> str:
        """The message for the case that data and teachers have no class in common."""
        if len(self.members) == 1:
            return f"{self.source} knows none of the data's classes"
        return f"{self.source} know none of the data's classes"

    def __call__(self, images: Tensor) -> tuple[TeacherOutput, list[TeacherOutput]]:
        """Return the ensemble's output for images (B, 3, H, W) and that of each teacher; one forward each."""
        each = [member(images) for member in self.members]
        if len(each) == 1:
            return each[0], each
        # Who knows none of the classes has no levels, and teaches features alone.
        by_level = zip(*(view.levels for view in each if view.levels), strict=True)
        if not self._columns:
            return TeacherOutput(tuple(map(mean_level, by_level))), each
        if self.fit.classes.one:
            return TeacherOutput(tuple(map(largest_level, by_level))), each
        columns = [own for own, view in zip(self._columns, each, strict=True) if view.levels]
        count = len(self.fit.classes.student)
        pooled = tuple(specialists_level(views, columns, count) for views in by_level)
        return TeacherOutput(pooled), each

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
    boxes = _mean_boxes(stacked[..., :5])
    return torch.cat((boxes, mean_probability(stacked[..., 4:])), -1).to(_widest(levels))


def largest_level(levels: Sequence[Tensor]) -> Tensor:
    """As `mean_level`, for teachers that know different parts of a merged class, (B, A, H, W, 6).

    Objectness is the largest: an object that a teacher does not know is background to it.
    """
    stacked = torch.stack([level.float() for level in levels])
    parts = (_mean_boxes(stacked[..., :5]), stacked[..., 4:5].amax(0), stacked[0, ..., 5:])
    return torch.cat(parts, -1).to(_widest(levels))


def specialists_level(levels: Sequence[Tensor], columns: Sequence[Tensor], class_count: int) -> Tensor:
    """Average the raw levels of teachers that know different classes to one, (B, A, H, W, 5 + C).

    A class's score, objectness times probability, is the mean over the teachers that know it. Objectness is
    the mean over the teachers that know the class of the best score: to the others its objects are
    background. A class's probability is its score divided by that. Boxes are averaged as in `mean_level`.

    levels: (B, A, H, W, 5 + C_m) of each teacher. columns: (C_m,) the places of its classes among the C that
    any of them knows. class_count: C.
    """
    boxes = _mean_boxes(torch.stack([level[..., :5].float() for level in levels]))
    size = (*levels[0].shape[:-1], class_count)
    scores, objectness, counts = boxes.new_zeros(size), boxes.new_zeros(size), boxes.new_zeros(class_count)
    for level, own in zip(levels, columns, strict=True):
        seen = level[..., 4:5].float().sigmoid().expand(*size[:-1], len(own))
        objectness.index_add_(-1, own, seen)
        scores.index_add_(-1, own, seen * level[..., 5:].float().sigmoid())
        counts.index_add_(0, own, torch.ones_like(own, dtype=counts.dtype))
    scores, objectness = scores / counts, objectness / counts
    # An objectness may be 0 in float32; the scores, smaller still, are then 0 too.
    of_best = objectness.gather(-1, scores.argmax(-1, keepdim=True)).clamp(min=_TINY)
    rest = torch.cat((of_best, scores / of_best), -1).clamp(_EPS, 1 - _EPS).logit()
    return torch.cat((boxes, rest), -1).to(_widest(levels))


def _mean_boxes(stacked: Tensor) -> Tensor:
    """Average raw boxes, weighted by objectness: (M, ..., 5) of M teachers to (..., 4)."""
    weight = stacked[..., 4:5].sigmoid().clamp(min=1e-12)
    weight = weight / weight.sum(0)
    half = stacked[..., :4].sigmoid()
    centres = (half[..., :2] * weight).sum(0)
    # Decoded width and height are proportional to the square of the sigmoid.
    sizes = (half[..., 2:4].square() * weight).sum(0).sqrt()
    return torch.cat((centres, sizes), -1).clamp(_EPS, 1 - _EPS).logit()


def _widest(levels: Sequence[Tensor]) -> torch.dtype:
    """Return the promoted dtype of the levels, as teachers may compute in different precisions."""
    return functools.reduce(torch.promote_types, (level.dtype for level in levels))


def mean_probability(logits: Tensor) -> Tensor:
    """Return the logit of the mean of sigmoid(logits) over dimension 0, accurate for extreme logits too."""
    return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)
