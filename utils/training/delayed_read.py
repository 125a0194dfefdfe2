"""Reading GPU values without synchronising."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
Arrived = Callable[[], bool]


class DelayedRead(Generic[_T]):
    """A tensor's value from an earlier call, copied to the host in the meantime.

    Reading a GPU value waits for all queued work, and the GPU then idles while the next step is prepared. A
    value that is a few steps old costs nothing. For a CPU tensor the current value is returned.
    """

    def __init__(self, send: Callable[[Tensor], tuple[Tensor, Arrived]] | None = None) -> None:
        """`send` starts a copy to the host and returns it with a function that tells if it has arrived."""
        self._send = send
        self._coming: tuple[Tensor, Arrived, _T] | None = None

    def __call__(self, value: Tensor, tag: _T) -> tuple[Tensor, _T] | None:
        """Return the value requested before, with its tag, and request this one; None before the first.

        While the copy is still under way, return None and request nothing.
        """
        send = self._send
        if send is None:
            if value.device.type != "cuda":
                return value, tag
            send = copy_to_host_async
        coming = self._coming
        if coming is not None and not coming[1]():
            return None
        self._coming = (*send(value), tag)
        return None if coming is None else (coming[0], coming[2])

    def forget(self) -> None:
        """Drop the requested value, when a later one has been read otherwise."""
        self._coming = None


def copy_to_host_async(value: Tensor) -> tuple[Tensor, Arrived]:
    """Start copying a GPU tensor to pinned memory; return the copy and a function that tells if it's done."""
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    host.copy_(value, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event.query
