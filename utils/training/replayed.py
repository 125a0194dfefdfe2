"""Networks, and with them the losses, as CUDA graphs.

A network's forward pass is some hundred kernels, its backward pass twice as many, each launched by the
CPU. On a fast GPU that takes longer than the kernels do. Captured once, they are launched together.

The weights stay in place, so optimizer, EMA, weight files and run state are unaffected; a replay runs the
same kernels on the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from models.modes import in_mode
from models.yolo import Model
from utils.cuda_graphs.capture import (
    WARM_CALLS,
    CapturePlace,
    capture_key,
    captured,
    captured_with_room,
    on_stream,
)
from utils.cuda_graphs.frozen import Replayed, recorded
from utils.errors import reason_of
from utils.losses.recipe import Body
from utils.training.loop import Trainer, cudnn_autotuning
from utils.training.replayed_terms import ReplayedTerms, recorded_terms

Warn = Callable[[str], None]


class ReplayedStudent:
    """The student's body: in training, batches of the captured shape are replayed, forward and backward."""

    def __init__(self, model: Model, replay: Body, key: tuple[object, ...], body: Body) -> None:
        """Images with this `capture_key` are replayed, others run through `body`."""
        self._model, self._replay, self._key, self._body = model, replay, key, body

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps for images (B, 3, H, W); replayed ones are valid until the next call."""
        is_step = self._model.training and torch.is_grad_enabled()
        body = self._replay if is_step and capture_key(images) == self._key else self._body
        return body(images)


@dataclass(frozen=True)
class _TrainingRecord:
    """A forward pass from `given` to `maps`, and a backward pass from `map_gradients`, those of the maps.

    A map that depends on nothing trained has none.
    """

    given: Tensor
    maps: tuple[Tensor, ...]
    map_gradients: tuple[Tensor | None, ...]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class _Passes(torch.autograd.Function):
    """The captured passes as a single operation; its backward pass adds to the parameters' gradients."""

    @staticmethod
    def forward(ctx: Any, record: _TrainingRecord, _root: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        """Replay the forward pass. `_root` requires a gradient, so that the maps do."""
        ctx.record = record
        ctx.set_materialize_grads(False)
        record.given.copy_(images)
        record.forward.replay()
        maps = tuple(level.detach() for level in record.maps)
        without = (level for level, own in zip(maps, record.map_gradients, strict=True) if own is None)
        ctx.mark_non_differentiable(*without)
        return maps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None]:
        """Replay the backward pass from the gradients of the maps."""
        record = ctx.record
        for own, new in zip(record.map_gradients, gradients, strict=True):
            if own is not None:
                own.zero_() if new is None else own.copy_(new)
        record.backward.replay()
        return None, None, None


