"""Looks at numbers of a GPU for which nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
Arrived = Callable[[], bool]


class Glance(Generic[_T]):
    """A tensor as it was at the look before, which has come to main memory meanwhile.

    Reading a number of a GPU waits until all that was asked of it is done, and it stands still while the next
    step is prepared. A number that is a few steps old costs nothing. In main memory a look gives the number
    of now.
    """

    def __init__(self, send: Callable[[Tensor], tuple[Tensor, Arrived]] | None = None) -> None:
        """`send` begins a copy to main memory and tells when it is there."""
        self._send = send
        self._coming: tuple[Tensor, Arrived, _T] | None = None

    def __call__(self, value: Tensor, tag: _T) -> tuple[Tensor, _T] | None:
        """What has come, with the tag that it went with, None before the first; asks for this one."""
        send = self._send
        if send is None:
            if value.device.type != "cuda":
                return value, tag
            send = sent_back
        coming = self._coming
        if coming is not None and not coming[1]():
            return None
        self._coming = (*send(value), tag)
        return None if coming is None else (coming[0], coming[2])


def sent_back(value: Tensor) -> tuple[Tensor, Arrived]:
    """A copy of a GPU's tensor in main memory, and whether it is there."""
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    host.copy_(value, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event.query
