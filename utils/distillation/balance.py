"""A weight of the distillation loss that follows the gradients (`--distill-ratio auto`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOWEST, HIGHEST = 1e-4, 1e6
STEP_LIMIT = 4.0  # one odd batch moves the weight no further than this


class GradientBalance(nn.Module):
    """Holds the norm of the loss's gradient at a part of that of the labels' loss.

    The first measurement sets the weight, each later one moves it half of the way (in logarithms).
    It lives in buffers, so that a run that goes on keeps it, and needs no look at the device.
    """

    def __init__(self, target: float) -> None:
        """`target` is the ratio of the norms that is to be held."""
        super().__init__()
        self.target = target
        self.weight: Tensor
        self.seen: Tensor
        self.register_buffer("weight", torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self) -> Tensor:
        """The weight, a float32 scalar without gradient; a copy, for the step's graph must not change."""
        return self.weight.clone()

    @torch.no_grad()
    def observe(self, measured: Tensor, factor: float) -> None:
        """Takes a measured ratio in, the same on all ranks; no finite number where there was none.

        `factor` is the schedule's, which is meant and not to be undone.
        """
        if factor <= 0:
            return
        change = self.target * factor / measured.float()
        usable = measured.isfinite() & (measured > 0)
        later = change.sqrt().clamp(1 / STEP_LIMIT, STEP_LIMIT)
        change = torch.where(self.seen == 0, change, later)
        # In place: DistributedDataParallel keeps hold of the buffers that it saw at the start.
        self.weight.copy_(torch.where(usable, self.weight * change, self.weight).clamp(LOWEST, HIGHEST))
        self.seen.add_(usable.long())
