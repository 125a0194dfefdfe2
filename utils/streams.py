"""Work that a GPU does beside other work.

What is asked of a GPU waits in a queue, a stream. What waits in two of them is done side by side where there
is room: a small kernel, or a copy, beside a large kernel. A CPU has none of this and does all in turn.

Memory needs no care as long as a piece that is begun is joined before the next one begins: torch gives
memory of one stream to nothing of another, and each of the two waits for the other once in between.
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
def _second(device: torch.device) -> torch.cuda.Stream:
    """For work whose result is waited for: its kernels come first (those of a record as recorded)."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


@functools.cache
def _for_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """Work that follows what was asked for so far, beside what is asked for from here on."""
    if device.type != "cuda":
        yield
        return
    second = _second(device)
    second.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(second):
        yield


def joined_side_stream(device: torch.device, work: Callable[[], _T]) -> Callable[[], _T]:
    """The rest of what was begun beside, done when it is called; a CPU does it at once.

    What is asked for after the call may use all of its results. Reading a value in it waits for this work
    alone and leaves the GPU the other, so it is best called when that is asked for.
    """
    if device.type != "cuda":
        done = work()
        return lambda: done

    def join() -> _T:
        second, first = _second(device), torch.cuda.current_stream(device)
        try:
            with torch.cuda.stream(second):
                return work()
        finally:
            first.wait_stream(second)

    return join


def copied_on_side_stream(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device; from page-locked memory to a GPU while it computes what was asked for before."""
    if device.type != "cuda" or not values.is_pinned():
        return values.to(device, non_blocking=True)
    copies, first = _for_copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        there = values.to(device, non_blocking=True)
    first.wait_stream(copies)
    there.record_stream(first)  # its memory is the other stream's, which must not take it back too early
    return there
