"""A few trial steps of a dry run, to estimate its time and memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch.utils.data import DataLoader

from utils.batch import Batch, Progress
from utils.cuda_graphs.capture import WARM_CALLS
from utils.datasets.loader import TrainLoader
from utils.reporting.console import duration
from utils.training.loop import Trainer
from utils.words import counted

TIMED_STEPS = 3
# Before those that are timed: on a GPU networks and losses are captured as CUDA graphs.
WARM_STEPS = WARM_CALLS + 1

Score = Callable[[list[Batch]], object]  # evaluates the network on these batches


@dataclass(frozen=True)
class Plan:
    """The work of a run: its epochs, how many of them are validated, and batches per validation."""

    epochs: int
    scored: int
    scoring_batches: int


def rehearse(
    trainer: Trainer, loader: TrainLoader, scoring: DataLoader[Batch], score: Score, plan: Plan
) -> str:
    """Train on the first batches and score one; return lines that say what the whole run would take.

    Must be called on every rank, as all take the same steps. Changes the networks.
    """
    step = _seconds_of_a_step(trainer, loader, plan.epochs)
    scoring_batch = _seconds_of_scoring(scoring, score)
    whole_scoring = scoring_batch * plan.scoring_batches
    run = plan.epochs * len(loader) * step + (plan.scored + 1) * whole_scoring  # the best is scored again
    steps = f"an epoch of {counted(len(loader), 'step')} {duration(step * len(loader))}"
    return (
        f"a step takes about {duration(step)}, {steps} and {duration(whole_scoring)} to score it, "
        f"{counted(plan.epochs, 'epoch')} {duration(run)}\n"
        f"memory: {_memory(trainer.device)}"
    )


def _seconds_of_a_step(trainer: Trainer, loader: TrainLoader, epochs: int) -> float:
    """Return the median time of the steps after a warm-up, data loading included; of all if there are few."""
    warm = WARM_STEPS if trainer.device.type == "cuda" else 1
    trainer.step.train()
    loader.set_epoch(0)
    times = [time.perf_counter()]
    for number, batch in enumerate(islice(loader, warm + TIMED_STEPS)):
        trainer.train_on(batch, Progress(number, 0, len(loader), epochs))
        _wait_for(trainer.device)
        times.append(time.perf_counter())
    taken = [after - before for before, after in pairwise(times)]
    return statistics.median(taken[warm:] or taken)


def _seconds_of_scoring(scoring: DataLoader[Batch], score: Score) -> float:
    batch = next(iter(scoring), None)  # there may be fewer batches than ranks
    batches = [] if batch is None else [batch]
    score(batches)  # warm-up
    begun = time.perf_counter()
    score(batches)
    return time.perf_counter() - begun


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> str:
    """Return the peak memory of this process so far: on the GPU or, without one, in main memory."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        return f"{_gib(torch.cuda.max_memory_reserved(device))} of {_gib(whole)} on {device}"
    if sys.platform == "win32":
        return "not known on this system"
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{_gib(peak)} in this process, plus its loader workers"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
