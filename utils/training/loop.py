"""One epoch of training: the same for every set of losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from utils.batch import Batch, Progress
from utils.datasets.loader import TrainLoader
from utils.distributed import world_size
from utils.errors import UserError
from utils.training.ema import ModelEma
from utils.training.optimizer import RateSchedule
from utils.training.step import TrainingStep

MAX_GRADIENT_NORM = 10.0
BAR_FACTS = ("Instances", "Size")  # of the last batch, beside the means of the terms


@dataclass
class Meters:
    """Running means of scalars, summed on the device and read only when shown."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def update(self, values: dict[str, Tensor]) -> None:
        """Adds one value of each name."""
        for name, value in values.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The mean of each name so far; waits for the device."""
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}


@dataclass(frozen=True)
class MultiScale:
    """Random image sizes, from half to one and a half times the nominal one.

    The size is a pure function of seed and step, so a resumed run draws the same ones.
    """

    image_size: int
    stride: int
    seed: int

    def __call__(self, batch: Batch, progress: Progress) -> Batch:
        """The batch with its images resized to multiples of the stride."""
        rng = np.random.default_rng((self.seed, progress.step))
        low, high = self.image_size // 2, self.image_size * 3 // 2 + self.stride
        longest = max(int(rng.integers(low, high)) // self.stride * self.stride, self.stride)
        factor = longest / max(batch.images.shape[2:])
        size = [math.ceil(side * factor / self.stride) * self.stride for side in batch.images.shape[2:]]
        images = F.interpolate(batch.images, size=size, mode="bilinear", align_corners=False)
        return replace(batch, images=images.contiguous(memory_format=torch.channels_last))


@dataclass
class Trainer:
    """Everything an epoch needs, and the two counters that go on between epochs.

    amp_dtype: reduced precision of the forward pass, None for float32. multi_scale: see MultiScale.
    show: called with the epoch's loader and gives the progress bar to iterate over.
    pending: batches whose gradients wait for the next update.
    """

    step: TrainingStep
    optimizer: Optimizer
    schedule: RateSchedule
    ema: ModelEma
    device: torch.device
    scaler: torch.amp.GradScaler
    amp_dtype: torch.dtype | None = None
    multi_scale: Callable[[Batch, Progress], Batch] | None = None
    pending: int = 0

    def run_epoch(
        self,
        loader: TrainLoader,
        epoch: int,
        epochs: int,
        show: Callable[[TrainLoader], tqdm[Batch]],
        watch: Callable[[Batch, Progress], None] | None = None,
    ) -> dict[str, float]:
        """Trains on every batch of the loader once; gives the mean of each term and gauge."""
        self.step.train()
        loader.set_epoch(epoch)
        meters = Meters()
        bar = show(loader)
        for index, batch in enumerate(bar):
            progress = Progress(epoch * len(loader) + index, epoch, len(loader), epochs)
            if watch is not None:
                watch(batch, progress)
            self.schedule.set_rates(self.optimizer, progress)
            batch = batch.to(self.device).to_float()
            if self.multi_scale is not None:
                batch = self.multi_scale(batch, progress)
            meters.update(self.run_batch(batch, progress))
            if index % 10 == 0 or index + 1 == len(loader):
                means = meters.means()
                _stop_if_not_finite({name: means[name] for name in self.step.names}, progress)
                facts = dict(zip(BAR_FACTS, (len(batch.targets), max(batch.images.shape[2:])), strict=True))
                bar.set_postfix({**means, **facts}, refresh=False)
        return meters.means()

    def run_batch(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Forward, backward and, when enough gradients have come together, an update."""
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            terms, gauges = self.step(batch, progress)
        total = torch.stack([value.float() for value in terms.values()]).sum()
        self.scaler.scale(total * (len(batch.images) * world_size())).backward()  # type: ignore[no-untyped-call]
        self.pending += 1
        if self.pending >= self.schedule.accumulate(progress):
            self.update()
        return {**terms, **gauges}

    def update(self) -> None:
        """Clips the gradients, moves the weights and the average."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.step.model)
        self.pending = 0


def _stop_if_not_finite(means: dict[str, float], progress: Progress) -> None:
    """Ends a run whose losses left the numbers, before it writes them into a checkpoint."""
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"the loss is not a finite number any more ({', '.join(bad)})",
            f"epoch {progress.epoch + 1}, step {progress.step}",
            "lower lr0 or --distill-ratio, or try --no-amp; the last checkpoint is intact",
        )
