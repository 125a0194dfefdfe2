"""The teacher network."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoint import build_model, described_by, fits, read_checkpoint
from models.names import ClassMap, plain
from models.yolo import Model
from utils.batch import FILL
from utils.distillation.matching import Fit, fit_networks
from utils.errors import UserError
from utils.losses.recipe import Body
from utils.words import listed


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher's outputs for a batch, without gradient.

    levels: raw outputs, a (B, A, H_l, W_l, 5 + C) tensor per matched level, in the student's class order and
        relative to its anchors (see `Fit`).
    features: the inputs of the teacher's Detect layer at these levels.
    unconverted_levels: its raw outputs at these levels, with its own classes and anchors.
    """

    levels: tuple[Tensor, ...]
    features: tuple[Tensor, ...] = ()
    unconverted_levels: tuple[Tensor, ...] = ()


class Teacher:
    """A network in evaluation mode, without gradient.

    Deliberately not an `nn.Module`: inside a loss module `.train()` would put it back into training
    mode, and its batch norms would adapt to the student's mosaics.
    """

    names: list[str] | None  # None if the file has none
    fit: Fit  # from `fit_to`
    body: Body  # possibly compiled
    remark: str = ""  # about how the file was read
    dtype: torch.dtype | None = None  # of its convolutions, None for float32

    def __init__(
        self, model: Model, source: Path | str = "teacher", scale: float = 1.0, *, frozen: bool = True
    ) -> None:
        """Take over the model: it is fused, frozen and converted to channels-last in place.

        `scale` is the side of its images over the side of the student's. A teacher that is not `frozen`
        is left unmodified: the model is owned by someone else and keeps changing.
        """
        self.source, self.names, self.scale = source, list(model.names), scale
        self.model, self.mapping = model, ""
        # Before fusing: its rounding, which may differ between devices, must not change the identity.
        self.identity = checksum(model)
        if frozen:
            self.model = model.eval().fuse().requires_grad_(False).to(memory_format=torch.channels_last)
        self._fingerprint = checksum(self.model) if frozen else None
        self.body = self.model.forward_features

    @classmethod
    def from_file(cls, path: Path, device: torch.device, cfg: str = "", scale: float = 1.0) -> Teacher:
        """Load the teacher in a weight file (the EMA weights if it has them).

        cfg: the network config, for a file without one. If the file has a config and its weights don't fit
        `cfg`, the file's is used: networks of v5.0 and of later versions share their config names, so
        users may name the wrong one. Raises UserError if it is not a weight file, or if its weights don't
        fit the network.
        """
        checkpoint, remark = read_checkpoint(path), ""
        if cfg:
            described = described_by(checkpoint, cfg)
            if not checkpoint.cfg or fits(described):
                checkpoint = described
            else:
                remark = f"--teacher-cfg {cfg} is not used: its file describes another network"
        model = build_model(checkpoint)
        model.check_takes_colour(path)
        teacher = cls(model, path, scale)
        teacher.remark = remark
        teacher.model.to(device)
        if not checkpoint.names:
            teacher.names = None
        return teacher

    def compute_in(self, dtype: torch.dtype) -> None:
        """Convert a frozen teacher's convolutions to the reduced precision that it computes in from now on.

        The results equal those of autocast, which would convert all weights in every step: it caches
        converted weights only of parameters that require grad.
        """
        if not self.is_frozen:
            return
        self.assert_unchanged()
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(dtype)
        self.dtype, self._fingerprint = dtype, checksum(self.model)

    def precision(self) -> AbstractContextManager[object]:
        """Return the context to call its network in: autocast to its dtype, unless autocast is already on."""
        kind = next(self.model.parameters()).device.type
        if self.dtype is None or torch.is_autocast_enabled(kind):
            return nullcontext()
        return torch.autocast(kind, self.dtype)

    def known_of(self, data_names: Sequence[str], *, is_one: bool) -> set[int]:
        """Return the indices of the data's classes that it knows; call `fit_to` first.

        is_one: whether the classes are merged into one for the student. A teacher with a single class then
        detects objects of all of them.
        """
        if is_one and self.model.nc == 1:
            return set(range(len(data_names)))
        return self.fit.classes.known(data_names)

    def fit_to(
        self,
        student: Model,
        names: Sequence[str],
        merged: Sequence[str] = (),
    ) -> None:
        """Match its outputs to the student's.

        Unnamed classes, or a single one on both sides, are taken to be the data's. merged: the classes of the
        data that are merged into one for the student. Raises UserError, describing both sides, if no level
        matches or if the number of unnamed classes differs.
        """
        if merged and self.model.nc == 1:  # it tells no classes apart either
            merged = ()
        teacher_names, taken = self._names_for(merged or names)
        if merged:
            classes = ClassMap.all_as_one(teacher_names, merged, names[0])
        else:
            classes = ClassMap.by_name(teacher_names, names)
        pairs = f"; matched: {classes.pairs(teacher_names, names)}" if classes.student else ""
        told = [taken] if taken and (merged or classes.is_identity) else []
        self.mapping = "; ".join(told + ([] if classes.is_identity else [f"{classes}{pairs}"]))
        if not (classes.is_identity or classes.unknown or classes.ignored or classes.one):
            self._reorder(classes.teacher)
            classes = ClassMap.by_name(names, names)
        self.fit = fit_networks(self.model.head, classes, student, self.scale, self.source)
        self.mapping = "; ".join(filter(None, (self.mapping, self.fit.levels_left_out(student))))

    def _names_for(self, names: Sequence[str]) -> tuple[list[str], str]:
        """Return its class names, or the data's if these are assumed, and a message about the latter."""
        teacher_names = self.names
        if self.model.nc == len(names) and (teacher_names is None or self.model.nc == 1):
            return list(names), _taken(teacher_names, names)
        if teacher_names is None:
            raise UserError(
                f"the teacher has {self.model.nc} classes without names, the data has {listed(list(names))}",
                self.source,
                "give --teacher a model trained on the data's classes",
            )
        return teacher_names, ""

    @property
    def known(self) -> ClassMap:
        """The classes that it shares with the data; call `fit_to` first."""
        return self.fit.classes

    @property
    def title(self) -> str:
        """Its name in messages and results."""
        return f"teacher {self.source}"

    @property
    def is_frozen(self) -> bool:
        """Whether its weights are fixed."""
        return self._fingerprint is not None

    def _reorder(self, classes: Sequence[int]) -> None:
        """Permute the classes into the student's order once, rather than in every step."""
        self.names = [self.model.names[number] for number in classes]
        self.model.keep_classes(classes, self.names)
        self._fingerprint = checksum(self.model)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TeacherOutput:
        """Run one forward pass on images (B, 3, H, W), 0..1."""
        assert not self.model.training, "the teacher must stay in evaluation mode"
        with self.precision():
            features = self.body(fitted(images, self))
            levels = self.model.forward_head(features)
        size = (images.shape[2], images.shape[3])
        seen = tuple(pair.cut(features[pair.teacher], size) for pair in self.fit.levels)
        # `cut` crops the last two dimensions: move the outputs before the grid meanwhile.
        unconverted = tuple(
            pair.cut(levels[pair.teacher].movedim(-1, 2), size).movedim(2, -1) for pair in self.fit.levels
        )
        return TeacherOutput(
            self.fit.of_teacher(unconverted) if self.fit.classes.student else (), seen, unconverted
        )

    def assert_unchanged(self) -> None:
        """Raise AssertionError if a weight of a frozen teacher has changed since it was loaded."""
        if self._fingerprint is not None and checksum(self.model) != self._fingerprint:
            raise AssertionError("the teacher's weights changed during training")  # also under python -O


