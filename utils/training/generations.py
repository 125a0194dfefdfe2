"""The folder of an evolution: finished generations, their outcomes, and which one is next.

Several processes, on one machine or on several that share the folder, may work in it at once. Each claims
free generations one at a time: it holds the lock of the generation's folder while training, and that of
the whole evolution while choosing the next generation or recording an outcome. A process that dies
releases both, so that another one can take over its generation.
"""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config.files import (
    one_at_a_time,
    refusals,
    release_folder,
    remove_unfinished,
    try_claim,
    write_text_atomically,
)
from utils.config.hyperparameters import Hyperparameters, load_hyperparameters
from utils.config.schema import read_text, settings_from, yaml_text
from utils.config.settings import settings_of
from utils.errors import UserError
from utils.training.genes import Ancestor, offspring

CSV_NAME, BEST_NAME, LOCK_NAME = "evolve.csv", "hyp_evolved.yaml", ".evolve.lock"
HYP_NAME = "hyp.yaml"  # of a generation, in its folder; in the evolution's folder, the initial ones
_FOLDER = re.compile(r"generation(\d+)")
_NUMBER, _FITNESS, _FAILURE = "generation", "fitness", "failure"


@dataclass(frozen=True)
class Task:
    """A generation for this process to train: number (0-based), folder and hyperparameters."""

    number: int
    folder: Path
    hyp: Hyperparameters


@dataclass(frozen=True)
class Outcome:
    """The outcome of a generation: scores by column of results.csv; why it failed, "" if it did not."""

    number: int
    hyp: Hyperparameters
    fitness: float
    scores: Mapping[str, float]
    failure: str = ""


