"""The exponential moving average of a model that is evaluated and saved in its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from models.yolo import Model


class ModelEma(AveragedModel):
    """Averages all floating state, batch norm statistics included.

    The decay grows with the number of updates, limit * (1 - exp(-updates / tau)), so that an
    early average is not tied to random weights. Integer buffers are copied. With the usual values the
    average of a short run is hardly one: after 400 updates it looks back 1.2 of them.
    """

    def __init__(self, model: Model, limit: float = 0.9999, tau: float = 2000.0) -> None:
        """`limit` is the decay after many updates, `tau` the updates to reach 63% of it."""
        super().__init__(model, multi_avg_fn=self._average, use_buffers=True)
        self.limit, self.tau, self.updates = limit, tau, 0
        self.requires_grad_(False).eval()

    @property
    def model(self) -> Model:
        """The averaged network, in evaluation mode."""
        return cast(Model, self.module)

    def update(self, model: Model) -> None:
        """Takes the state of the model after an optimizer step into the average."""
        self.updates += 1
        self.update_parameters(model)

    @torch.no_grad()
    def _average(self, averaged: Sequence[Tensor], current: Sequence[Tensor], _count: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            decay = self.limit * (1 - math.exp(-self.updates / self.tau))
            torch._foreach_lerp_(list(averaged), list(current), 1 - decay)
        else:
            torch._foreach_copy_(list(averaged), list(current))
