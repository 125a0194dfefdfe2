"""How work of a GPU is recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WARM_CALLS = 3  # in which cuDNN finds its kernels; none of that may be part of a record
# Other threads go on meanwhile, such as the one that puts the loader's batches into pinned memory.
CAPTURE_MODE = "thread_local"
# Of the memory of a record, what must be free beside it: a batch of another shape, the losses, the teacher.
ROOM = 1.5


def kind_of(*tensors: Tensor) -> tuple[object, ...]:
    """What a record holds for: shapes, memory order, and the precision that is computed in."""
    precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return precision, *((given.shape, given.stride(), given.dtype) for given in tensors)


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """Records what is launched into a graph.

    A failure leaves behind what torch would not: the stream of before, and a random generator that can be
    used (torch leaves it as if a record were going on).
    """
    before = torch.cuda.current_stream(stream.device)
    generator = torch.cuda.default_generators[before.device.index]
    untouched = generator.clone_state()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=CAPTURE_MODE):
            yield
    except BaseException:
        generator.graphsafe_set_state(untouched)
        raise
    finally:
        torch.cuda.set_stream(before)


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Work on another stream, for which that of before waits in the end."""
    before = torch.cuda.current_stream(stream.device)
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)


def reserved_memory(device: torch.device) -> int:
    """Bytes of a GPU that belong to this process, without what is free among them; 0 of a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def lacks_room(device: torch.device, before: int) -> bool:
    """Whether a GPU has too little memory left beside what was recorded since it was `before` bytes."""
    if device.type != "cuda":
        return False
    taken = reserved_memory(device) - before
    return torch.cuda.mem_get_info(device)[0] < ROOM * taken
