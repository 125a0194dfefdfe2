"""In which precision a run computes, and whether that is safe for its network."""

from __future__ import annotations

import torch
from torch import Tensor

from models.yolo import Model
from utils.errors import UserError
from utils.evaluation.evaluate import evaluation_mode

MEAN_TOLERANCE, WORST_TOLERANCE = 0.01, 0.2  # of probabilities; bf16 keeps three digits of each product


def amp_dtype(wanted: bool, kind: str, device: torch.device) -> torch.dtype | None:
    """The reduced precision of the forward pass: none on a CPU, bf16 where the card computes it."""
    if not wanted or device.type != "cuda":
        return None
    if kind == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if kind == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("this GPU does not compute in bf16", "--amp-dtype bf16", "use --amp-dtype fp16")
    return torch.bfloat16 if kind == "bf16" else torch.float16


@torch.no_grad()
def agrees(model: Model, images: Tensor, dtype: torch.dtype) -> bool:
    """Whether a network says of images (B, 3, H, W), 0..1, in reduced precision what it says in float32.

    Compared are the probabilities of all cells. Some cards and some networks (logits beyond what
    float16 holds) give NaN or noise. The model comes back in the mode it came in.
    """
    with evaluation_mode(model):
        exact = model.forward_head(model.forward_features(images))
        with torch.autocast(images.device.type, dtype):
            reduced = model.forward_head(model.forward_features(images))
    errors = [(a.float().sigmoid() - b.float().sigmoid()).abs() for a, b in zip(exact, reduced, strict=True)]
    worst = torch.stack([error.max() for error in errors]).max()
    mean = torch.stack([error.mean() for error in errors]).max()
    return bool(worst.isfinite()) and float(worst) < WORST_TOLERANCE and float(mean) < MEAN_TOLERANCE
