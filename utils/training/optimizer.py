"""The optimizer and its learning rates."""

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
    """Return the trainable parameters as biases, decayed weights and norm weights (the indices above)."""
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
    """Build SGD with Nesterov momentum, Adam or AdamW, with weight decay on weights only.

    Uses torch's fused kernels: one pass over all parameters instead of several.
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
    """Give every parameter a zeroed momentum buffer before the first step.

    The fused kernel would otherwise allocate uninitialised memory, which the first step fills. If the loss
    scaler skips that step (an overflow is likely there), the next one would use the garbage as momentum.
    With zeros the first step is the same: 0 * momentum + gradient.
    """
    for parameter in (p for group in groups for p in group):
        momentum = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        optimizer.state[parameter]["momentum_buffer"] = momentum


@dataclass(frozen=True)
class RateSchedule:
    """Learning rates, momentum and gradient accumulation as pure functions of progress.

    rate: base learning rate; final: its factor at the end of the run; cosine: cosine decay instead of
    linear. Over warmup_epochs of linear warm-up (at least 100 steps) the learning rate of biases starts from
    warmup_bias_rate, all others from 0, and momentum from warmup_momentum. Gradients of batches of
    batch_size images accumulate to nominal_batch images per update.
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
        """Return the factor on the base learning rate in an epoch (0-based)."""
        done = epoch / epochs
        fall = (1 - math.cos(done * math.pi)) / 2 if self.cosine else done
        return 1 - fall * (1 - self.final)

    def accumulate(self, progress: Progress) -> int:
        """Return the number of batches whose gradients accumulate before an update."""
        return max(
            1, round(1 + (self.nominal_batch / self.batch_size - 1) * progress.warmed(self.warmup_epochs))
        )

    def set_rates(self, optimizer: Optimizer, progress: Progress) -> None:
        """Set the optimizer's learning rates and momentum for this step."""
        warmed = progress.warmed(self.warmup_epochs)
        target = self.rate * self.epoch_factor(progress.epoch, progress.epochs)
        momentum = self.warmup_momentum + (self.momentum - self.warmup_momentum) * warmed
        for index, group in enumerate(optimizer.param_groups):
            start = self.warmup_bias_rate if index == BIASES else 0.0
            group["lr"] = start + (target - start) * warmed
            if "momentum" in group:  # SGD only; Adam's betas stay fixed
                group["momentum"] = momentum
