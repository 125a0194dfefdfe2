"""Hyperparameter evolution: many short runs, each with values mutated from the best ones before it."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from utils.config.command import evolved_command, resume_command
from utils.config.files import one_at_a_time, refusals, write_text_atomically
from utils.config.hyperparameters import Hyperparameters, load_hyperparameters
from utils.config.options import (
    CHANGEABLE_ON_RESUME,
    DistillOptions,
    TrainOptions,
    options_from_dict,
    options_to_dict,
    yaml_text,
)
from utils.config.schema import load_yaml
from utils.config.settings import settings_of
from utils.distributed import is_distributed
from utils.errors import UsageError, UserError
from utils.evaluation.metrics import fitness
from utils.reporting.console import Console, duration
from utils.reporting.results import SCORES, read_results
from utils.training.generations import (
    BEST_NAME,
    HYP_NAME,
    LOCK_NAME,
    Generations,
    Outcome,
    Task,
    best_of,
)
from utils.training.genes import GENES
from utils.training.guard import DivergedError
from utils.training.resume import with_absolute_paths
from utils.training.state import STATE_NAME
from utils.words import counted

PROJECT = Path("runs/evolve")  # without --project
PLOT_NAME, OPTIONS_NAME = "evolve.png", "opt.yaml"
_AFFECTS_SCORES = {"epochs", "data", "data_dir", "teacher"}
# Options that may differ between processes and on resuming without making scores incomparable.
FREE = CHANGEABLE_ON_RESUME - _AFFECTS_SCORES | {
    "resume",
    "name",
    "exist_ok",
    "hyp",
    "noval",
    "check_data",
    "dry_run",
}
# What a resumed generation takes from the new command; all other options stay as they were.
_ANEW = frozenset({"device", "workers", "cache"})
_PLACES = frozenset({"data", "data_dir", "teacher", "download"})  # if given
# Trains with these options; the text says how to continue after a signal.
Train = Callable[[TrainOptions, str], object]
AnyOptions = TypeVar("AnyOptions", bound=TrainOptions)


def is_evolution(options: TrainOptions) -> bool:
    """Return whether the options start or resume an evolution."""
    return options.evolve is not None or bool(
        options.resume and os.path.exists(Path(options.resume) / LOCK_NAME)
    )


def evolve(options: TrainOptions, train: Train, console: Console) -> Path:
    """Train generations until there are as many as `--evolve` says; return the evolution's folder.

    Raises:
        UserError: among others, the folder holds an evolution whose options make scores incomparable.
    """
    if is_distributed():
        fix = "start each process by itself, with a --device of its own and the same --project and --name"
        raise UsageError("the processes of torchrun train one run together", "--evolve", fix)
    return Evolution(options, train, console).execute()


class Evolution:
    """An evolution as this process sees it."""

    def __init__(self, options: TrainOptions, train: Train, console: Console) -> None:
        """Open or create the folder and check that it holds this very evolution."""
        self.train, self.console = train, console
        self.folder, self.options, self.start = opened(options)
        assert self.options.evolve is not None
        self.count = self.options.evolve
        self.generations = Generations(self.folder, self.start, self.options.seed, console.warn)

    def execute(self) -> Path:
        """Train the remaining generations, print the outcome and return the folder."""
        begun, over_before = time.monotonic(), len(self.generations.outcomes())
        going_on = f", {over_before} of them are over" if over_before else ""
        self.console.info(f"evolving over {counted(self.count, 'generation')} in {self.folder}{going_on}")
        while (task := self.generations.begin(self.count)) is not None:
            self._announce(task)
            try:
                outcome = self._outcome(task)
            except UserError:
                # Not caused by its hyperparameters but by data, weights or disk: others would fail, too.
                if not (task.folder / "weights").exists() and self.generations.withdraw(task):
                    remove_traces(self.folder)
                raise
            outcomes = self.generations.record(outcome, self._conclude)
            self._tell(outcome, outcomes, (time.monotonic() - begun) / (len(outcomes) - over_before or 1))
            gc.collect()  # frees the loader workers and cached images of the finished run
        self._say_what_came_of_it()
        return self.folder

    def _outcome(self, task: Task) -> Outcome:
        try:
            self.train(self._options_of(task), f"go on with: {self._resume_command()}")
        except DivergedError as error:
            return Outcome(task.number, task.hyp, 0.0, {}, error.what.partition(" (")[0])
        return outcome_of(task)

    def _options_of(self, task: Task) -> TrainOptions:
        """Return options for an ordinary run in the generation's folder, without slow, unneeded outputs."""
        has_begun = (task.folder / "weights" / STATE_NAME).is_file()
        return replace(
            self.options,
            evolve=None,
            resume=str(task.folder) if has_begun else None,
            given=_ANEW | (_PLACES & self.options.given),
            hyp=task.folder / HYP_NAME,
            project=task.folder.parent,
            name=task.folder.name,
            exist_ok=True,
            noval=not self.options.image_weights,  # they need the scores of each epoch
            nosave=True,
            noplots=True,
            save_period=-1,
            logger=(),
        )

    def _announce(self, task: Task) -> None:
        first = self.start.to_dict()
        values = [f"{name} {value:g}" for name, value in task.hyp.to_dict().items() if value != first[name]]
        what = ", ".join(values) or "the hyperparameters as given"
        self.console.info(f"\ngeneration {task.number} ({task.number + 1} of {self.count}): {what}")

    def _conclude(self, outcomes: Sequence[Outcome]) -> None:
        if not self.options.noplots:
            from utils.reporting.evolution import plot_evolution  # matplotlib takes half a second to import

            hyps = [outcome.hyp.to_dict() for outcome in outcomes]
            plot_evolution(
                self.folder / PLOT_NAME,
                np.array([outcome.number for outcome in outcomes], float),
                np.array([outcome.fitness for outcome in outcomes], float),
                {name: np.array([hyp[name] for hyp in hyps], float) for name in GENES},
            )

    def _tell(self, outcome: Outcome, outcomes: Sequence[Outcome], seconds: float) -> None:
        """Print a generation's outcome, the best one so far and the time left at `seconds` per generation."""
        result = f"failed, {outcome.failure}" if outcome.failure else f"fitness {outcome.fitness:.4f}"
        best, left = best_of(outcomes), max(self.count - len(outcomes), 0)
        so_far = f"; the best is generation {best.number} with {best.fitness:.4f}" if best else ""
        time_left = f"; about {duration(left * seconds)} left" if left else ""
        self.console.info(f"generation {outcome.number}: {result}{so_far}{time_left}")

    def _say_what_came_of_it(self) -> None:
        outcomes, say = self.generations.outcomes(), self.console.info
        others = self.generations.at_work()
        if others:
            say(f"other processes are at work on generations {', '.join(map(str, others))}")
        elif len(outcomes) >= self.count:
            say(f"all {self.count} generations are over; --evolve {2 * self.count} adds as many")
        best = best_of(outcomes)
        if best is None:
            self.console.warn("no generation found anything: take more --epochs, or --weights to start from")
            return
        path = self.folder / BEST_NAME
        say(f"best of {len(outcomes)}: generation {best.number}, fitness {best.fitness:.4f}, in {path}")
        say(f"train with it: {evolved_command(self.options, path)}")

    def _resume_command(self) -> str:
        return resume_command(type(self.options), self.folder, evolve=self.count)


