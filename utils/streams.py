"""Work on side CUDA streams, concurrent with the main stream.

Kernels of two streams run concurrently where the GPU has room: a small kernel or a copy beside a large one.
On a CPU everything runs in order.

No `record_stream` is needed as long as each piece of side work is joined before the next one starts, and as
long as the side work's tensors that the main stream uses are kept until it is joined: the caching allocator
never gives memory of one stream to another, and the two streams wait for each other in between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the high-priority side stream; for CUDA graphs see `CapturePlace`."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """Run the block after the work enqueued so far, concurrently with the work enqueued afterwards."""
    if device.type != "cuda":
        yield
        return
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield


def joined_side_stream(device: torch.device, work: Callable[[], _T]) -> Callable[[], _T]:
    """Return a function that finishes the side work with `work` and joins it; on a CPU `work` runs at once.

    Work enqueued after that call may use all results. Reading a value within `work` synchronises with the
    side stream only and keeps the GPU busy with the main one, so call it once that has been enqueued.
    """
    if device.type != "cuda":
        done = work()
        return lambda: done

    def join() -> _T:
        side, main = _side_stream(device), torch.cuda.current_stream(device)
        try:
            with torch.cuda.stream(side):
                return work()
        finally:
            main.wait_stream(side)

    return join


def copied_on_side_stream(values: Tensor, device: torch.device) -> Tensor:
    """Copy values to a device; from pinned memory to a GPU the copy overlaps with work enqueued before."""
    if device.type != "cuda" or not values.is_pinned():
        return values.to(device, non_blocking=True)
    copies, main = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        there = values.to(device, non_blocking=True)
    main.wait_stream(copies)
    there.record_stream(main)  # allocated on the copy stream, which must not reuse the memory too early
    return there
