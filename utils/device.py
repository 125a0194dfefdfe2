"""Device selection, copies to the device, and errors for a lack of memory."""

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
    """Return the device that an option names: "" for the first GPU, else the CPU; "cpu", "0", "cuda:1".

    Each of several processes on a machine gets its own: from a list such as "0,2", or the GPU of its
    local rank. Raises UsageError if there is no such device.
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
    torch.cuda.set_device(int(number))  # so that calls without a device (bf16 support, pinned memory) use it
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
    """Copy a CPU tensor to a device asynchronously.

    The copy is made from pinned memory, which torch caches: from pageable memory the driver may
    synchronise with the GPU.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@contextmanager
def advice_on_memory(fix: str = "a smaller --batch-size or --imgsz needs less") -> Iterator[None]:
    """Turn a lack of memory into a UserError that suggests `fix`, in terms of the script's options.

    This covers GPU memory, CPU memory and loader workers, which the system kills without a message.
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
    """Return the message if CPU memory ran out, else "". Torch and OpenCV have no exception type for it."""
    if isinstance(error, MemoryError):  # from Python and NumPy
        return reason_of(error)
    for line in str(error).splitlines():  # from a loader worker the message is inside a traceback
        for sign in _NO_MAIN_MEMORY:
            if sign in line:
                return line[line.index(sign) :].strip()
    return ""


class DeadWorkerError(UserError):
    """A loader worker has died."""


def dead_worker(error: Exception) -> DeadWorkerError:
    """Return the error to raise for a dead loader worker; `error` is what revealed it."""
    fix = "often for want of memory: fewer --workers, no --cache, in a container a larger --shm-size"
    return DeadWorkerError(
        f"a loader worker has died ({str(error) or type(error).__name__})", "--workers", fix
    )


def describe_device(device: torch.device) -> str:
    """Describe the device in words, for the first line of a run."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"{device} ({card.name}, {card.total_memory / 2**30:.0f} GiB)"
    return f"{device} ({counted(torch.get_num_threads(), 'thread')})"
