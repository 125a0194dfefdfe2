"""How a script chooses the losses of a run: the meeting point of training and its losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.yolo import Model
from utils.batch import Batch, Progress, StudentOutput
from utils.losses.detection import DetectionLoss


class Loss(Protocol):
    """A part of what a run minimises: an `nn.Module` that returns named scalars.

    names: its terms, known before the first step. label: what its gradient is reported as.
    """

    names: tuple[str, ...]
    label: str

    def __call__(self, batch: Batch, output: StudentOutput, progress: Progress) -> dict[str, Tensor]:
        """Weighted float32 scalars; the sum over all losses times the images is minimised."""
        ...


@dataclass(frozen=True)
class LossContext:
    """What a recipe may use to build its losses, ready when the model and the data are.

    evaluate: from a model to (mAP50, mAP50-95) on the validation split. say: prints a line.
    """

    model: Model
    names: tuple[str, ...]
    image_size: int
    device: torch.device
    detection: DetectionLoss
    evaluate: Callable[[Model], tuple[float, float]]
    say: Callable[[str], None]


LossRecipe = Callable[[LossContext], Sequence[Loss]]


def ground_truth_only(context: LossContext) -> Sequence[Loss]:
    """The losses of plain training: the one against the labels."""
    return [context.detection]


def plain_recipe(_options: object) -> LossRecipe:
    """The recipe of `train.py`, whatever its options."""
    return ground_truth_only
