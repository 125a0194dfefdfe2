"""`--compile`: compiles parts of the networks with torch.compile.

It compiles functions that the step calls, never modules: state dict keys in weight files, EMA and run
state stay the same, and evaluation keeps using the uncompiled networks.
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
from utils.training.replayed import replay_step, replays_student, temporary_training_mode
from utils.training.setup import batch_of_a_rank
from utils.training.step import TrainingStep

# Number of steps from which cuDNN autotuning pays off: on an H200 it takes ten seconds and makes steps up to
# 3% shorter.
LONG_RUN = 10_000


class Compiler:
    """Compiles network bodies; after the first failure all of them run uncompiled.

    torch compiles at the first call with a shape, so a failure may come late; the step in which it happens
    still completes.
    """

    def __init__(self, warn: Callable[[str], None], any_size: bool = False) -> None:
        """`warn` gets at most one message. any_size: compile for dynamic image sizes from the start."""
        self.failed = False
        self._warn, self._any_size = warn, any_size

    def __call__(self, body: Body) -> Body:
        """Return the compiled body; without `any_size` only the first shape it is given runs compiled.

        Recompiling for the smaller last batch of an epoch takes longer than it saves.
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
                # If compilation was not the cause, this raises it again.
                maps = body(images)
                self.give_up(error)
                return maps

        return run

    def give_up(self, error: Exception) -> None:
        """Warn once with the reason and run everything uncompiled; re-raise a StoppedError that caused it."""
        cause: BaseException | None = error
        while cause is not None:  # torch wraps exceptions raised while it compiles
            if isinstance(cause, StoppedError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        if not self.failed:
            self.failed = True
            self._warn(f"--compile has failed ({reason_of(error)}): going on without it")


def speed_up(
    trainer: Trainer, options: TrainOptions, image_size: int, batches: int, console: Console
) -> None:
    """Set up cuDNN autotuning, compilation and CUDA graphs for a run, as far as its options ask for them.

    batches: per epoch.
    """
    steps = batches * options.epochs
    trainer.autotune_cudnn = trainer.device.type == "cuda" and trainer.fixed_shapes and steps >= LONG_RUN
    shape = (batch_of_a_rank(options), trainer.step.model.channels, image_size, image_size)
    records = options.cuda_graphs and batches > 1  # an epoch's only batch may be a smaller one
    if options.compile:
        console.info("compiling the networks, which may take minutes")
        images = torch.zeros(shape, device=trainer.device).to(memory_format=torch.channels_last)
        compiler = Compiler(console.warn, options.multi_scale)
        # CUDA graphs are captured without autocast's weight cache, for which torch would recompile.
        cached = not (records and replays_student(trainer))
        compile_step(trainer.step, compiler, images, trainer.amp_dtype, cached)
    if records:
        replay_step(trainer, shape, console.warn)


def compile_step(
    step: TrainingStep, compiler: Compiler, images: Tensor, dtype: torch.dtype | None, cached: bool = True
) -> None:
    """Compile the network of a step and the networks its losses evaluate, for images (B, 3, H, W).

    dtype: autocast dtype of the forward pass, None for float32; cached: whether autocast caches its weights.
    Calls each network once, since a run may begin with a batch of another shape. The step's network also
    runs its backward pass, where a failure could not be handled in the middle of an update. Weights,
    gradients and batch norm statistics are left unchanged.
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
    with temporary_training_mode(model):
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None, cache_enabled=cached):
            total = torch.stack([features.float().mean() for features in body(images)]).sum()
        if total.requires_grad:
            parameters = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(total, parameters, allow_unused=True)
