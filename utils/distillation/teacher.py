"""The network that a student learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
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
    """What the teacher says of a batch, without gradient.

    levels: raw outputs, a (B, A, H_l, W_l, 5 + C) tensor for each level that has a partner, in the
        student's order of classes and relative to its anchors (see `Fit`).
    features: the inputs of its Detect layer at these levels.
    own_levels: its raw outputs there as they are.
    """

    levels: tuple[Tensor, ...]
    features: tuple[Tensor, ...] = ()
    own_levels: tuple[Tensor, ...] = ()


class Teacher:
    """A network in evaluation mode, without gradient.

    A plain object on purpose: as an `nn.Module` inside a loss it would be put back into training
    mode by `.train()`, and its batch norms would follow the student's mosaics.
    """

    names: list[str] | None  # None where the file does not tell them
    fit: Fit  # from `fit_to`
    known: ClassMap  # from `fit_to`: all that it knows, whatever others know beside it
    body: Body  # its own, compiled or not
    remark: str = ""  # on how it was read
    dtype: torch.dtype | None = None  # of its convolutions, None for float32

    def __init__(
        self, model: Model, source: Path | str = "teacher", scale: float = 1.0, *, frozen: bool = True
    ) -> None:
        """Takes the model over: it is fused, frozen and laid out channels-last in place.

        `scale` is the side of the pictures that it sees over the side of the student's. A teacher
        that is not `frozen` is left as it is: it is somebody else's and goes on changing.
        """
        self.source, self.names, self.scale = source, list(model.names), scale
        self.model, self.mapping = model, ""
        # Before the weights are fused, on whatever device: rounding must not make it another teacher.
        self.identity = checksum(model)
        if frozen:
            self.model = model.eval().fuse().requires_grad_(False).to(memory_format=torch.channels_last)
        self._fingerprint = checksum(self.model) if frozen else None
        self.body = self.model.forward_features

    @classmethod
    def from_file(cls, path: Path, device: torch.device, cfg: str = "", scale: float = 1.0) -> Teacher:
        """The teacher that a weight file holds (its EMA weights where it has them).

        cfg: the network of a file that does not describe its own. One that does needs none, and is taken at
        its word where its weights are not those of `cfg`: people name the file that they know, and the
        networks of v5.0 and of later versions have the same names. Raises UserError for what is no weight
        file, or where the weights are not those of the network.
        """
        checkpoint, remark = read_checkpoint(path), ""
        if cfg:
            described = described_by(checkpoint, cfg)
            if not checkpoint.cfg or fits(described):
                checkpoint = described
            else:
                remark = f"{cfg} is not its network, which its file describes"
        teacher = cls(build_model(checkpoint), path, scale)
        teacher.remark = remark
        teacher.model.to(device)
        if not checkpoint.names:
            teacher.names = None
        return teacher

    def compute_in(self, dtype: torch.dtype) -> None:
        """Keeps a frozen teacher's convolutions in the reduced precision that it computes in from now on.

        The numbers are those of autocast, which would convert all weights anew in every step: it keeps
        converted ones only of what is trained.
        """
        if not self.is_frozen:
            return
        self.assert_unchanged()
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(dtype)
        self.dtype, self._fingerprint = dtype, checksum(self.model)

    def precision(self) -> AbstractContextManager[object]:
        """The precision to call its network in: its own, where nobody has set another already."""
        kind = next(self.model.parameters()).device.type
        if self.dtype is None or torch.is_autocast_enabled(kind):
            return nullcontext()
        return torch.autocast(kind, self.dtype)

    def known_of(self, wanted: Sequence[str], *, is_one: bool) -> set[int]:
        """Which of the data's classes it knows, by their numbers, once it is fitted.

        is_one: whether they are one for the student. A teacher that tells no classes apart sees the objects
        of all of these.
        """
        if is_one and self.model.nc == 1:
            return set(range(len(wanted)))
        return self.fit.classes.known(wanted)

    def fit_to(
        self,
        student: Model,
        names: Sequence[str],
        only: Collection[int] | None = None,
        merged: Sequence[str] = (),
    ) -> None:
        """Finds which of its outputs belong to which of the student's.

        Classes that the file does not name, or a single one on both sides, are taken to be the
        data's. `only` numbers of the data's classes are looked for. merged: the classes of the data that
        are one for the student. Raises UserError, with both sides named, where no level fits, or where
        the number of unnamed classes differs.
        """
        if merged and self.model.nc == 1:  # knows no classes either
            merged, only = (), (None if only else only)  # of several that share nothing, nothing either
        own, taken = self._names_for(merged or names)
        if merged:
            classes = ClassMap.all_as_one(own, merged, names[0], only)
        else:
            classes = ClassMap.by_name(own, names, only)
        if only is None:
            pairs = f"; matched: {classes.pairs(own, names)}" if classes.student else ""
            told = [taken] if taken and (merged or classes.is_identity) else []
            self.mapping = "; ".join(told + ([] if classes.is_identity else [f"{classes}{pairs}"]))
        if not (classes.is_identity or classes.unknown or classes.ignored or classes.one):
            self._reorder(classes.teacher)
            classes = ClassMap.by_name(names, names)
        if only is None:
            self.known = classes
        self.fit = fit_networks(self.model.head, classes, student, self.scale, self.source)

    def _names_for(self, names: Sequence[str]) -> tuple[list[str], str]:
        """Its class names, or the data's where these are taken for its own, and what to say of that."""
        own = self.names
        if self.model.nc == len(names) and (own is None or self.model.nc == 1):
            return list(names), _taken(own, names)
        if own is None:
            raise UserError(
                f"the teacher has {self.model.nc} classes without names, the data has {listed(list(names))}",
                self.source,
                "give --teacher a model trained on the data's classes",
            )
        return own, ""

    @property
    def title(self) -> str:
        """What to call it."""
        return f"teacher {self.source}"

    @property
    def is_frozen(self) -> bool:
        """Whether its weights stay as they are."""
        return self._fingerprint is not None

    def _reorder(self, classes: Sequence[int]) -> None:
        """Puts the classes into the student's order, which costs nothing later."""
        self.names = [self.model.names[number] for number in classes]
        self.model.keep_classes(classes, self.names)
        self._fingerprint = checksum(self.model)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TeacherOutput:
        """One batched forward of images (B, 3, H, W), 0..1."""
        assert not self.model.training, "the teacher must stay in evaluation mode"
        with self.precision():
            features = self.body(fitted(images, self))
            levels = self.model.forward_head(features)
        size = (images.shape[2], images.shape[3])
        seen = tuple(pair.cut(features[pair.teacher], size) for pair in self.fit.levels)
        # Grid before outputs: cut the two dimensions in the middle.
        own = tuple(
            pair.cut(levels[pair.teacher].movedim(-1, 2), size).movedim(2, -1) for pair in self.fit.levels
        )
        return TeacherOutput(self.fit.of_teacher(own) if self.fit.classes.student else (), seen, own)

    def assert_unchanged(self) -> None:
        """Raises AssertionError if a weight of a frozen teacher differs from what was loaded."""
        if self._fingerprint is not None and checksum(self.model) != self._fingerprint:
            raise AssertionError("the teacher's weights changed during training")  # also under python -O


