"""How a script chooses the losses of a run: the meeting point of training and its losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.yolo import Model
from utils.batch import Batch, Progress, StudentOutput
from utils.losses.detection import DetectionLoss

Body = Callable[[Tensor], tuple[Tensor, ...]]  # from images (B, 3, H, W) to the maps that a head sees
Terms = Callable[[StudentOutput], dict[str, Tensor]]  # the rest of a loss, when the network has answered


class Loss(Protocol):
    """A part of what a run minimises: an `nn.Module` that returns named scalars.

    names: its terms, known before the first step. label: what its gradient is reported as.

    It may have `observe(gradient_ratio, progress)`, called where its gradient was measured, `gauges`, names
    that end in `_ratio`, with `readings()`, their scalars at such a step,
    `review(report)`, which gives warnings after an epoch, `finish()` for the end of the run, `networks()`,
    those that it asks beside the trained one, by what to call them, `references()`, mAP50 and mAP50-95 on
    the validation split of those of them that know all of the data's classes, `compute_in(dtype)`, which
    tells it the reduced precision of the run's forward pass, and `compile_networks(compiled)`, which lets
    their bodies run as `compiled` makes them, and likewise `replay_networks(replayed)`, for those that are
    frozen, and `replay_terms(replayed)`, for what lies between the outputs and its terms.
    `ahead(batch, progress)` is called in place of the loss, before the network's pass, and gives the rest of
    the loss: what it begins there goes on beside that pass on a GPU, and a CPU that does it first has no
    activations to keep meanwhile.
    """

    names: tuple[str, ...]
    label: str

    def __call__(self, batch: Batch, output: StudentOutput, progress: Progress) -> dict[str, Tensor]:
        """Weighted float32 scalars; the sum over all losses times the images is minimised."""
        ...


class Scores(Protocol):
    """How good a network is on the validation split."""

    def over(self, classes: Sequence[int] | None = None) -> tuple[float, float]:
        """mAP50 and mAP50-95 over these classes, all of them if None, as far as the labels have them."""
        ...


@dataclass(frozen=True)
class LossContext:
    """What a recipe may use to build its losses, ready when the model and the data are.

    average: the moving average of the model's weights, a network in evaluation mode. is_new: False for
    a run that goes on, whose weights are not in the model yet. merged: the classes of the data where they
    are one (`--single-cls`), of which `names` then is the name. evaluate: from a model to its scores on
    the validation split. say, warn: print a line.
    """

    model: Model
    average: Model
    is_new: bool
    names: tuple[str, ...]
    merged: tuple[str, ...]
    image_size: int
    device: torch.device
    detection: DetectionLoss
    evaluate: Callable[[Model], Scores]
    say: Callable[[str], None]
    warn: Callable[[str], None]


@dataclass(frozen=True)
class EpochReport:
    """What an epoch came to.

    means: of each term and gauge, as in results.csv. map50_95: None where it was not scored.
    """

    means: Mapping[str, float]
    map50_95: float | None


LossRecipe = Callable[[LossContext], Sequence[Loss]]


def ground_truth_only(context: LossContext) -> Sequence[Loss]:
    """The losses of plain training: the one against the labels."""
    return [context.detection]


def plain_recipe(_options: object) -> LossRecipe:
    """The recipe of `train.py`, whatever its options."""
    return ground_truth_only
