"""Capturing GPU work as a CUDA graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from utils.errors import reason_of

_T = TypeVar("_T")
WARM_CALLS = 3  # before capture, for cuDNN to find its kernels, which must not be captured
# Other threads keep working during capture, such as the loader's pin-memory thread.
CAPTURE_MODE = "thread_local"
# Memory that must stay free, relative to the graph's: for a batch of another shape, the losses, the teacher.
FREE_MEMORY_RATIO = 1.5


def capture_key(*tensors: Tensor) -> tuple[object, ...]:
    """Return what a graph is valid for: shapes, strides and dtypes, and the autocast dtype."""
    precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return precision, *((given.shape, given.stride(), given.dtype) for given in tensors)


class CapturePlace:
    """The stream and the memory pool of graphs that are replayed one after the other.

    Each may use the memory that an earlier one needs only during its replay. So what a graph leaves for later
    must stay referenced while others are captured, and must not be needed any more when it, or one captured
    before it, is replayed the next time.
    """

    def __init__(self, device: torch.device, *, urgent: bool = False) -> None:
        """Create nothing yet: the device may have no streams.

        urgent: the GPU prefers the kernels of these graphs to concurrent ones. They keep the priority of the
        stream they were captured on, whatever stream they are replayed on.
        """
        self.device, self.urgent = device, urgent

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """The stream to capture on: memory is only shared within one."""
        priority = -1 if self.urgent else 0  # lower numbers come first
        return torch.cuda.Stream(self.device, priority=priority)  # type: ignore[no-untyped-call]

    @cached_property
    def pool(self) -> Any:
        """The handle of the memory pool."""
        return torch.cuda.graph_pool_handle()


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, place: CapturePlace) -> Iterator[None]:
    """Capture the work launched within the context into a graph.

    On failure it restores what torch does not: the previous stream, and the random generator, which torch
    leaves in its capturing state.
    """
    before = torch.cuda.current_stream(place.stream.device)
    generator = torch.cuda.default_generators[before.device.index]
    untouched = generator.clone_state()
    try:
        with torch.cuda.graph(graph, place.pool, place.stream, CAPTURE_MODE):
            yield
    except BaseException:
        generator.graphsafe_set_state(untouched)
        raise
    finally:
        torch.cuda.set_stream(before)


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run work on another stream; the previous stream waits for it at the end."""
    before = torch.cuda.current_stream(stream.device)
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)


def captured_with_room(device: torch.device, capture: Callable[[], _T]) -> _T:
    """Return the result of `capture`.

    Raises RuntimeError if it cannot be captured, or if too little GPU memory would be free beside it.
    """
    before = _reserved_memory(device)
    made = capture()
    if _lacks_room(device, before):
        del made  # the exception keeps this frame
        torch.cuda.empty_cache()
        raise RuntimeError("the GPU has too little memory")
    return made


class Captures(Generic[_T]):
    """What has been captured, for the first kinds of inputs that were seen a few times."""

    def __init__(self, most: int, problem: str, warn: Callable[[str], None]) -> None:
        """most: the number of kinds; the memory of each stays allocated.

        `warn` gets `problem`, with the reason in the place of {}, if a capture fails; then nothing more is
        captured.
        """
        self.made: dict[tuple[object, ...], _T] = {}
        self._calls: Counter[tuple[object, ...]] = Counter()
        self._most, self._problem, self._warn = most, problem, warn

    def of(self, key: tuple[object, ...], device: torch.device, capture: Callable[[], _T]) -> _T | None:
        """Return what was or now is captured for inputs of a kind; None if they are to be computed eagerly.

        key: the kind, see `capture_key`.
        """
        if key not in self.made:
            self._calls[key] += 1
            if self._calls[key] <= WARM_CALLS or len(self.made) >= self._most:
                return None
            try:
                self.made[key] = captured_with_room(device, capture)
            except RuntimeError as error:  # includes out of memory
                self._warn(self._problem.format(reason_of(error)))
                self._most = 0
                return None
        return self.made[key]


def _reserved_memory(device: torch.device) -> int:
    """Return the bytes of GPU memory this process holds, without free cached blocks; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def _lacks_room(device: torch.device, before: int) -> bool:
    """Return whether too little GPU memory is free beside what was captured since it held `before` bytes."""
    if device.type != "cuda":
        return False
    taken = _reserved_memory(device) - before
    return torch.cuda.mem_get_info(device)[0] < FREE_MEMORY_RATIO * taken
