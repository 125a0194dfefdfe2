"""`--compile`: the parts of the networks that torch.compile turns into kernels of their own.

What is compiled is a function that the step calls, never a module: weight files, averages and the state of a
run keep the names of their tensors, and scoring goes on with the networks as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from models.yolo import Model
from utils.config.options import TrainOptions
from utils.errors import StoppedError, reason_of
from utils.losses.recipe import Body
from utils.reporting.console import Console
from utils.training.loop import Trainer
from utils.training.replayed import as_before, replay_step, replays_student
from utils.training.setup import batch_of_a_rank
from utils.training.step import TrainingStep

# Steps from which on cuDNN may try its kernels: on an H200 that takes ten seconds and makes steps up to 3%
# shorter.
LONG_RUN = 10_000


class Compiler:
    """Compiles bodies of networks, and goes back to all of them as they are at the first failure.

    torch compiles at the first call of a shape, so a failure may come late; the step that meets it is done
    all the same.
    """

    def __init__(self, warn: Callable[[str], None], any_size: bool = False) -> None:
        """`warn` gets one sentence at most. any_size: kernels for pictures of every size from the start."""
        self.failed = False
        self._warn, self._any_size = warn, any_size

    def __call__(self, body: Body) -> Body:
        """The body, compiled; without `any_size` for the first shape that it sees, and as it is for others.

        To compile it again for the last, smaller batch of an epoch takes longer than it brings.
        """
        compiled = cast(Body, torch.compile(body, dynamic=self._any_size))
        shapes: list[torch.Size] = []

        def run(images: Tensor) -> tuple[Tensor, ...]:
            if not shapes:
                shapes.append(images.shape)
            if self.failed or not (self._any_size or images.shape == shapes[0]):
                return body(images)
            try:
                return compiled(images)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                # If it was no failure to compile, it comes again from here.
                maps = body(images)
                self.give_up(error)
                return maps

        return run

    def give_up(self, error: Exception) -> None:
        """Says why, once, and lets everything run as it is. A signal is no failure, and is raised again."""
        cause: BaseException | None = error
        while cause is not None:  # torch wraps what ends its work
            if isinstance(cause, StoppedError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        if not self.failed:
            self.failed = True
            self._warn(f"--compile has failed ({reason_of(error)}): going on without it")


def speed_up(
    trainer: Trainer, options: TrainOptions, image_size: int, batches: int, console: Console
) -> None:
    """Compiles the networks of a run where its options ask for it, and records them on a GPU.

    batches: of an epoch.
    """
    steps = batches * options.epochs
    trainer.tries_kernels = trainer.device.type == "cuda" and trainer.fixed_shapes and steps >= LONG_RUN
    shape = (batch_of_a_rank(options), trainer.step.model.channels, image_size, image_size)
    records = options.cuda_graphs and batches > 1  # where an epoch is one batch it may be a smaller one
    if options.compile:
        console.info("compiling the networks, which may take minutes")
        images = torch.zeros(shape, device=trainer.device).to(memory_format=torch.channels_last)
        compiler = Compiler(console.warn, options.multi_scale)
        # A record is made without the cache of autocast, and torch would compile anew for that.
        cached = not (records and replays_student(trainer))
        compile_step(trainer.step, compiler, images, trainer.amp_dtype, cached)
    if records:
        replay_step(trainer, shape, console.warn)


def compile_step(
    step: TrainingStep, compiler: Compiler, images: Tensor, dtype: torch.dtype | None, cached: bool = True
) -> None:
    """Compiles the network of a step, and those that its losses ask, for images (B, 3, H, W).

    dtype: the reduced precision of the forward pass, its weights `cached` or not. Calls all of them once, for
    a run may begin with a batch of another shape; the network of the step with its backward pass, which could
    not be caught in the middle of an update. Weights, gradients and statistics stay as they are.
    """
    step.body = compiler(step.model.forward_features)
    for loss in step.losses:
        compile_networks = getattr(loss, "compile_networks", None)
        if compile_networks is not None:
            with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
                compile_networks(compiler, images)
    try:
        _try(step.model, step.body, images, dtype, cached)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        compiler.give_up(error)


def _try(model: Model, body: Body, images: Tensor, dtype: torch.dtype | None, cached: bool) -> None:
    with as_before(model):
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None, cache_enabled=cached):
            total = torch.stack([features.float().mean() for features in body(images)]).sum()
        if total.requires_grad:
            parameters = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(total, parameters, allow_unused=True)
