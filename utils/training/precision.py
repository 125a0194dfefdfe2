"""In which precision a run computes, and whether that is safe for its network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from models.yolo import Model
from utils.batch import Batch
from utils.distributed import from_all
from utils.errors import UserError
from utils.evaluation.evaluate import evaluation_mode
from utils.training.loop import Trainer

MEAN_TOLERANCE, WORST_TOLERANCE = 0.01, 0.2  # of probabilities; bf16 keeps three digits of each product


# Names of what a CPU can, in torch's list, with which it multiplies bf16 faster than float32.
CPU_BF16 = ("amx_bf16", "avx512_bf16", "avx10_2", "bf16", "sve_bf16")


def amp_dtype(wanted: bool, kind: str, device: torch.device) -> torch.dtype | None:
    """The reduced precision of the forward pass: on a GPU bf16 where it computes that, else fp16.

    None is float32: on a CPU, unless bf16 is asked for. Raises UserError where the device has no such
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
    """The reduced precision of networks that are only asked: that of the run, `amp_dtype`.

    Beside a run in float32 it is bf16 on a CPU that computes it: answers need no more than that.
    """
    dtype = amp_dtype(wanted, kind, device)
    if dtype is None and wanted and device.type == "cpu" and cpu_computes_bf16():
        return torch.bfloat16
    return dtype


def cpu_computes_bf16() -> bool:
    """Whether this machine's CPU has instructions for bf16; without, torch converts back and forth."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)  # a torch before 2.12 does not tell
    able: Mapping[str, bool] = capabilities()
    return any(able.get(name) for name in CPU_BF16)


def settle_precision(
    trainer: Trainer,
    asked: Mapping[str, Model],
    dtype: torch.dtype | None,
    scoring: Iterable[Batch],
    warn: Callable[[str], None],
) -> None:
    """Turns reduced precision off where a network says something else in it than in float32.

    That of the step, where it computes in `dtype`, and those that its losses have `asked`, by what to call
    them, which then compute in it; beside a step in float32 they may be the only ones. `scoring` has pictures
    to look at.
    """
    if not all(from_all(dtype is not None)):  # processors may differ
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
    """The networks, by what to call them, that do not agree on every rank; see `agrees`.

    images: (B, 3, H, W), 0..1; None where a rank has none.
    """
    return [
        name
        for name, network in networks.items()
        if not all(from_all(images is None or agrees(network, images, dtype)))
    ]


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
