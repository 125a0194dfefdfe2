"""Which device a run computes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import torch
from torch import Tensor

from utils.distributed import is_distributed, local_rank
from utils.errors import UsageError, UserError, reason_of
from utils.words import counted

_NO_MAIN_MEMORY = ("DefaultCPUAllocator", "Failed to allocate")  # how torch and OpenCV say so


def select_device(name: str = "") -> torch.device:
    """The device that an option names: "" for the first GPU or else the CPU, "cpu", "0", "cuda:1".

    Each of several processes on a machine gets one of its own: of those named, as in "0,2", else the
    GPU of its number. Raises UsageError where it does not exist.
    """
    wanted = name.strip().lower()
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted == "":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        wanted = str(local_rank())
    elif is_distributed() or "," in wanted:
        wanted = _of_this_rank(wanted.split(","), name)
    number = wanted.removeprefix("cuda").removeprefix(":") or "0"
    if not number.isdigit():
        raise UsageError(f"no such device: {name!r}", "--device", "use cpu or the number of one GPU, as in 0")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number) >= found:
        raise UsageError(f"CUDA device {number} asked for, {found} found", "--device", "use --device cpu")
    torch.cuda.set_device(int(number))  # what is asked of "the GPU" (bf16, pinned memory) means this one
    return torch.device(f"cuda:{number}")


def _of_this_rank(wanted: list[str], name: str) -> str:
    if not is_distributed():
        start = f"torchrun --nproc_per_node {len(wanted)} train.py ..."
        raise UsageError(f"{name!r} names several", "--device", f"each needs a process: {start}")
    if local_rank() >= len(wanted):
        fix = "name as many as torchrun starts, or leave --device out"
        raise UsageError(f"{name!r} has no device for process {local_rank()}", "--device", fix)
    return wanted[local_rank()].strip()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of main memory on a device, by a copy that nobody waits for.

    From page-locked memory, which torch keeps for the next copy: of other memory the driver may wait for
    the GPU to be done with what it is at.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@contextmanager
def advice_on_memory(fix: str = "a smaller --batch-size or --imgsz needs less") -> Iterator[None]:
    """Turns a lack of memory into a UserError that says what to do: `fix`, in the options of the script.

    The GPU's memory, main memory, or that of the processes that make batches, which the system ends without
    a word.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory ({reason_of(error)})", "the GPU", fix) from error
    except (MemoryError, RuntimeError, cv2.error) as error:
        if str(error).startswith("DataLoader worker"):
            raise dead_worker(error) from error
        if lack := _lack_of_main_memory(error):
            raise UserError(f"out of memory ({lack})", "main memory", fix) from error
        raise


def _lack_of_main_memory(error: Exception) -> str:
    """What tells of it; empty where the error is another one. Torch and OpenCV have no type for it."""
    if isinstance(error, MemoryError):  # of Python and NumPy
        return reason_of(error)
    for line in str(error).splitlines():  # of a worker process they are in the midst of a traceback
        for sign in _NO_MAIN_MEMORY:
            if sign in line:
                return line[line.index(sign) :].strip()
    return ""


class DeadWorkerError(UserError):
    """A process that makes batches is gone."""


def dead_worker(error: Exception) -> DeadWorkerError:
    """What to say when a process that makes batches is gone; `error` is how that showed."""
    fix = "often for want of memory: fewer --workers, no --cache, in a container a larger --shm-size"
    return DeadWorkerError(
        f"a process that makes batches has died ({str(error) or type(error).__name__})", "--workers", fix
    )


def describe_device(device: torch.device) -> str:
    """The device in words, for the first line of a run."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"{device} ({card.name}, {card.total_memory / 2**30:.0f} GiB)"
    return f"{device} ({counted(torch.get_num_threads(), 'thread')})"
