"""The interface between training and its losses, and the recipe by which a script chooses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.yolo import Model
from utils.batch import Batch, Progress, StudentOutput
from utils.losses.detection import DetectionLoss

Body = Callable[[Tensor], tuple[Tensor, ...]]  # from images (B, 3, H, W) to the head's input maps
Terms = Callable[[StudentOutput], dict[str, Tensor]]  # the part of a loss that needs the network's output


class Loss(Protocol):
    """A component of the training objective: an `nn.Module` that returns named scalars.

    names: its terms, known before the first step. label: the prefix under which its gradient is reported.

    Optional hooks:
    - `ahead(batch, progress)`: called before the network's forward pass in place of the loss; returns its
      `Terms`. On a GPU the work it starts overlaps with the forward pass; on a CPU it runs first, while no
      activations are kept.
    - `observe(gradient_ratio, progress)`: called at steps where its gradient was measured.
    - `gauges`, names that end in `_ratio`, and `readings()`, their scalars at such a step.
    - `review(report)`: returns warnings after an epoch. `finish()`: called at the end of the run.
    - `networks()`: the networks that it uses besides the trained one, by title; `known_classes` of one that
      does not know all of the data's classes are those it does. `references()`: mAP50 and
      mAP50-95 on the validation split of those that know all of the data's classes.
    - `uses_average`: whether it needs the average of the weights, `ema`, in every step.
    - `awaits_networks`: whether a step waits for values computed by them; on a GPU they then take precedence
      over the trained network's forward pass.
    - `compute_in(dtype)`: gets the reduced precision of the run's forward pass.
    - `compile_networks(compiled, images)`, `replay_networks(replayed)`: wrap the bodies of its networks, for
      `replay_networks` only of frozen ones. `replay_terms(replayed)`: wraps what lies between the network
      outputs and the terms.
    """

    names: tuple[str, ...]
    label: str

    def __call__(self, batch: Batch, output: StudentOutput, progress: Progress) -> dict[str, Tensor]:
        """Return weighted float32 scalars; their sum over all losses times the batch size is minimised."""
        ...


class Scores(Protocol):
    """The scores of a network on the validation split."""

    def over(self, classes: Sequence[int] | None = None) -> tuple[float, float]:
        """Return mAP50 and mAP50-95 over these classes (None: all), as far as they occur in the labels."""
        ...


@dataclass(frozen=True)
class LossContext:
    """What a recipe may use to build its losses, available once model and data are set up.

    ema: the exponential moving average of the model, in evaluation mode. is_new: False for a resumed run,
    whose weights are not loaded into the model yet. merged: the data's original classes if they are merged
    into one (`--single-cls`), whose name is then in `names`. evaluate: scores a model on the validation
    split. say, warn: print a line.
    """

    model: Model
    ema: Model
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
    """The results of an epoch.

    means: the mean of each term and gauge, as in results.csv. map50_95: None if there was no validation.
    """

    means: Mapping[str, float]
    map50_95: float | None


LossRecipe = Callable[[LossContext], Sequence[Loss]]


def ground_truth_only(context: LossContext) -> Sequence[Loss]:
    """Return the losses of plain training: only the one against the labels."""
    return [context.detection]


def plain_recipe(_options: object) -> LossRecipe:
    """Return the recipe of `train.py`, whatever its options."""
    return ground_truth_only
