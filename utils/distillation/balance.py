"""A weight of the distillation loss that adapts to the gradients (`--distill-ratio auto`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOWEST, HIGHEST = 1e-4, 1e6
STEP_LIMIT = 4.0  # the largest factor by which a single batch changes the weight


class GradientBalance(nn.Module):
    """Keeps the loss's gradient norm at a given ratio to that of the ground-truth loss.

    The first measurement sets the weight, each later one moves it half of the way (in log space).
    It is kept in buffers: a resumed run restores it, and updates do not synchronise with the GPU.
    """

    def __init__(self, target: float) -> None:
        """`target` is the ratio of gradient norms to maintain."""
        super().__init__()
        self.target = target
        self.weight: Tensor
        self.seen: Tensor
        self.register_buffer("weight", torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self) -> Tensor:
        """Return the weight, a float32 scalar without gradient; a copy, as `observe` changes it in place."""
        return self.weight.clone()

    @torch.no_grad()
    def observe(self, measured: Tensor, factor: float) -> None:
        """Update the weight from a measured ratio, the same on all ranks; not finite if there was none.

        `factor` is the schedule's, which is intended and must not be compensated for.
        """
        if factor <= 0:
            return
        change = self.target * factor / measured.float()
        usable = measured.isfinite() & (measured > 0)
        later = change.sqrt().clamp(1 / STEP_LIMIT, STEP_LIMIT)
        change = torch.where(self.seen == 0, change, later)
        # In place: DistributedDataParallel holds references to the buffers that it saw at the start.
        self.weight.copy_(torch.where(usable, self.weight * change, self.weight).clamp(LOWEST, HIGHEST))
        self.seen.add_(usable.long())
