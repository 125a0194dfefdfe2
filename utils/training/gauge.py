"""Gradient norm of each loss, measured during the ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.yolo import Model
from utils.batch import StudentOutput


class GradientTaps:
    """Gives each loss its own view of a network's output and sums the gradients that flow back through it.

    The gradient is measured at the inputs of the Detect layer, or at its outputs if nothing trained leads to
    one of the inputs (`--freeze`). The head maps output gradients to its inputs with one matrix product per
    level, so that no loss needs a backward pass of its own.
    """

    def __init__(self, model: Model, output: StudentOutput) -> None:
        """`output` is that of one forward pass of the model."""
        self._head, self._output = model.head, output
        self._at_inputs = all(feature.requires_grad for feature in output.features)
        self._gradients: list[dict[int, Tensor]] = []  # per loss: gradients by level

    def view(self) -> StudentOutput:
        """Return the view of the output for the next loss."""
        gradients: dict[int, Tensor] = {}
        self._gradients.append(gradients)
        head, at_inputs = self._head, self._at_inputs

        def add(level: int, gradient: Tensor) -> None:
            gradients[level] = gradients[level] + gradient if level in gradients else gradient

        def of_level(level: int) -> Callable[[Tensor], None]:
            return lambda gradient: add(
                level, head.input_gradient(level, gradient) if at_inputs else gradient
            )

        def of_feature(level: int) -> Callable[[Tensor], None]:
            return lambda gradient: add(level, gradient)

        features = _seen(self._output.features, of_feature) if at_inputs else self._output.features
        return StudentOutput(features, _seen(self._output.levels, of_level))

    def squares(self) -> Tensor:
        """Return each loss's squared gradient norm, (losses,) float32; call it after the backward pass."""
        zero = torch.zeros((), device=self._output.levels[0].device)
        return torch.stack(
            [
                sum((gradient.float().square().sum() for gradient in gradients.values()), start=zero)
                for gradients in self._gradients
            ]
        )


def _seen(maps: Sequence[Tensor], hook_of: Callable[[int], Callable[[Tensor], None]]) -> tuple[Tensor, ...]:
    """Return views of the feature maps, each with a gradient hook."""
    views = tuple(level.view_as(level) for level in maps)
    for level, view in enumerate(views):
        if view.requires_grad:
            view.register_hook(hook_of(level))  # type: ignore[no-untyped-call]
    return views
