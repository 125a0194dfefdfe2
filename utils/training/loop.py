"""One epoch of training, the same for any set of losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from utils.batch import Batch, Progress
from utils.datasets.loader import TrainLoader
from utils.distributed import SharedBuffers, from_all, rank, world_size
from utils.training.delayed_read import DelayedRead
from utils.training.ema import ModelEma
from utils.training.exchange import GradientExchange
from utils.training.guard import StepGuard
from utils.training.optimizer import RateSchedule
from utils.training.step import TrainingStep

MAX_GRADIENT_NORM = 10.0
BAR_FACTS = ("Instances", "Size")  # of the last batch, shown after the mean loss terms


@dataclass
class Meters:
    """Running means of scalars, accumulated on the device and read only for display.

    sums: for each set of names updated together, a (2, names) tensor of sums and counts. Non-finite values
    are not counted.
    """

    sums: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    _delayed_sums: DelayedRead[tuple[tuple[str, ...], ...]] = field(default_factory=DelayedRead, repr=False)

    def update(self, values: dict[str, Tensor]) -> None:
        """Add one value for each name."""
        if not values:
            return
        names = tuple(values)
        row = torch.stack([value.detach().float() for value in values.values()])
        finite = row.isfinite()
        added = torch.stack((torch.where(finite, row, 0.0), finite.float()))
        self.sums[names] = self.sums[names] + added if names in self.sums else added

    def over_ranks(self) -> Meters:
        """Return the sums over all ranks, which call this together."""
        if world_size() == 1:
            return self
        every = Meters()
        for sums in from_all({names: sums.cpu() for names, sums in self.sums.items()}):
            for names, part in sums.items():
                every.sums[names] = every.sums[names] + part if names in every.sums else part
        return every

    def means(self) -> dict[str, float]:
        """Return the mean of each name so far, NaN without a finite value; synchronises with the GPU."""
        return _means(self.sums.items())

    def latest(self) -> dict[str, float]:
        """Like `means` without synchronising: on a GPU, the values of an earlier call (at first none)."""
        if not self.sums:
            return {}
        seen = self._delayed_sums(torch.cat(list(self.sums.values()), 1), tuple(self.sums))
        if seen is None:
            return {}
        together, layout = seen
        return _means(zip(layout, torch.split(together, [len(names) for names in layout], 1), strict=True))


def _means(parts: Iterable[tuple[tuple[str, ...], Tensor]]) -> dict[str, float]:
    """Compute the means from the (2, names) sums and counts of each set of names."""
    totals: dict[str, list[float]] = {}
    for names, sums in parts:
        for name, total, count in zip(names, *sums.tolist(), strict=True):
            entry = totals.setdefault(name, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + total, entry[1] + count
    return {name: total / count if count else math.nan for name, (total, count) in totals.items()}


@dataclass(frozen=True)
class MultiScale:
    """Random image sizes, from half to one and a half times the nominal one.

    The size is a pure function of seed and step, so a resumed run draws the same sizes.
    """

    image_size: int
    stride: int
    seed: int

    def __call__(self, batch: Batch, progress: Progress) -> Batch:
        """Return the batch with its images resized to multiples of the stride."""
        rng = np.random.default_rng((self.seed, progress.step))
        low, high = self.image_size // 2, self.image_size * 3 // 2 + self.stride
        longest = max(int(rng.integers(low, high)) // self.stride * self.stride, self.stride)
        factor = longest / max(batch.images.shape[2:])
        size = [math.ceil(side * factor / self.stride) * self.stride for side in batch.images.shape[2:]]
        images = F.interpolate(batch.images, size=size, mode="bilinear", align_corners=False)
        return replace(batch, images=images.contiguous(memory_format=torch.channels_last))


def _nothing(*_: object) -> None:
    pass


@dataclass(frozen=True)
class EpochHooks:
    """Callbacks around each step: before it, with the batch; after it; and with a warning."""

    before: Callable[[Batch, Progress], None] = _nothing
    after: Callable[[Progress], None] = _nothing
    warn: Callable[[str], None] = _nothing


@contextmanager
def cudnn_autotuning(wanted: bool) -> Iterator[None]:
    """Set cuDNN autotuning (`cudnn.benchmark`) within the context.

    Only for training: validation has many shapes, and autotuning takes longer than it saves there.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass
