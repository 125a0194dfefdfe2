"""Forward passes of frozen networks as CUDA graphs.

A forward pass of a teacher is some hundred kernels, each of which the processor has to launch. On a fast GPU
that takes longer than the kernels do. Recorded once, they are launched together, and the processor is free
to prepare the student's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from utils.losses.recipe import Body
from utils.training.loop import Trainer

WARM_CALLS = 3  # in which cuDNN finds its kernels; none of that may be part of a record
Record = Callable[[Body, Tensor], Body]


class Replayed:
    """A body of a frozen network, recorded when it has seen a few batches of one shape.

    Batches of other shapes are computed as they come. The maps of a replay lie in the same memory as those
    of the one before: they are good until the next call.
    """

    def __init__(self, body: Body, warn: Callable[[str], None], record: Record | None = None) -> None:
        """`warn` gets a sentence if recording fails, after which the body goes on as it is."""
        self._body, self._warn = body, warn
        self._record = recorded if record is None else record
        self._replay: Body | None = None
        self._seen: tuple[object, ...] = ()
        self._calls = 0

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps for images (B, 3, H, W), without gradient."""
        kind = _kind_of(images)
        if self._replay is not None:
            return self._replay(images) if kind == self._seen else self._body(images)
        self._calls = self._calls + 1 if kind == self._seen else 1
        self._seen = kind
        if self._calls <= WARM_CALLS:
            return self._body(images)
        try:
            self._replay = self._record(self._body, images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._warn(f"the teacher's forward pass cannot be recorded ({reason}): it runs as it is")
            self._replay = self._body
        return self._replay(images)


def _kind_of(images: Tensor) -> tuple[object, ...]:
    """What a record holds for: shape, memory order, and the precision that is computed in."""
    precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return images.shape, images.stride(), images.dtype, precision


@torch.no_grad()
def recorded(body: Body, images: Tensor) -> Body:
    """The body for images like these, as a CUDA graph.

    Raises RuntimeError where something in it cannot be recorded.
    """
    given = images.clone(memory_format=torch.preserve_format)
    stream = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(stream):
        body(given)  # what libraries set up for a stream is no part of the record
    torch.cuda.current_stream(images.device).wait_stream(stream)
    # Other threads go on meanwhile, such as the one that puts the loader's batches into pinned memory.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        maps = body(given)

    def replay(images: Tensor) -> tuple[Tensor, ...]:
        given.copy_(images)
        graph.replay()
        return maps

    return replay


def replay_frozen(trainer: Trainer, warn: Callable[[str], None]) -> None:
    """Lets the frozen networks of the losses be replayed, on a GPU and where batches have one shape."""
    if trainer.device.type != "cuda" or not trainer.fixed_shapes:
        return
    for loss in trainer.step.losses:
        replay_networks = getattr(loss, "replay_networks", None)
        if replay_networks is not None:
            replay_networks(lambda body: Replayed(body, warn))