class TeacherInStudentFrame(nn.Module):
    """A teacher that takes the student's images and predicts in their pixels and in the data's classes.

    So it can be evaluated like any network for the data, whatever it was trained on.
    """

    def __init__(self, teacher: Teacher, class_count: int) -> None:
        """`class_count` is that of the data."""
        super().__init__()
        self.teacher, self.class_count, self.model = teacher, class_count, teacher.model

    @property
    def known_classes(self) -> tuple[int, ...] | None:
        """The data's classes that it can predict, None for all."""
        return self.teacher.known.student if self.teacher.known.unknown else None

    @property
    def stride(self) -> Tensor:
        """(L,) pixels of the student's image per cell of each level."""
        return self.model.stride / self.teacher.scale

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs of its Detect layer."""
        with self.teacher.precision():
            return self.model.forward_features(fitted(images, self.teacher))

    def forward_head(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return its raw levels."""
        with self.teacher.precision():
            return self.model.forward_head(features)

    def decode_levels(self, levels: Sequence[Tensor]) -> Tensor:
        """Return predictions (B, N, 5 + K), with score 0 for classes of the data that it does not know."""
        return self._to_student_frame(self.model.decode_levels(levels))

    def decode_above(self, levels: Sequence[Tensor], least: float) -> tuple[Tensor, Tensor, Tensor]:
        """As `Model.decode_above`."""
        image, row, decoded = self.model.decode_above(levels, least)
        return image, row, self._to_student_frame(decoded)

    def _to_student_frame(self, decoded: Tensor) -> Tensor:
        """Convert its own predictions (..., 5 + C) to the data's classes, (..., 5 + K)."""
        classes = self.teacher.known
        out = decoded.new_zeros(*decoded.shape[:-1], 5 + self.class_count)
        out[..., :4] = decoded[..., :4] / self.teacher.scale
        out[..., 4] = decoded[..., 4]
        scores = decoded[..., [5 + number for number in classes.teacher]]
        out[..., [5 + number for number in classes.student]] = (
            scores.amax(-1, keepdim=True) if classes.one else scores
        )
        return out


def _taken(teacher_names: Sequence[str] | None, names: Sequence[str]) -> str:
    """Return the message if a teacher's classes are taken for the data's whatever their names."""
    if teacher_names is None:
        return f"the file names no classes, its {len(names)} are taken to be the data's in their order"
    return (
        ""
        if plain(teacher_names[0]) == plain(names[0])
        else f"its class '{teacher_names[0]}' is taken for '{names[0]}'"
    )


def fitted(images: Tensor, teacher: Teacher) -> Tensor:
    """Scale images (B, 3, H, W) for a teacher and pad them with grey on the right and at the bottom.

    The padding makes the sides multiples of its coarsest stride, which may be larger than the
    student's (a P6 teacher, or smaller images).
    """
    if teacher.scale != 1:
        size = [round(side * teacher.scale) for side in images.shape[2:]]
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
    right, below = (-side % teacher.model.size_multiple for side in (images.shape[3], images.shape[2]))
    return F.pad(images, (0, right, 0, below), value=FILL / 255) if right or below else images


def checksum(model: Model) -> str:
    """Return the SHA-256 of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
