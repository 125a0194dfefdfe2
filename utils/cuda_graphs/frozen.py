"""The passes of networks that are not trained as CUDA graphs: of teachers, and of networks that detect."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from utils.cuda_graphs.capture import (
    CapturePlace,
    Captures,
    capture_key,
    captured,
    on_stream,
)
from utils.losses.recipe import Body

Record = Callable[[Body, Tensor], Body]


class Replayed:
    """The body of a frozen network, captured for the first input shapes it has seen a few batches of.

    Batches of other shapes are computed eagerly. All replays of a shape return the same memory: the feature
    maps are valid until the next call.
    """

    def __init__(self, body: Body, warn: Callable[[str], None], record: Record, shapes: int = 1) -> None:
        """`record` captures; `warn` gets a message if it fails. shapes: the number that is captured."""
        self._body, self._record = body, record
        problem = "the network's forward pass cannot be recorded ({}): it runs as it is"
        self._captures = Captures[Body](shapes, problem, warn)

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps for images (B, 3, H, W), without gradient."""
        capture = partial(self._record, self._body, images)
        return (self._captures.of(capture_key(images), images.device, capture) or self._body)(images)


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
