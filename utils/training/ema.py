"""The exponential moving average of a model, evaluated and saved in its place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from models.yolo import Model

Pairs = tuple[list[Tensor], list[Tensor]]


class ModelEma(AveragedModel):
    """Average of all floating-point state, including batch norm statistics.

    The decay grows with the number of updates, limit * (1 - exp(-updates / tau)), so that an early average
    is not tied to random weights. Integer buffers are copied. With the usual values a short run is hardly
    averaged: after 400 updates the average spans 1.2 of them.
    """

    def __init__(self, model: Model, limit: float = 0.9999, tau: float = 2000.0) -> None:
        """`limit` is the decay after many updates, `tau` the number of updates to reach 63% of it."""
        super().__init__(model, use_buffers=True)
        self.limit, self.tau, self.updates = limit, tau, 0
        self.requires_grad_(False).eval()
        # Cached: walking both networks would take a millisecond or two per update.
        self._pairs: tuple[Model, Pairs, Pairs] | None = None

    @property
    def model(self) -> Model:
        """The averaged network, in eval mode."""
        return cast(Model, self.module)

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Update the average from the model after an optimizer step.

        Neither of the two may move to another device after the first call.

        `update_parameters` is not used, as it sends its counter to the device in every call and synchronises.
        """
        if self._pairs is None or self._pairs[0] is not model:
            self._pairs = (model, *_paired(self.model, model))
        _, floating, rest = self._pairs
        # The first update replaces the average's initial weights.
        decay = self.limit * (1 - math.exp(-(self.updates + 1) / self.tau)) if self.updates else 0.0
        self.updates += 1
        self.n_averaged.fill_(self.updates)
        torch._foreach_lerp_(*floating, 1 - decay)
        if rest[0]:
            torch._foreach_copy_(*rest)


def _paired(own: Model, other: Model) -> tuple[Pairs, Pairs]:
    """Return the tensors of both models in pairs: floating-point ones, and the rest (counters)."""
    floating: Pairs = ([], [])
    rest: Pairs = ([], [])
    for mine, theirs in zip(_tensors(own), _tensors(other), strict=True):
        pairs = floating if mine.is_floating_point() else rest
        pairs[0].append(mine)
        pairs[1].append(theirs)
    return floating, rest


def _tensors(model: Model) -> Iterator[Tensor]:
    """Yield parameters and buffers, always in the same order."""
    yield from model.parameters()
    yield from model.buffers()