def outcome_of(task: Task) -> Outcome:
    """Return the outcome of a generation, from the last row of its results.csv."""
    columns = read_results(task.folder / "results.csv")
    last = {name: float(values[-1]) for name, values in columns.items() if len(values)}
    losses = [name for name in last if name.startswith("train/") and name.endswith("_loss")]
    scores = {name: last[name] for name in last if name in SCORES or name.startswith("val/")}
    if not all(math.isfinite(last[name]) for name in losses):
        return Outcome(task.number, task.hyp, 0.0, {}, "its losses are not finite numbers")
    if not scores or not all(map(math.isfinite, scores.values())):
        return Outcome(task.number, task.hyp, 0.0, {}, "its scores are not finite numbers")
    value = round(fitness(scores[SCORES[2]], scores[SCORES[3]]), 8)  # results.csv has as many digits
    return Outcome(task.number, task.hyp, value, scores)


def opened(options: AnyOptions) -> tuple[Path, AnyOptions, Hyperparameters]:
    """Return the folder of an evolution, created if it is new, its options and initial hyperparameters.

    Raises:
        UserError: it was started with other options or values, or `--resume` names no evolution.
    """
    if options.resume is not None:
        if "epochs" in options.given:
            raise UsageError("scores of other lengths cannot be compared", "--epochs", "leave it out")
        folder = _folder_to_go_on_in(options)
        saved = _saved_options(type(options), folder)
        anew = options.given & CHANGEABLE_ON_RESUME
        changed = {name: getattr(options, name) for name in anew}
        return folder, replace(saved, given=options.given, **changed), load_hyperparameters(folder / HYP_NAME)
    own_project = options.project != settings_of(type(options))["project"].default
    folder = (Path(options.project) if own_project else PROJECT) / options.name
    start = load_hyperparameters(options.hyp)
    with refusals("cannot be made", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder / LOCK_NAME):
        if (folder / OPTIONS_NAME).exists():
            _check_same(folder, options, start)
        else:
            write_text_atomically(folder / HYP_NAME, yaml_text(start.to_dict()))
            write_text_atomically(folder / OPTIONS_NAME, yaml_text(with_absolute_paths(options)))
    return folder, options, start


