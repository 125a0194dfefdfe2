"""The optimizer and its rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from utils.batch import Progress

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
BIASES, WEIGHTS, NORMS = 0, 1, 2  # order of the parameter groups


def parameter_groups(modules: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """Trainable parameters as biases, decayed weights and norm weights (the indices above)."""
    groups: list[list[nn.Parameter]] = [[], [], []]
    for module in (part for root in modules for part in root.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            kind = BIASES if name == "bias" else NORMS if isinstance(module, _NORMS) else WEIGHTS
            groups[kind].append(parameter)
    return groups


def build_optimizer(
    modules: Sequence[nn.Module],
    kind: Literal["SGD", "Adam", "AdamW"],
    *,
    rate: float,
    momentum: float,
    weight_decay: float,
) -> Optimizer:
    """SGD with Nesterov momentum, Adam or AdamW, with decay on weights alone.

    The update runs in the fused kernels of torch: one pass over all parameters instead of several.
    """
    groups = parameter_groups(modules)
    settings = [
        {"params": parameters, "weight_decay": weight_decay if index == WEIGHTS else 0.0}
        for index, parameters in enumerate(groups)
    ]
    if kind == "SGD":
        optimizer = torch.optim.SGD(settings, lr=rate, momentum=momentum, nesterov=momentum > 0, fused=True)
        _start_momentum_at_zero(optimizer, groups)
        return optimizer
    family = torch.optim.Adam if kind == "Adam" else torch.optim.AdamW
    return family(settings, lr=rate, betas=(momentum, 0.999), fused=True)


def _start_momentum_at_zero(optimizer: Optimizer, groups: Sequence[Sequence[nn.Parameter]]) -> None:
    """Gives every parameter its momentum, of zeros, before the first step.

    Left to itself the fused kernel makes it of memory as it comes, for the first step to fill. When the
    loss scaler skips that step (an overflow is likely there), the next one takes what is in it for
    momentum. With zeros the first step is the same: 0 * momentum + gradient.
    """
    for parameter in (p for group in groups for p in group):
        momentum = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        optimizer.state[parameter]["momentum_buffer"] = momentum


@dataclass(frozen=True)
class RateSchedule:
    """Learning rates, momentum and accumulation as pure functions of progress.

    rate: base learning rate; final: its factor at the last epoch; cosine: fall along a cosine, else a
    line. warmup_epochs of linear warm-up (at least 100 steps), in which biases start from
    warmup_bias_rate and all else from 0, and momentum from warmup_momentum. Gradients of batches of
    batch_size add up to nominal_batch pictures an update.
    """

    rate: float
    final: float
    cosine: bool
    momentum: float
    warmup_epochs: float
    warmup_momentum: float
    warmup_bias_rate: float
    batch_size: int
    nominal_batch: int = 64

    def epoch_factor(self, epoch: int, epochs: int) -> float:
        """The factor on the base rate in an epoch (0-based)."""
        done = epoch / epochs
        fall = (1 - math.cos(done * math.pi)) / 2 if self.cosine else done
        return 1 - fall * (1 - self.final)

    def accumulate(self, progress: Progress) -> int:
        """Over how many batches gradients add up before an update."""
        return max(
            1, round(1 + (self.nominal_batch / self.batch_size - 1) * progress.warmed(self.warmup_epochs))
        )

    def set_rates(self, optimizer: Optimizer, progress: Progress) -> None:
        """Writes learning rates and momentum of this step into the optimizer."""
        warmed = progress.warmed(self.warmup_epochs)
        target = self.rate * self.epoch_factor(progress.epoch, progress.epochs)
        momentum = self.warmup_momentum + (self.momentum - self.warmup_momentum) * warmed
        for index, group in enumerate(optimizer.param_groups):
            start = self.warmup_bias_rate if index == BIASES else 0.0
            group["lr"] = start + (target - start) * warmed
            if "momentum" in group:  # SGD alone; the betas of Adam stay
                group["momentum"] = momentum
