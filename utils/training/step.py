"""One forward pass with all losses: the module that DistributedDataParallel wraps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from models.yolo import Model
from utils.batch import Batch, Progress, StudentOutput
from utils.losses.recipe import Body, Loss, Terms

SAMPLES_PER_EPOCH = 4
GAUGE_SCALE = 4096.0  # lifts the gradients of a mean over a batch into the range of float16


class TrainingStep(nn.Module):
    """The network and the losses of a run.

    names: the terms in order; gauges: the names of what is measured beside them, one gradient ratio
    for each loss after the first, and what losses measure themselves.
    body: from images to the inputs of the Detect layer, compiled or not.
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

    def forward(self, batch: Batch, progress: Progress) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted scalars by name, and gauges at the few steps of an epoch that sample them."""
        rest = [_ahead(cast(Loss, loss), batch, progress) for loss in self.losses]
        features = self.body(batch.images)
        output = StudentOutput(features, self.model.forward_head(features))
        by_loss = [terms(output) for terms in rest]
        gauges = self._gradient_ratios(by_loss, output) if self._is_sampled(progress) else {}
        for loss, ratio in zip(list(self.losses)[1:], gauges.values(), strict=False):
            observe = getattr(loss, "observe", None)
            if observe is not None:
                observe(ratio, progress)
        if gauges:
            for loss in self.losses:
                readings = getattr(loss, "readings", dict)
                gauges |= readings()
        return {name: value for terms in by_loss for name, value in terms.items()}, gauges

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Tells the losses the reduced precision of the forward pass, None for float32."""
        for loss in self.losses:
            compute_in = getattr(loss, "compute_in", None)
            if compute_in is not None and dtype is not None:
                compute_in(dtype)

    def _is_sampled(self, progress: Progress) -> bool:
        every = math.ceil(progress.steps_per_epoch / SAMPLES_PER_EPOCH)
        return bool(self.ratios) and progress.step % progress.steps_per_epoch % every == 0

    def _gradient_ratios(
        self, by_loss: Sequence[dict[str, Tensor]], output: StudentOutput
    ) -> dict[str, Tensor]:
        """Norms of the losses' gradients at the network's features, relative to the first loss's.

        At the features, not at the weights: that costs the losses' own backward pass and the 1x1
        convolutions of the head, a few percent of a step, and a step is sampled only now and then.
        """
        outputs = [*output.features] if output.features[0].requires_grad else [*output.levels]
        roots = [root for root in outputs if root.requires_grad]
        norms = []
        for terms in by_loss:
            total = torch.stack(list(terms.values())).sum() * GAUGE_SCALE
            if not roots or not total.requires_grad:
                norms.append(total.new_zeros(()))
                continue
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                total, roots, retain_graph=True, allow_unused=True
            )
            squares = [g.float().square().sum() for g in gradients if g is not None]
            norms.append(torch.stack(squares).sum().sqrt() if squares else total.new_zeros(()))
        # Without a label in the batch there is nothing to compare with; such a step counts in no mean.
        first, some = norms[0].clamp(min=1e-12), norms[0] > 0
        ratios = [torch.where(some, norm / first, math.nan) for norm in norms[1:]]
        return dict(zip(self.ratios, ratios, strict=True))


def _ahead(loss: Loss, batch: Batch, progress: Progress) -> Terms:
    """What a loss does before the network's pass, if it wants to; gives the rest."""
    ahead = getattr(loss, "ahead", None)
    if ahead is None:
        return lambda output: loss(batch, output, progress)
    return cast(Terms, ahead(batch, progress))
