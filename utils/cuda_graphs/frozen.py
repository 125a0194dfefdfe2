"""The passes of networks that are not trained as CUDA graphs: of teachers, and of networks that detect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from utils.cuda_graphs.capture import (
    WARM_CALLS,
    CapturePlace,
    capture_key,
    captured,
    captured_with_room,
    on_stream,
)
from utils.errors import reason_of
from utils.losses.recipe import Body

Record = Callable[[Body, Tensor], Body]


class Replayed:
    """The body of a frozen network, captured for the first input shapes it has seen a few batches of.

    Batches of other shapes are computed eagerly. All replays of a shape return the same memory: the feature
    maps are valid until the next call.
    """

    def __init__(self, body: Body, warn: Callable[[str], None], record: Record, shapes: int = 1) -> None:
        """`warn` gets a message if `record`, which captures, fails; then the body runs eagerly.

        shapes: the number of input shapes that are captured; the memory of each stays allocated.
        """
        self._body, self._warn, self._record = body, warn, record
        self._replays: dict[tuple[object, ...], Body] = {}  # by what the graph is valid for
        self._calls: Counter[tuple[object, ...]] = Counter()
        self._shapes = shapes

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps for images (B, 3, H, W), without gradient."""
        key = capture_key(images)
        if key not in self._replays:
            self._calls[key] += 1
            if self._calls[key] <= WARM_CALLS or len(self._replays) >= self._shapes:
                return self._body(images)
            try:
                capture = partial(self._record, self._body, images)
                self._replays[key] = captured_with_room(images.device, capture)
            except RuntimeError as error:  # includes out of memory
                self._warn(
                    f"the network's forward pass cannot be recorded ({reason_of(error)}): it runs as it is"
                )
                self._shapes = 0
                return self._body(images)
        return self._replays[key](images)


@torch.no_grad()
def recorded(body: Body, images: Tensor, place: CapturePlace) -> Body:
    """Capture the body as a CUDA graph for images like these.

    Raises RuntimeError if something in it cannot be captured.
    """
    given = images.clone(memory_format=torch.preserve_format)
    graph = torch.cuda.CUDAGraph()
    with on_stream(place.stream):
        body(given)  # per-stream set-up of libraries must not be captured
    with captured(graph, place):
        maps = body(given)

    def replay(images: Tensor) -> tuple[Tensor, ...]:
        given.copy_(images)
        graph.replay()
        return maps

    return replay
