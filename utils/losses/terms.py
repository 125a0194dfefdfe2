"""Loss functions shared by several losses.

Losses take logits, compute in float32 and reduce nothing unless their first line says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Maps tensors that require grad, and others that do not, to a vector of terms. Shapes and control flow must
# not depend on tensor values, so that it can be captured in a CUDA graph.
TermsOfTensors = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, positive_weight: float = 1.0, gamma: float = 0.0, alpha: float = 0.25
) -> Tensor:
    """Compute the elementwise binary cross-entropy, as focal loss if `gamma` > 0.

    logits, targets: any equal shape; targets in 0..1. `positive_weight` multiplies the positive part of
    the loss. The focal loss weights an element by (1 - p_t)^gamma and alpha (positive) or 1 - alpha
    (negative).

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
    # At least 1e-7: for gamma < 1 pow has no finite gradient at 0, and negative values give NaN.
    return loss * balance * (1 - agreement).clamp(min=1e-7).pow(gamma)


def smoothed_one_hot(classes: Tensor, class_count: int, smoothing: float = 0.0) -> Tensor:
    """Return class targets (P, K) for class indices (P,): 1 - eps/2 at the class, eps/2 elsewhere."""
    targets = torch.full((len(classes), class_count), smoothing / 2, device=classes.device)
    return targets.scatter_(1, classes[:, None], 1 - smoothing / 2)


def softmax_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute KL(softmax(teacher / T) || softmax(student / T)) * T^2, summed over the last dimension.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531), section 2.
    """
    log_student = F.log_softmax(student.float() / temperature, -1)
    log_teacher = F.log_softmax(teacher.float() / temperature, -1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    return divergence * temperature**2


def differentiated_at_once(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the scalar `function(x)`, computing its gradient at once; only that is kept for backward.

    Its intermediates, several tensors of x's size, are freed before the next term is computed. x must be
    the only input of `function` that requires grad.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return function(x)
    value: Tensor = _AtOnce.apply(function, x)
    return value


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.enable_grad():
            # In float32: the loss scale is not applied yet, so much of it would underflow in float16.
            start = x.detach().float().requires_grad_()
            value = function(start)
        ctx.save_for_backward(*torch.autograd.grad(value, start))
        ctx.dtype = x.dtype
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, (gradients[0] * slope).to(ctx.dtype)