class Trainer:
    """Everything an epoch needs, and the state that is carried from step to step.

    amp_dtype: autocast dtype of the forward pass, None for float32. multi_scale: see MultiScale.
    guard: handles steps with non-finite numbers.
    pending: batches whose gradients await the next update. done: finished batches of the epoch, with the
    rank's means in `meters` and the time they took in `seconds`; not 0 when resuming in the middle of an
    epoch. Then, and after an epoch, rank 0 has the sums over all ranks and the others have none.
    between_steps: whether all of this state belongs to the same batch, as it does except within a step.
    parallel: the step in DistributedDataParallel; exchange: averages gradients over ranks instead. Both are
    None in a single process. shared_average: the buffers of `ema`, to be kept equal over ranks in every step,
    where it teaches. fixed_shapes: whether all batches but the last have one shape. autotune_cudnn:
    whether to use cuDNN autotuning.
    persistent_gradients: whether updates zero the gradients instead of setting them to None.
    """

    step: TrainingStep
    optimizer: Optimizer
    schedule: RateSchedule
    ema: ModelEma
    device: torch.device
    scaler: torch.amp.GradScaler
    guard: StepGuard
    amp_dtype: torch.dtype | None = None
    multi_scale: Callable[[Batch, Progress], Batch] | None = None
    pending: int = 0
    done: int = 0
    meters: Meters = field(default_factory=Meters)
    seconds: float = 0.0
    between_steps: bool = True
    parallel: nn.Module | None = None
    exchange: GradientExchange | None = None
    shared_average: SharedBuffers | None = None
    fixed_shapes: bool = False
    autotune_cudnn: bool = False
    persistent_gradients: bool = False

    def __post_init__(self) -> None:
        """Collect the parameters that every update needs."""
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.persistent_gradients |= self.exchange is not None

    def run_epoch(
        self,
        loader: TrainLoader,
        epoch: int,
        epochs: int,
        show: Callable[[TrainLoader, int], tqdm[Batch]],
        hooks: EpochHooks = EpochHooks(),  # noqa: B008 (frozen)
    ) -> dict[str, float]:
        """Train on the remaining batches of the loader; return the epoch's means over all ranks.

        show: called with the loader and the number of finished batches; returns the progress bar to iterate
        over.
        """
        self.step.train()
        loader.set_epoch(epoch, self.done)
        with cudnn_autotuning(self.autotune_cudnn):
            self._run_batches(loader, Progress(0, epoch, len(loader), epochs), show(loader, self.done), hooks)
        total = self.meters.over_ranks()
        self.meters = total if rank() == 0 else Meters()
        return total.means()

    def _run_batches(self, loader: TrainLoader, epoch: Progress, bar: tqdm[Batch], hooks: EpochHooks) -> None:
        since = time.monotonic()
        for batch in bar:
            progress = replace(epoch, step=epoch.epoch * len(loader) + self.done)
            hooks.before(batch, progress)
            self.between_steps = False
            batch, terms = self.train_on(batch, progress)
            self.meters.update(terms)
            self.done += 1
            self.between_steps = True
            warning = self.guard.check(batch, progress, terms)
            if warning is not None:
                hooks.warn(warning)
            is_last = self.done == len(loader)
            if self.done % 10 == 1 or is_last:
                means = self.meters.means() if is_last else self.meters.latest()
                facts = dict(zip(BAR_FACTS, (len(batch.targets), max(batch.images.shape[2:])), strict=True))
                bar.set_postfix({**means, **facts}, refresh=False)
            now = time.monotonic()  # without a GPU synchronisation: the sum over batches is still right
            self.seconds, since = self.seconds + now - since, now
            hooks.after(progress)

    def begin_epoch(self) -> None:
        """Reset the counts, means and time of the previous epoch."""
        self.done, self.meters, self.seconds = 0, Meters(), 0.0

    def train_on(self, batch: Batch, progress: Progress) -> tuple[Batch, dict[str, Tensor]]:
        """Run a step with a batch from the loader; return the batch as the network saw it, and its terms."""
        self.schedule.set_rates(self.optimizer, progress)
        batch = batch.to(self.device).to_float()
        if self.multi_scale is not None:
            batch = self.multi_scale(batch, progress)
        return batch, self.run_batch(batch, progress)

    def run_batch(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Run forward and backward pass, and an update once enough gradients have accumulated."""
        if self.exchange is not None:
            self.exchange.before_forward()
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            terms: dict[str, Tensor] = (self.parallel or self.step)(batch, progress)
        total = torch.stack([value.float() for value in terms.values()]).sum()
        self.scaler.scale(total * (len(batch.images) * world_size())).backward()  # type: ignore[no-untyped-call]
        if self.exchange is not None:
            self.exchange.after_backward()
        gauges = self.step.measured(progress)
        self.pending += 1
        if self.pending >= self.schedule.accumulate(progress):
            self.update()
        return {**terms, **gauges}

    def keep_gradients(self) -> None:
        """Give every trained parameter a gradient tensor that persists across updates."""
        self.persistent_gradients = True
        for parameter in self._parameters:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def update(self) -> None:
        """Clip the gradients and update weights and EMA; a non-finite gradient leaves the weights unchanged.

        The scaler skips the optimizer step on the device, so the host need not synchronise. As the host
        does not learn of it, the EMA is updated even then: it moves further towards the unchanged weights.
        """
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM)
        self.guard.record_norm(norm)
        self.scaler.step(self.optimizer)
        # Only float16 uses loss scaling; otherwise the scale stays at 1.
        self.scaler.update(None if self.amp_dtype is torch.float16 else 1.0)
        self.optimizer.zero_grad(set_to_none=not self.persistent_gradients)
        self.ema.update(self.step.model)
        if self.shared_average is not None:
            self.shared_average.share()
        self.pending = 0
