"""A few steps of a run that does not take place, to say how long it would take and what it needs."""

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
from utils.datasets.loader import TrainLoader
from utils.reporting.console import duration
from utils.training.loop import Trainer
from utils.words import counted

STEPS = 4  # the first, which also sets up what later ones find ready, and some to be timed

Score = Callable[[list[Batch]], object]  # evaluates the network on these batches


@dataclass(frozen=True)
class Plan:
    """How much a run has to do: its epochs, those of them that are scored, and batches that score one."""

    epochs: int
    scored: int
    scoring_batches: int


def rehearse(
    trainer: Trainer, loader: TrainLoader, scoring: DataLoader[Batch], score: Score, plan: Plan
) -> str:
    """Trains on the first batches and scores one; gives lines that say what the whole run takes.

    Every rank has to come here: they take the same steps. The networks are not what they were then.
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
    """The median time from batch to batch, waiting for it included; without the first where there are more.

    Not the mean: a GPU records a teacher's pass in one of them.
    """
    trainer.step.train()
    loader.set_epoch(0)
    times = [time.perf_counter()]
    for number, batch in enumerate(islice(loader, STEPS)):
        trainer.train_on(batch, Progress(number, 0, len(loader), epochs))
        _wait_for(trainer.device)
        times.append(time.perf_counter())
    taken = [after - before for before, after in pairwise(times)]
    return statistics.median(taken[1:] or taken)


def _seconds_of_scoring(scoring: DataLoader[Batch], score: Score) -> float:
    batch = next(iter(scoring), None)  # there may be fewer batches than ranks
    batches = [] if batch is None else [batch]
    score(batches)  # sets up what the next time finds ready
    begun = time.perf_counter()
    score(batches)
    return time.perf_counter() - begun


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> str:
    """The most that this process has had so far, on the GPU or, without one, of the machine's memory."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        return f"{_gib(torch.cuda.max_memory_reserved(device))} of {_gib(whole)} on {device}"
    if sys.platform == "win32":
        return "not known on this system"
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{_gib(peak)} in this process, beside those that make batches"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