def recorded_training(body: Body, images: Tensor, parameters: Sequence[Tensor]) -> Body:
    """Capture the body's forward and backward pass as CUDA graphs for images like these.

    parameters: the trained ones, each with a persistent gradient tensor, to which a replay adds. Raises
    RuntimeError if something cannot be captured.
    """

    def parameter_gradients(
        maps: tuple[Tensor, ...], map_gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        pairs = [(level, seed) for level, seed in zip(maps, map_gradients, strict=True) if seed is not None]
        outputs, seeds = [level for level, _ in pairs], [seed for _, seed in pairs]
        return torch.autograd.grad(outputs, parameters, seeds, allow_unused=True)

    def zeros(maps: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        return tuple(torch.zeros_like(level) if level.requires_grad else None for level in maps)

    given = images.clone(memory_format=torch.preserve_format)
    place = CapturePlace(images.device)
    with on_stream(place.stream):
        for _ in range(WARM_CALLS):
            maps = body(given)
            parameter_gradients(maps, zeros(maps))
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with captured(forward, place):
        maps = body(given)
    map_gradients = zeros(maps)
    with captured(backward, place):
        found = zip(parameters, parameter_gradients(maps, map_gradients), strict=True)
        grown = [(p.grad, new) for p, new in found if p.grad is not None and new is not None]
        torch._foreach_add_([kept for kept, _ in grown], [new for _, new in grown])
    # Detached: autograd nodes kept alive would tie later backward passes to this stream.
    record = _TrainingRecord(given, tuple(level.detach() for level in maps), map_gradients, forward, backward)
    root = torch.zeros((), device=images.device, requires_grad=True)
    return lambda images: cast("tuple[Tensor, ...]", _Passes.apply(record, root, images))


@contextmanager
def temporary_training_mode(model: Model) -> Iterator[None]:
    """Put a model into training mode; afterwards restore its buffers and its modules' modes."""
    buffers = list(model.buffers())
    before = [value.clone() for value in buffers]
    try:
        with in_mode(model, training=True):
            yield
    finally:
        with torch.no_grad():
            for value, kept in zip(buffers, before, strict=True):
                value.copy_(kept)


def replays_student(trainer: Trainer) -> bool:
    """Return whether the student can be replayed: on a GPU, with a fixed batch shape and trained layers.

    Not under DistributedDataParallel, which exchanges gradients during the backward pass.
    """
    layers = trainer.step.model.model[:-1]  # --freeze may leave only the head to train
    trains = any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    return trainer.device.type == "cuda" and trainer.fixed_shapes and trainer.parallel is None and trains


def replay_student(trainer: Trainer, images: Tensor, warn: Warn) -> bool:
    """Capture the body of the trained network for images like these, (B, 3, H, W); return whether it worked.

    The network runs eagerly if the GPU has too little memory for the graph beside a batch of another shape,
    or if something cannot be captured. From here on gradients accumulate in persistent tensors.
    """
    trainer.keep_gradients()
    try:
        trainer.step.body = captured_with_room(trainer.device, partial(_student_body, trainer, images))
    except RuntimeError as error:  # includes out of memory
        warn(f"the network's passes cannot be recorded ({reason_of(error)}): they run as they are")
        return False
    return True


def _student_body(trainer: Trainer, images: Tensor) -> Body:
    """Return the captured body. Raises RuntimeError if something cannot be captured."""
    model, dtype = trainer.step.model, trainer.amp_dtype
    trained = [p for p in model.parameters() if p.requires_grad]
    precision = torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False)
    with temporary_training_mode(model), cudnn_autotuning(trainer.autotune_cudnn), precision:
        key = capture_key(images)
        replay = recorded_training(trainer.step.body, images, trained)
    return ReplayedStudent(model, replay, key, trainer.step.body)


def capture_places(trainer: Trainer) -> list[CapturePlace]:
    """Return a place for each loss: its terms follow its frozen networks, whose outputs they read."""
    awaited = [getattr(loss, "awaits_networks", False) for loss in trainer.step.losses]
    return [CapturePlace(trainer.device, urgent=urgent) for urgent in awaited]


def replay_frozen(trainer: Trainer, places: Sequence[CapturePlace], warn: Warn) -> None:
    """Let the losses run their frozen networks as CUDA graphs."""
    for loss, place in zip(trainer.step.losses, places, strict=True):
        replay_networks = getattr(loss, "replay_networks", None)
        if replay_networks is not None:
            replay_networks(partial(Replayed, warn=warn, record=partial(recorded, place=place)))


def replay_losses(trainer: Trainer, places: Sequence[CapturePlace], warn: Warn) -> None:
    """Let the losses compute their terms as CUDA graphs, as far as they can."""
    for loss, place in zip(trainer.step.losses, places, strict=True):
        replay_terms = getattr(loss, "replay_terms", None)
        if replay_terms is not None:
            replay_terms(partial(ReplayedTerms, warn=warn, record=partial(recorded_terms, place=place)))


def replay_step(trainer: Trainer, shape: tuple[int, int, int, int], warn: Warn) -> None:
    """Let the networks and losses of a trainer run as CUDA graphs, on a GPU with a fixed batch shape."""
    places = capture_places(trainer)
    if trainer.device.type == "cuda" and trainer.fixed_shapes:
        replay_frozen(trainer, places, warn)
    if replays_student(trainer):
        images = torch.zeros(shape, device=trainer.device).to(memory_format=torch.channels_last)
        if replay_student(trainer, images, warn):
            replay_losses(trainer, places, warn)
