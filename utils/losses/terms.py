"""Elementwise loss terms that several losses share.

All take logits, compute in float32 and reduce nothing unless their first line says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# From tensors that take a gradient, and others that do not, to a vector of terms. Nothing in it hangs on what
# the values are but the values of the result.
TermsOfTensors = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, positive_weight: float = 1.0, gamma: float = 0.0, alpha: float = 0.25
) -> Tensor:
    """The binary cross-entropy of each element, in focal form where `gamma` > 0.

    logits, targets: any equal shape; targets lie in 0..1. `positive_weight` multiplies the part of
    the positive target. In focal form an element is weighted by (1 - p_t)^gamma and alpha (positive)
    or 1 - alpha (negative).

    Source: Lin et al., Focal Loss for Dense Object Detection (arXiv 1708.02002), eq. 5.
    """
    logits, targets = logits.float(), targets.float()
    weight = None if positive_weight == 1.0 else torch.full((), positive_weight, device=logits.device)
    loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
    if gamma <= 0:
        return loss
    probability = logits.sigmoid()
    agreement = targets * probability + (1 - targets) * (1 - probability)
    balance = targets * alpha + (1 - targets) * (1 - alpha)
    # Not below 1e-7: a power of 0 has no finite gradient for gamma < 1, nor any value of less than 0.
    return loss * balance * (1 - agreement).clamp(min=1e-7).pow(gamma)


def smoothed_one_hot(classes: Tensor, class_count: int, smoothing: float = 0.0) -> Tensor:
    """Class targets (P, K) for class indices (P,): 1 - eps/2 at the class, eps/2 elsewhere."""
    targets = torch.full((len(classes), class_count), smoothing / 2, device=classes.device)
    return targets.scatter_(1, classes[:, None], 1 - smoothing / 2)


def softmax_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) * T^2 over the last dimension, which goes.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531), section 2.
    """
    log_student = F.log_softmax(student.float() / temperature, -1)
    log_teacher = F.log_softmax(teacher.float() / temperature, -1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    return divergence * temperature**2


def differentiated_at_once(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, a scalar, whose gradient is taken right away: that alone is kept for the backward pass.

    What lies between x and the value, some tensors of its size, is gone before the next term begins. x must
    be all that is trained in it.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return function(x)
    value: Tensor = _AtOnce.apply(function, x)
    return value


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.enable_grad():
            # The gradient comes before a loss scale: in float16 much of it would be 0.
            start = x.detach().float().requires_grad_()
            value = function(start)
        ctx.save_for_backward(*torch.autograd.grad(value, start))
        ctx.dtype = x.dtype
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, (gradients[0] * slope).to(ctx.dtype)
