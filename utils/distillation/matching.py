"""Mapping of the teacher's outputs to the student's cells, anchors and classes.

Shapes: B images, A anchors, H W grid, K classes of the data, C of them that the teacher knows too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from models.names import ClassMap
from models.yolo import Detect, Model, class_bias, rows_of_classes
from utils.batch import StudentOutput
from utils.errors import UserError

# The constant class logit of a network with a single class.
_CERTAIN = class_bias(1)


@dataclass(frozen=True)
class LevelPair:
    """Two levels whose cells cover the same pixels of the image.

    stride: pixels of the student's image per cell. anchor_of: (A,) the teacher's anchor matched to each of
    the student's. teacher_anchors, student_anchors: (A, 2), the matched ones, both in the student's grid
    units. is_identity: whether the anchors agree, determined once, as a check in each step would synchronise
    with the GPU.
    """

    student: int
    teacher: int
    stride: int
    anchor_of: Tensor
    teacher_anchors: Tensor
    student_anchors: Tensor
    is_identity: bool

    def cut(self, maps: Tensor, image_hw: tuple[int, int]) -> Tensor:
        """Crop maps (..., H, W) to the cells within a student's image of that size in pixels."""
        height, width = (side // self.stride for side in image_hw)
        return maps[..., :height, :width]


@dataclass(frozen=True)
class Fit:
    """The correspondence between the outputs of a teacher and the student.

    teacher_rows, student_rows: indices of the compared outputs per anchor, as tensors on the device.
    """

    levels: tuple[LevelPair, ...]
    classes: ClassMap
    teacher_rows: Tensor
    student_rows: Tensor

    def at(self, student_levels: Collection[int]) -> Fit:
        """Return the fit restricted to these levels of the student."""
        return replace(self, levels=tuple(pair for pair in self.levels if pair.student in student_levels))

    def levels_left_out(self, student: Model) -> str:
        """Return a message about the student's levels that are not compared; empty if all are."""
        strides = _integers(student.head.stride.tolist())
        shared = {pair.student for pair in self.levels}
        rest = [str(stride) for level, stride in enumerate(strides) if level not in shared]
        where = f"its cells fit {len(shared)} of the student's {len(strides)} levels"
        return f"{where}; those of stride {' and '.join(rest)} learn from the labels alone" if rest else ""

    def for_classes(self, classes: ClassMap) -> Fit:
        """Return the fit of teachers that know these classes together."""
        rows = torch.tensor(rows_of_classes(classes.student), device=self.student_rows.device)
        return replace(self, classes=classes, student_rows=rows)

    def of_student(self, output: StudentOutput) -> StudentOutput:
        """Return the student's matched levels, with the classes that both know."""
        levels = tuple(output.levels[pair.student] for pair in self.levels)
        if self.classes.unknown and not self.classes.one:
            levels = tuple(level.index_select(-1, self.student_rows) for level in levels)
        return StudentOutput(tuple(output.features[pair.student] for pair in self.levels), levels)

    def of_teacher(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Convert the teacher's matched raw levels to the student's anchors and class order.

        Each is (B, A, H, W, 5 + C). Objectness is that of an object of a common class.
        """
        return tuple(self._laid(level, pair) for level, pair in zip(levels, self.levels, strict=True))

    def _laid(self, level: Tensor, pair: LevelPair) -> Tensor:
        if not pair.is_identity:
            level = anchors_rescaled(level[:, pair.anchor_of], pair.teacher_anchors, pair.student_anchors)
        if self.classes.is_identity:
            return level
        objectness, classes = level[..., 4:5], level.index_select(-1, self.teacher_rows[5:])
        if self.classes.ignored:
            objectness = objectness_of(level, self.teacher_rows[5:] - 5)[..., None].to(level.dtype)
        if self.classes.one:
            classes = torch.full_like(objectness, _CERTAIN)
        return torch.cat((level[..., :4], objectness, classes), -1)


def fit_networks(teacher: Detect, classes: ClassMap, student: Model, scale: float, source: Path | str) -> Fit:
    """Match the levels and anchors of two heads.

    scale: side of the teacher's images over that of the student's. Raises UserError, naming the strides of
    both, if no level of one has the grid of a level of the other.
    """
    teacher_strides = [stride / scale for stride in teacher.stride.tolist()]
    student_strides = student.head.stride.tolist()
    pairs = []
    for student_level, stride in enumerate(student_strides):
        teacher_levels = [
            number for number, value in enumerate(teacher_strides) if abs(value - stride) < 1e-6
        ]
        if teacher_levels:
            pairs.append(_pair(student_level, teacher_levels[0], teacher, student.head))
    if not pairs:
        sizes = f" with images {scale:g} times as large" if scale != 1 else ""
        raise UserError(
            f"its levels have strides {_integers(teacher.stride.tolist())}{sizes}, the student's "
            f"{_integers(student_strides)}: none has the same cells",
            source,
            "choose another teacher, or a --teacher-img-size that is 1/4, 1/2, 1, 2 or 4 times --imgsz",
        )
    device = student.head.anchors.device
    rows = [
        torch.tensor(rows_of_classes(numbers), device=device)
        for numbers in (classes.teacher, classes.student)
    ]
    return Fit(tuple(pairs), classes, *rows)


def _pair(student_level: int, teacher_level: int, teacher: Detect, student: Detect) -> LevelPair:
    """Match each of the student's anchors to the teacher's anchor of the most similar shape."""
    student_anchors = student.anchors[student_level].float()
    # Apart from the image scale, a grid unit is the same number of pixels for both.
    teacher_anchors = teacher.anchors[teacher_level].float().to(student_anchors.device)
    ratio = student_anchors[:, None] / teacher_anchors[None]
    closeness = torch.minimum(ratio, 1 / ratio).amin(-1)
    same = teacher_anchors.shape == student_anchors.shape and torch.allclose(
        teacher_anchors, student_anchors, atol=1e-4
    )
    anchor_of = (
        torch.arange(len(student_anchors), device=student_anchors.device) if same else closeness.argmax(1)
    )
    stride = round(float(student.stride[student_level]))
    return LevelPair(
        student_level, teacher_level, stride, anchor_of, teacher_anchors[anchor_of], student_anchors, same
    )


def anchors_rescaled(level: Tensor, from_anchors: Tensor, to_anchors: Tensor) -> Tensor:
    """Re-encode a raw level (B, A, H, W, 5 + K), so that it gives the same boxes with other anchors (A, 2).

    Sizes that the new anchors cannot represent (above 4 times the anchor) are clamped.
    """
    ratio = (from_anchors / to_anchors).sqrt()[None, :, None, None].to(level.device)
    root = level[..., 2:4].float().sigmoid() * ratio
    sizes = root.clamp(1e-4, 1 - 1e-4).logit().to(level.dtype)
    return torch.cat((level[..., :2], sizes, level[..., 4:]), -1)


def objectness_of(level: Tensor, classes: Tensor) -> Tensor:
    """Return objectness logits (B, A, H, W) of a raw level, for objects of the given classes only.

    The probability is multiplied by the ratio of the best score among these classes to the best of all,
    so that a certain object of another class counts as background.
    """
    scores = level[..., 5:].float().sigmoid()
    share = scores.index_select(-1, classes).amax(-1) / scores.amax(-1).clamp(min=1e-6)
    probability = level[..., 4].float().sigmoid() * share
    return probability.clamp(1e-6, 1 - 1e-6).logit()


def _integers(values: Sequence[float]) -> list[int]:
    return [round(value) for value in values]