class InStudentsTerms(nn.Module):
    """A teacher that takes the student's pictures and answers in their pixels and in the data's classes.

    With this it can be scored like any network of the data, whatever it was trained on.
    """

    def __init__(self, teacher: Teacher, class_count: int) -> None:
        """`class_count` is that of the data."""
        super().__init__()
        self.teacher, self.class_count, self.model = teacher, class_count, teacher.model

    @property
    def stride(self) -> Tensor:
        """(L,) pixels of the student's picture that a cell of each level covers."""
        return self.model.stride / self.teacher.scale

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Inputs of its Detect layer."""
        with self.teacher.precision():
            return self.model.forward_features(fitted(images, self.teacher))

    def forward_head(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Its raw levels."""
        with self.teacher.precision():
            return self.model.forward_head(features)

    def decode_levels(self, levels: Sequence[Tensor]) -> Tensor:
        """Predictions (B, N, 5 + K), 0 for the classes of the data that it does not know."""
        return self._in_terms(self.model.decode_levels(levels))

    def decode_above(self, levels: Sequence[Tensor], least: float) -> tuple[Tensor, Tensor, Tensor]:
        """As `Model.decode_above`."""
        image, row, decoded = self.model.decode_above(levels, least)
        return image, row, self._in_terms(decoded)

    def _in_terms(self, decoded: Tensor) -> Tensor:
        """Its own predictions (..., 5 + C) as those of the data's classes, (..., 5 + K)."""
        classes = self.teacher.known
        out = decoded.new_zeros(*decoded.shape[:-1], 5 + self.class_count)
        out[..., :4] = decoded[..., :4] / self.teacher.scale
        out[..., 4] = decoded[..., 4]
        scores = decoded[..., [5 + own for own in classes.teacher]]
        out[..., [5 + mine for mine in classes.student]] = (
            scores.amax(-1, keepdim=True) if classes.one else scores
        )
        return out


def _taken(own: Sequence[str] | None, names: Sequence[str]) -> str:
    """What to say where a teacher's classes are taken for the data's whatever they are called."""
    if own is None:
        return f"the file names no classes, its {len(names)} are taken to be the data's in their order"
    return "" if plain(own[0]) == plain(names[0]) else f"its class '{own[0]}' is taken for '{names[0]}'"


def fitted(images: Tensor, teacher: Teacher) -> Tensor:
    """Images (B, 3, H, W) as a teacher takes them: scaled, and grey on the right and below.

    The grey brings the sides to multiples of its coarsest stride, which may be larger than the
    student's (a P6 teacher, or smaller pictures).
    """
    if teacher.scale != 1:
        size = [round(side * teacher.scale) for side in images.shape[2:]]
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
    right, below = (-side % teacher.model.size_multiple for side in (images.shape[3], images.shape[2]))
    return F.pad(images, (0, right, 0, below), value=FILL / 255) if right or below else images


def checksum(model: Model) -> str:
    """SHA-256 over all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
