"""The precision a run computes in, and whether that is safe for its network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from models.modes import in_mode
from models.yolo import Model
from utils.batch import Batch
from utils.distributed import from_all
from utils.errors import UserError
from utils.training.loop import Trainer

MEAN_TOLERANCE, WORST_TOLERANCE = 0.01, 0.2  # error of probabilities; bf16 keeps three digits of each product


# CPU capabilities, as torch names them, with which bf16 products are faster than float32.
CPU_BF16 = ("amx_bf16", "avx512_bf16", "avx10_2", "bf16", "sve_bf16")


def amp_dtype(wanted: bool, kind: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype of the forward pass: on a GPU bf16 if it supports that, else fp16.

    None is float32: on a CPU, unless bf16 is requested. Raises UserError if the device lacks the requested
    precision.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        kind, instead = "bf16" if kind == "auto" and has_bf16 else kind, "use --amp-dtype fp16"
    else:
        kind, instead = "" if kind == "auto" else kind, "leave it out, float32 is faster here"
        has_bf16 = device.type == "cpu" and cpu_computes_bf16()
    if not wanted or not kind:
        return None
    if kind == "bf16":
        if not has_bf16:
            raise UserError(
                f"this {device.type.upper()} does not compute in bf16", "--amp-dtype bf16", instead
            )
        return torch.bfloat16
    if device.type != "cuda":
        raise UserError("is for GPUs", "--amp-dtype fp16", "leave it out, or try bf16")
    return torch.float16


def teacher_dtype(wanted: bool, kind: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype for networks that are only evaluated: that of the run, see `amp_dtype`.

    If the run uses float32, it is bf16 on a CPU with bf16 instructions: inference needs no more.
    """
    dtype = amp_dtype(wanted, kind, device)
    if dtype is None and wanted and device.type == "cpu" and cpu_computes_bf16():
        return torch.bfloat16
    return dtype


def cpu_computes_bf16() -> bool:
    """Return whether the CPU has bf16 instructions; without them torch converts back and forth."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)  # missing before torch 2.12
    able: Mapping[str, bool] = capabilities()
    return any(able.get(name) for name in CPU_BF16)


def settle_precision(
    trainer: Trainer,
    asked: Mapping[str, Model],
    dtype: torch.dtype | None,
    scoring: Iterable[Batch],
    warn: Callable[[str], None],
) -> None:
    """Turn reduced precision off if a network's outputs in it differ too much from float32.

    This checks the step's network, if it trains in `dtype`, and those its losses evaluate (`asked`, by
    display name), which then run in `dtype`; if the step uses float32, only these are checked. `scoring`
    provides the images.
    """
    if not all(from_all(dtype is not None)):  # CPUs may differ between ranks
        dtype = None
    learning = {} if trainer.amp_dtype is None else {"this network": trainer.step.model}
    networks = {**learning, **asked}
    if dtype is None or not networks:
        return
    batch = next(iter(scoring), None)  # there may be fewer batches than ranks
    images = None if batch is None else batch.to(trainer.device).to_float().images
    kind = str(dtype).removeprefix("torch.")
    what_now = "--amp is off" if learning else "teachers answer in float32"
    for name in disagreeing(networks, images, dtype):
        warn(f"in {kind} {name} does not say what it says in float32: {what_now}")
        trainer.amp_dtype = dtype = None
    trainer.step.compute_in(dtype)


def disagreeing(networks: Mapping[str, Model], images: Tensor | None, dtype: torch.dtype) -> list[str]:
    """Return the names of the networks for which `agrees` fails on some rank.

    images: (B, 3, H, W), 0..1; None on a rank without any.
    """
    return [
        name
        for name, network in networks.items()
        if not all(from_all(images is None or agrees(network, images, dtype)))
    ]


@torch.no_grad()
def agrees(model: Model, images: Tensor, dtype: torch.dtype) -> bool:
    """Return whether outputs for images (B, 3, H, W), 0..1, in reduced precision match those in float32.

    Compares the probabilities of all cells. Some GPUs and some networks (logits beyond the float16 range)
    give NaN or noise. The model is returned in its previous mode.
    """
    with in_mode(model, training=False):
        exact = model.forward_head(model.forward_features(images))
        with torch.autocast(images.device.type, dtype):
            reduced = model.forward_head(model.forward_features(images))
    errors = [(a.float().sigmoid() - b.float().sigmoid()).abs() for a, b in zip(exact, reduced, strict=True)]
    worst = torch.stack([error.max() for error in errors]).max()
    mean = torch.stack([error.mean() for error in errors]).max()
    return bool(worst.isfinite()) and float(worst) < WORST_TOLERANCE and float(mean) < MEAN_TOLERANCE