def remove_traces(folder: Path) -> None:
    """Remove an evolution in which no generation has started, and parent folders that are empty then."""
    for name in (OPTIONS_NAME, HYP_NAME, LOCK_NAME):
        (folder / name).unlink(missing_ok=True)
    for place in (folder, folder.parent, folder.parent.parent):
        try:
            place.rmdir()
        except OSError:
            return


def _folder_to_go_on_in(options: TrainOptions) -> Path:
    if options.resume:
        folder = Path(options.resume)
        if not (folder / LOCK_NAME).exists():
            raise UserError("is not a folder of an evolution", folder, "leave --evolve or --resume out")
        return folder
    own_project = options.project != settings_of(type(options))["project"].default
    project = Path(options.project) if own_project else PROJECT
    found = sorted(project.rglob(LOCK_NAME), key=lambda lock: os.stat(lock.parent).st_mtime)
    if not found:
        raise UserError("no evolution to resume", project, f"name one: --resume {PROJECT}/exp")
    return found[-1].parent


def _saved_options(options_class: type[AnyOptions], folder: Path) -> AnyOptions:
    data, _ = load_yaml(folder / OPTIONS_NAME)
    kind = DistillOptions if "teacher" in data else TrainOptions
    if kind is not options_class:
        raise UsageError(
            "this evolution was started by the other script", folder, resume_command(kind, folder)
        )
    return options_from_dict(options_class, data)


def _check_same(folder: Path, options: TrainOptions, start: Hyperparameters) -> None:
    """Raise UserError if scores of the existing evolution would not be comparable with new ones."""
    saved = options_to_dict(_saved_options(type(options), folder))
    now: dict[str, Any] = with_absolute_paths(options)
    differing = [
        f"{settings_of(type(options))[name].flag} {saved[name]}, now {now[name]}"
        for name in saved
        if name not in FREE and saved[name] != now[name]
    ]
    first, wanted = load_hyperparameters(folder / HYP_NAME).to_dict(), start.to_dict()
    differing += [
        f"{name} {first.get(name)}, now {wanted.get(name)}"
        for name in dict.fromkeys([*first, *wanted])
        if first.get(name) != wanted.get(name)
    ]
    if differing:
        what = f"holds an evolution with {'; '.join(differing)}"
        fix = f"give this one another --name, or go on with: {resume_command(type(options), folder)}"
        raise UserError(what, folder, fix)
