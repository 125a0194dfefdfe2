"""Networks as CUDA graphs.

A forward pass of a network is some hundred kernels, a backward pass twice as many, and the processor has to
launch each. On a fast GPU that takes longer than the kernels do. Recorded once, they are launched together.

The weights stay where they are, so that optimizer, average, weight files and the state of a run know nothing
of it; what is replayed are the same kernels on the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from models.yolo import Model
from utils.losses.recipe import Body
from utils.training.loop import Trainer, tried_kernels

WARM_CALLS = 3  # in which cuDNN finds its kernels; none of that may be part of a record
Record = Callable[[Body, Tensor], Body]
Warn = Callable[[str], None]


class Replayed:
    """A body of a frozen network, recorded when it has seen a few batches of one shape.

    Batches of other shapes are computed as they come. The maps of a replay lie in the same memory as those
    of the one before: they are good until the next call.
    """

    def __init__(self, body: Body, warn: Warn, record: Record | None = None) -> None:
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
        except RuntimeError as error:
            self._warn(f"the teacher's forward pass cannot be recorded ({_reason(error)}): it runs as it is")
            self._replay = self._body
        return self._replay(images)


class ReplayedStudent:
    """The student's body: batches of the recorded shape are replayed, forward and backward, in training."""

    def __init__(self, model: Model, replay: Body, kind: tuple[object, ...]) -> None:
        self._model, self._replay, self._kind = model, replay, kind

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps for images (B, 3, H, W); of a replay they are good until the next call."""
        is_step = self._model.training and torch.is_grad_enabled()
        body = self._replay if is_step and _kind_of(images) == self._kind else self._model.forward_features
        return body(images)


def _kind_of(images: Tensor) -> tuple[object, ...]:
    """What a record holds for: shape, memory order, and the precision that is computed in."""
    precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return images.shape, images.stride(), images.dtype, precision


def _reason(error: RuntimeError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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


class _Body(nn.Module):
    """What `make_graphed_callables` takes: a module whose parameters get gradients."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.model.forward_features(images)


@contextmanager
def as_before(model: Model) -> Iterator[None]:
    """A model in training mode whose statistics and mode are put back afterwards."""
    buffers, was_training = list(model.buffers()), model.training
    before = [value.clone() for value in buffers]
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        with torch.no_grad():
            for value, kept in zip(buffers, before, strict=True):
                value.copy_(kept)


def replay_student(trainer: Trainer, images: Tensor, warn: Warn) -> None:
    """Lets the body of a trainer's network be replayed for batches of images like these, (B, 3, H, W).

    Where the GPU has too little memory for a record beside a batch of another shape, or where something
    cannot be recorded, the network runs as it is. Gradients are from here on added to tensors that stay:
    those of a replay are overwritten by the next, and must not become a parameter's own.
    """
    model, device = trainer.step.model, trainer.device
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    dtype = trainer.amp_dtype
    try:
        with (
            as_before(model),
            tried_kernels(trainer.fixed_shapes),
            torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False),
        ):
            kind = _kind_of(images)
            graphed = torch.cuda.make_graphed_callables(_Body(model), (images,), allow_unused_input=True)
    except RuntimeError as error:  # no memory is one, too
        warn(f"the network's passes cannot be recorded ({_reason(error)}): they run as they are")
        torch.cuda.empty_cache()
        return
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved(device) - before
    if torch.cuda.mem_get_info(device)[0] < taken:
        return
    trainer.step.body = ReplayedStudent(model, cast(Body, graphed), kind)
    trainer.keep_gradients()


def replay_frozen(trainer: Trainer, warn: Warn) -> None:
    """Lets the frozen networks of the losses be replayed."""
    for loss in trainer.step.losses:
        replay_networks = getattr(loss, "replay_networks", None)
        if replay_networks is not None:
            replay_networks(lambda body: Replayed(body, warn))


def replay_step(trainer: Trainer, shape: tuple[int, int, int, int], warn: Warn) -> None:
    """Lets the networks of a trainer be replayed, on a GPU and where batches have one shape (B, 3, H, W).

    Not the student's under DistributedDataParallel: it exchanges gradients during the backward pass.
    """
    if trainer.device.type != "cuda" or not trainer.fixed_shapes:
        return
    replay_frozen(trainer, warn)
    if trainer.parallel is None:
        images = torch.zeros(shape, device=trainer.device).to(memory_format=torch.channels_last)
        replay_student(trainer, images, warn)
