"""Reads back what a training run has left in its folder."""

from __future__ import annotations

import csv
import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.checkpoint import build_model, read_checkpoint
from utils.config.files import read_regular
from utils.config.hyperparameters import Hyperparameters
from utils.config.schema import load_yaml
from utils.config.settings import to_plain
from utils.config.suggestions import near_names, question
from utils.errors import UsageError, UserError
from utils.evaluation.best import Best
from utils.evaluation.metrics import fitness
from utils.reporting.results import KEY, REFERENCES_NAME, RESULTS_NAME, SCORES, TIMES_NAME, read_results

Floats = NDArray[np.float64]
Warn = Callable[[str], None]
_MAX_REFERENCES = 1 << 20  # bytes of references.json: a few dozen a teacher

# Short names of the most used columns of results.csv.
METRICS = dict(zip(("mAP50-95", "mAP50", "recall", "precision"), reversed(SCORES), strict=True))


@dataclass(frozen=True, eq=False)
class Run:
    """A run as read from its folder.

    columns: of results.csv, (E,) each. options: of opt.yaml, None if that is missing. hyp: of hyp.yaml with
    defaults for what it lacks, empty if it is missing. seconds: (E,) per epoch, NaN if not recorded.
    parameters: of its network, None if the weights are missing. references: mAP50 and mAP50-95 of its
    teachers by name.
    """

    folder: Path
    columns: dict[str, Floats]
    options: dict[str, Any] | None
    hyp: dict[str, Any]
    seconds: Floats
    parameters: int | None
    references: dict[str, tuple[float, float]]

    @property
    def epochs(self) -> int:
        """The number of finished epochs."""
        return len(self.seconds)

    @property
    def planned(self) -> int:
        """The number of planned epochs; that of finished ones if unknown or if they are more."""
        planned = (self.options or {}).get("epochs")
        return max(self.epochs, planned) if isinstance(planned, int) else self.epochs

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done, or the run has stopped early by its --patience."""
        return self.epochs >= self.planned or self._is_given_up()

    def _is_given_up(self) -> bool:
        """Return whether no score has improved for --patience epochs."""
        options = self.options or {}
        patience = options.get("patience")
        map50, map50_95 = (self.columns.get(METRICS[name]) for name in ("mAP50", "mAP50-95"))
        if not isinstance(patience, int) or map50 is None or map50_95 is None:
            return False
        best, scored = Best(), np.isfinite(map50 + map50_95)
        for epoch in np.flatnonzero(scored).tolist():
            best = best.after(epoch, fitness(map50[epoch], map50_95[epoch]))
        return bool(scored.any()) and best.is_given_up(patience, bool(options.get("noval")), self.epochs)

    @property
    def seed(self) -> int | None:
        """The seed, None if unknown."""
        seed = (self.options or {}).get("seed")
        return seed if isinstance(seed, int) else None

    def curve(self, metric: str) -> tuple[Floats, Floats]:
        """Return epochs (from 1) and values of a metric where recorded. Raises UserError if it never was."""
        column = column_of(metric)
        if column not in self.columns:
            known = [*METRICS, *(name for name in self.columns if name != KEY)]
            near = [] if metric in METRICS else near_names(metric, known, 1)
            fix = question(near, f"it has {', '.join(name for name in self.columns if name != KEY)}")
            raise UserError(f"has no column {column}", self.folder / RESULTS_NAME, fix)
        numbers = self.columns.get(KEY, np.arange(self.epochs, dtype=np.float64)) + 1
        taken = np.isfinite(self.columns[column]) & np.isfinite(numbers)
        if not taken.any():
            what, fix = f"has no number in column {column} yet", "compare it after its first evaluation"
            raise UserError(what, self.folder / RESULTS_NAME, fix)
        return numbers[taken], self.columns[column][taken]


def column_of(metric: str) -> str:
    """Return the column of results.csv that a metric stands for."""
    names = {name.casefold(): column for name, column in METRICS.items()}
    return names.get(metric.casefold(), metric)


def check_metric(metric: str, runs: Sequence[Run]) -> None:
    """Raise UsageError if a metric is neither a known one nor a column of any run."""
    columns = dict.fromkeys(name for run in runs for name in run.columns if name != KEY)
    column = column_of(metric)
    if runs and column not in columns and column not in METRICS.values():
        otherwise = f"take {', '.join(METRICS)}, or a column of results.csv"
        fix = question(near_names(metric, [*METRICS, *columns], 1), otherwise)
        raise UsageError("no run has a column of that name", f"--metric {metric}", fix)


def is_better_low(metric: str) -> bool:
    """Return whether lower values of a metric are better."""
    return column_of(metric).endswith("_loss")


def find_runs(given: Sequence[Path], warn: Warn) -> list[Path]:
    """Find the run folders that paths refer to: a run's own, a file in it, or a folder that holds runs.

    Each once, in the given order, and exp2 before exp10 if a folder or a pattern stands for several. Warns
    about a path that refers to none.
    """
    found: list[Path] = []
    for path in given:
        own = list(_runs_at(path))
        if not own:
            what = "is not a training run: it has no results.csv" if os.path.exists(path) else "is not there"
            warn(f"{path}: {what}")
        found += own
    each: dict[Path, Path] = {}
    for path in found:
        each.setdefault(path.resolve(), path)
    return list(each.values())


def _runs_at(path: Path) -> Iterator[Path]:
    if os.path.isfile(path):
        folder = path.parent.parent if path.parent.name == "weights" else path.parent
        if os.path.isfile(folder / RESULTS_NAME):
            yield folder
    elif os.path.isdir(path):
        if os.path.isfile(path / RESULTS_NAME):
            yield path
        else:
            yield from _natural(entry.parent for entry in path.glob(f"*/{RESULTS_NAME}"))
    elif glob.has_magic(str(path)):  # a pattern that no shell has expanded
        for entry in _natural(Path(name) for name in glob.glob(str(path))):
            yield from _runs_at(entry)


def _natural(paths: Iterator[Path]) -> list[Path]:
    """Sort paths with the numbers in their names as numbers."""
    return sorted(
        paths, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", str(path))]
    )


def read_run(folder: Path, warn: Warn) -> Run:
    """Read the run of a folder; warns in one line about missing settings and unreadable files.

    Raises:
        UserError: its results.csv cannot be read, or no epoch is done yet.
    """
    columns = _table(folder / RESULTS_NAME)
    epochs = len(next(iter(columns.values()), ()))
    if not epochs:
        raise UserError("no epoch is done yet", folder / RESULTS_NAME, "wait for one, or leave this run out")
    gone: list[str] = []
    options = _plain(folder / "opt.yaml", gone)
    hyp = _plain(folder / "hyp.yaml", gone)
    parameters = _parameters(folder / "weights", gone)
    references = _references(folder / REFERENCES_NAME, gone)
    if gone:
        warn(f"{folder}: {'; '.join(gone)}")
    defaults = to_plain(Hyperparameters())
    return Run(
        folder=folder,
        columns=columns,
        options=options,
        hyp={} if hyp is None else {**defaults, **{k: v for k, v in hyp.items() if k in defaults}},
        seconds=_seconds(folder / TIMES_NAME, columns, epochs),
        parameters=parameters,
        references=references,
    )


def _table(path: Path) -> dict[str, Floats]:
    try:
        return read_results(path)
    except (OSError, csv.Error) as error:
        raise UserError(
            f"cannot be read ({error})", path, "leave this run out, or bring the file back"
        ) from error


def _plain(path: Path, gone: list[str]) -> dict[str, Any] | None:
    """Return the values of a settings file of the run; if that fails, None and a note in `gone`."""
    if not os.path.isfile(path):
        gone.append(f"{path.name} is missing, its settings are not known")
        return None
    try:
        return load_yaml(path)[0]
    except UserError as error:
        gone.append(f"{path.name} {error.what}, its settings are not known")
        return None


def _seconds(path: Path, columns: dict[str, Floats], epochs: int) -> Floats:
    """Return the seconds of each row of results.csv (E,), NaN where times.csv has none."""
    seconds = np.full(epochs, math.nan)
    if not os.path.isfile(path):
        return seconds
    try:
        times = read_results(path)
    except UserError:
        return seconds
    parts = [np.nan_to_num(values) for name, values in times.items() if name.endswith("_seconds")]
    if KEY in times and parts:
        by_epoch = dict(zip(times[KEY].tolist(), np.sum(parts, axis=0).tolist(), strict=True))
        numbers = columns.get(KEY, np.arange(epochs, dtype=np.float64)).tolist()
        seconds[:] = [by_epoch.get(number, math.nan) for number in numbers]
    return seconds


def _parameters(weights: Path, gone: list[str]) -> int | None:
    """Return the parameter count of the network in the run's best or last weights."""
    places = (weights / name for name in ("best.pt", "last.pt"))
    path = next(filter(os.path.isfile, places), None)
    if path is None:
        return None
    try:
        return sum(parameter.numel() for parameter in build_model(read_checkpoint(path)).parameters())
    except UserError as error:
        gone.append(f"{path.name} {error.what}")
        return None


def _references(path: Path, gone: list[str]) -> dict[str, tuple[float, float]]:
    if not os.path.isfile(path):
        return {}
    try:
        content = json.loads(read_regular(path, _MAX_REFERENCES))
        scores = {str(name): (float(e["map50"]), float(e["map50_95"])) for name, e in content.items()}
        if not all(0 <= score <= 1 for pair in scores.values() for score in pair):
            raise ValueError("no scores")
        return scores
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        gone.append(f"{path.name} is not as a run writes it, no teacher's score is known")
        return {}
