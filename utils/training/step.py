"""One forward pass with all losses: the module that DistributedDataParallel wraps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from models.yolo import Model
from utils.batch import Batch, Progress, StudentOutput
from utils.distributed import sum_over_ranks
from utils.losses.recipe import Body, Loss, Terms
from utils.training.gauge import GradientTaps

SAMPLES_PER_EPOCH = 4


class TrainingStep(nn.Module):
    """The network and the losses of a run.

    names: the loss terms, in order. gauges: what is measured beside them: one gradient ratio for each loss
    after the first, and what the losses measure themselves.
    body: maps images to the inputs of the Detect layer, compiled or not.
    """

    body: Body

    def __init__(self, model: Model, losses: Sequence[Loss]) -> None:
        """`losses` are modules; their parameters, if any, are trained with the network's."""
        super().__init__()
        self.model = model
        self.body = model.forward_features
        self.losses = nn.ModuleList([cast(nn.Module, loss) for loss in losses])
        self.names = tuple(name for loss in losses for name in loss.names)
        self.ratios = tuple(f"{loss.label}_grad_ratio" for loss in losses[1:])
        own = (name for loss in losses for name in getattr(loss, "gauges", ()))
        self.gauges = (*self.ratios, *own)
        self._taps: GradientTaps | None = None

    @property
    def uses_average(self) -> bool:
        """Whether a loss needs the average of the weights in every step."""
        return any(getattr(loss, "uses_average", False) for loss in self.losses)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the weighted loss terms, scalars, by name."""
        rest = [_before_forward(cast(Loss, loss), batch, progress) for loss in self.losses]
        features = self.body(batch.images)
        output = StudentOutput(features, self.model.forward_head(features))
        self._taps = GradientTaps(self.model, output) if self._is_sampled(progress) else None
        by_loss = [terms(self._taps.view() if self._taps else output) for terms in rest]
        return {name: value for terms in by_loss for name, value in terms.items()}

    def measured(self, progress: Progress) -> dict[str, Tensor]:
        """Return the gauges of the last pass, after its backward pass; empty if the step is not sampled."""
        if self._taps is None:
            return {}
        squares, self._taps = self._taps.squares(), None
        # Each rank has the gradients of its own images; summed squares give the norm of the whole batch.
        norms = list(sum_over_ranks(squares).sqrt().unbind())
        # There is nothing to compare with if the batch has no labels or the scaled gradients overflow
        # float16; such a step is left out of the means.
        first, some = norms[0].clamp(min=1e-12), (norms[0] > 0) & norms[0].isfinite()
        ratios = [torch.where(some & norm.isfinite(), norm / first, math.nan) for norm in norms[1:]]
        gauges = dict(zip(self.ratios, ratios, strict=True))
        for loss, ratio in zip(list(self.losses)[1:], ratios, strict=True):
            observe = getattr(loss, "observe", None)
            if observe is not None:
                observe(ratio, progress)
        for loss in self.losses:
            readings = getattr(loss, "readings", dict)
            gauges |= readings()
        return gauges

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Tell the losses the reduced precision in which to run other networks; None keeps float32."""
        for loss in self.losses:
            compute_in = getattr(loss, "compute_in", None)
            if compute_in is not None and dtype is not None:
                compute_in(dtype)

    def _is_sampled(self, progress: Progress) -> bool:
        every = math.ceil(progress.steps_per_epoch / SAMPLES_PER_EPOCH)
        return bool(self.ratios) and progress.step % progress.steps_per_epoch % every == 0


def _before_forward(loss: Loss, batch: Batch, progress: Progress) -> Terms:
    """Run what a loss does before the student's forward pass, if anything; return the rest of the loss."""
    ahead = getattr(loss, "ahead", None)
    if ahead is None:
        return lambda output: loss(batch, output, progress)
    return cast(Terms, ahead(batch, progress))