class Generations:
    """The generations of an evolution, including those of other processes."""

    def __init__(self, folder: Path, start: Hyperparameters, seed: int, warn: Callable[[str], None]) -> None:
        """`folder` exists; `start` and `seed` are those the evolution was started with."""
        self.folder, self.start, self.seed, self._warn = folder, start, seed, warn
        self._lock, self._csv = folder / LOCK_NAME, folder / CSV_NAME

    def begin(self, count: int) -> Task | None:
        """Claim the next of `count` generations for this process; return None if none is left.

        A generation abandoned by another process comes first and keeps its hyperparameters.
        """
        with one_at_a_time(self._lock) as is_locked:
            if not is_locked:
                self._warn(f"{self.folder}: no file can be locked here, let one process alone evolve")
            remove_unfinished(self.folder)
            over = {outcome.number: outcome for outcome in self.outcomes()}
            there = self._folders()
            self._remove(folder for number, folder in there.items() if number in over)
            for number, folder in there.items():
                if number not in over and number < count and try_claim(folder):
                    return self._task(number, folder, over)
            free = (number for number in range(count) if number not in over and number not in there)
            new = next(free, None)
            if new is None:
                return None
            folder = self.folder / f"generation{new}"
            with refusals("cannot be made", folder):
                folder.mkdir()
            try_claim(folder)
            return self._task(new, folder, over)

    def record(self, outcome: Outcome, conclude: Callable[[Sequence[Outcome]], None]) -> list[Outcome]:
        """Record an outcome, remove the generation's folder and return all outcomes so far.

        conclude: called with the outcomes while the lock keeps other processes from changing them.
        """
        with one_at_a_time(self._lock):
            outcomes = self.outcomes()
            if outcome.number not in {other.number for other in outcomes}:
                outcomes = sorted([*outcomes, outcome], key=lambda other: other.number)
                write_text_atomically(self._csv, _table(outcomes))
            write_best(self.folder / BEST_NAME, outcomes)
            conclude(outcomes)
            folder = self.folder / f"generation{outcome.number}"
            release_folder(folder)
            self._remove([folder])
        return outcomes

    def withdraw(self, task: Task) -> bool:
        """Undo `begin`; return whether the evolution has no finished or started generation left."""
        with one_at_a_time(self._lock):
            release_folder(task.folder)
            self._remove([task.folder])
            return not self._csv.exists() and not self._folders()

    def outcomes(self) -> list[Outcome]:
        """Return the outcomes of finished generations, sorted by number.

        Raises:
            UserError: a row of evolve.csv is invalid.
        """
        if not self._csv.exists():
            return []
        rows = csv.DictReader(io.StringIO(read_text(self._csv)))
        try:
            found = {outcome.number: outcome for outcome in (self._outcome(row, rows) for row in rows)}
        except csv.Error as error:
            raise self._damage(error, rows) from error
        return [found[number] for number in sorted(found)]

    def at_work(self) -> list[int]:
        """Return the numbers of the generations that have started but not finished."""
        over = {outcome.number for outcome in self.outcomes()}
        return sorted(set(self._folders()) - over)

    def _outcome(self, row: dict[str, Any], rows: csv.DictReader[str]) -> Outcome:
        try:
            cells = {name: row[name] for name in settings_of(Hyperparameters) if row.get(name)}
            hyp = settings_from(Hyperparameters, cells, {}, self._csv)
            scores = {name: float(row[name]) for name in row if name and "/" in name and row[name]}
            number, fitness = int(row[_NUMBER]), float(row[_FITNESS])
            if number < 0 or fitness < 0 or not math.isfinite(fitness):
                raise ValueError(f"generation {number}, fitness {fitness}")
        except (KeyError, TypeError, ValueError, UserError) as error:
            raise self._damage(error, rows) from error
        return Outcome(number, hyp, fitness, scores, row.get(_FAILURE) or "")

    def _damage(self, error: Exception, rows: csv.DictReader[str]) -> UserError:
        fix = "fix the line or remove it, or begin anew with another --name"
        place = f"{self._csv}, line {rows.line_num}"
        return UserError(f"is not a generation of an evolution ({error})", place, fix)

    def _task(self, number: int, folder: Path, over: Mapping[int, Outcome]) -> Task:
        path = folder / HYP_NAME
        if path.is_file():
            return Task(number, folder, load_hyperparameters(path))
        ancestors = [Ancestor(over[other].hyp, over[other].fitness) for other in sorted(over)]
        hyp = offspring(self.start, ancestors, number, self.seed)
        write_text_atomically(path, yaml_text(hyp.to_dict()))
        return Task(number, folder, hyp)

    def _folders(self) -> dict[int, Path]:
        found = ((_FOLDER.fullmatch(path.name), path) for path in self.folder.iterdir())
        numbered = {int(match[1]): path for match, path in found if match and _is_own(path)}
        return {number: numbered[number] for number in sorted(numbered)}

    def _remove(self, folders: Any) -> None:
        """Remove generation folders that no process has claimed; files still held by a network disk stay."""
        for folder in folders:
            if folder.is_dir() and try_claim(folder):
                release_folder(folder)
                shutil.rmtree(folder, ignore_errors=True)


def _is_own(path: Path) -> bool:
    """Return whether a folder is in the evolution itself: a link could lead to what is somebody else's."""
    return path.is_dir() and not path.is_symlink()


def best_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the fittest outcome, the first on a tie; None if no fitness is above 0."""
    best = max(outcomes, key=lambda outcome: outcome.fitness, default=None)
    return best if best is not None and best.fitness > 0 else None


def write_best(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the hyperparameters of the best generation for `--hyp`, with its scores as comments."""
    best = best_of(outcomes)
    if best is None:
        return
    scores = "\n".join(f"#   {name} {value:.5g}" for name, value in best.scores.items())
    head = f"# Generation {best.number}, the best of {len(outcomes)} so far: fitness {best.fitness:.5g}\n"
    write_text_atomically(path, f"{head}{scores}\n{yaml_text(best.hyp.to_dict())}")


def _table(outcomes: Sequence[Outcome]) -> str:
    """Return the content of evolve.csv; values are written so that reading restores the exact numbers."""
    scores = list(dict.fromkeys(name for outcome in outcomes for name in outcome.scores))
    values = [name for name in settings_of(Hyperparameters) if name in outcomes[0].hyp.to_dict()]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_NUMBER, _FITNESS, *scores, *values, _FAILURE])
    for outcome in outcomes:
        hyp = outcome.hyp.to_dict()
        cells = [outcome.scores.get(name, "") for name in scores]
        writer.writerow(
            [outcome.number, outcome.fitness, *cells, *(hyp[name] for name in values), outcome.failure]
        )
    return buffer.getvalue()
