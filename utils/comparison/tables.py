"""The scores of runs and of groups of runs, as table rows."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.comparison.groups import HYP, Group, differing_settings, shown, values_of
from utils.comparison.runs import METRICS, Run, column_of, is_better_low
from utils.config.files import write_text_atomically
from utils.errors import UserError
from utils.reporting.seeds import Gain, gain_over, gap_closed, spread_text

SIZE_COLUMN = "parameters"  # the last of those that all run tables have
_SPREAD = " ± "  # between a mean and its spread
MOST_SETTINGS = 8  # columns that follow it on a terminal
MAP_COLUMNS = {METRICS["mAP50"]: 0, METRICS["mAP50-95"]: 1}  # and their indices in a teacher's scores


@dataclass(frozen=True)
class Scores:
    """A run's best value of a metric, its epoch (from 1), and the last value."""

    best: float
    best_epoch: int
    last: float


def scores_of(run: Run, metric: str) -> Scores:
    """Return a run's scores. Raises UserError if it has no such column, or no number in it."""
    epochs, values = run.curve(metric)
    place = int(values.argmin() if is_better_low(metric) else values.argmax())
    return Scores(float(values[place]), int(epochs[place]), float(values[-1]))


def run_table(groups: Sequence[Group], metric: str) -> tuple[list[list[str]], list[str]]:
    """Return one row per run and the header: scores in points, time, size, and the settings that differ."""
    runs = [run for group in groups for run in group.runs]
    settings = differing_settings([values_of(run) for run in runs])
    header = ["run", "done", f"best {metric}", "at epoch", "last", *_other_metric(metric)]
    header += ["s/epoch", "time", SIZE_COLUMN, *_seed_column(runs)]
    header += [name.removeprefix(HYP).replace("_", " ") for name in settings]
    rows = []
    for run in runs:
        scores, values = scores_of(run, metric), values_of(run) or {}
        done = f"{run.epochs}/{run.planned}" if run.planned > run.epochs else str(run.epochs)
        done += " stopped early" if run.planned > run.epochs and run.is_over else ""
        best, last = _shown_score(scores.best, metric), _shown_score(scores.last, metric)
        row = [str(run.folder), done, best, str(scores.best_epoch), last]
        row += [_best(run, name) for name in _other_metric(metric, titled=False)]
        row += [_number(_mean_seconds(run), ".1f"), duration(run), _number(run.parameters, "d")]
        row += [shown(run.seed) for _ in _seed_column(runs)]
        row += [shown(values[name]) if name in values else "-" for name in settings]
        rows.append(row)
    return rows, header


def _other_metric(metric: str, titled: bool = True) -> list[str]:
    """Return the one of the two mAPs that the table is not about, as a list."""
    other = [name for name in ("mAP50-95", "mAP50") if column_of(name) != column_of(metric)][-1:]
    return [f"best {name}" for name in other] if titled else other


def _seed_column(runs: Sequence[Run]) -> list[str]:
    return ["seed"] if len({run.seed for run in runs}) > 1 else []


def _best(run: Run, metric: str) -> str:
    try:
        return _shown_score(scores_of(run, metric).best, metric)
    except UserError:
        return "-"


def _shown_score(value: float, metric: str) -> str:
    """Return scores in points, losses and the like as they are."""
    return f"{value * 100 if column_of(metric) in METRICS.values() else value:.4g}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mean_seconds(run: Run) -> float | None:
    taken = run.seconds[np.isfinite(run.seconds)]
    return float(taken.mean()) if len(taken) else None


def duration(run: Run) -> str:
    """Format the time of all epochs together as h:mm:ss; a dash if that of some was not recorded."""
    with np.errstate(over="ignore"):
        total = float(run.seconds.sum())
    if not math.isfinite(total):
        return "-"
    minutes, seconds = divmod(round(total), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


@dataclass(frozen=True)
class Verdict:
    """How a group compares with plain training with the same settings and seeds.

    twin: the plain runs. closed: part of the gap to the teacher, None if its score is unknown or not above
    plain training. is_final: whether all compared runs have finished their epochs or stopped early.
    """

    group: Group
    twin: Group
    gain: Gain
    closed: float | None
    is_final: bool

    def __str__(self) -> str:
        """Return a sentence for the chart and the console."""
        label = self.group.label.partition(" (")[0]
        seeds = f"{self.gain.seeds} seeds" if self.gain.seeds > 1 else "one seed"
        part = f", {self.closed:.0%} of the gap to the teacher" if self.closed is not None else ""
        so_far = "" if self.is_final else ", so far: not all have all epochs"
        return f"{label}: {self.gain} points over plain training ({seeds}){part}{so_far}"


def verdict_on(
    group: Group, groups: Sequence[Group], metric: str, ignored: frozenset[str] = frozenset()
) -> Verdict | None:
    """Compare a distilled group's best scores with those of its plain twin; None without one.

    Of several twins the one that shares the most seeds is taken.
    """
    seeds, twins = group.runs_by_seed().keys(), [one for one in groups if one.is_twin_of(group, ignored)]
    twin = max(twins, key=lambda one: len(one.runs_by_seed().keys() & seeds), default=None)
    if twin is None or column_of(metric) not in METRICS.values():
        return None
    own, other = (_best_by_seed(entry, metric) for entry in (group, twin))
    gain, goal = gain_over(own, other), teacher_score(group, metric)
    if gain is None:
        return None
    compared = (run for entry in (group, twin) for run in entry.runs if run.seed in own.keys() & other.keys())
    is_final = all(run.is_over for run in compared)
    return Verdict(group, twin, gain, None if goal is None else gap_closed(own, other, goal), is_final)


def _best_by_seed(group: Group, metric: str) -> dict[int, float]:
    return group.by_seed({run: scores_of(run, metric).best for run in group.runs})


def teacher_score(group: Group, metric: str) -> float | None:
    """Return the best teacher's score on the runs' validation split, averaged over runs; None if unknown."""
    place = MAP_COLUMNS.get(column_of(metric))
    if place is None:
        return None
    best = [max(s[place] for s in run.references.values()) for run in group.runs if run.references]
    return statistics.mean(best) if best else None


def repeated_seeds(verdicts: Sequence[Verdict]) -> list[str]:
    """Return a line for each seed of which several runs are compared."""
    groups = dict.fromkeys(group for verdict in verdicts for group in (verdict.group, verdict.twin))
    return [
        f"seed {seed} has {len(runs)} runs with the same settings "
        f"({', '.join(str(run.folder) for run in runs)}): their mean is compared"
        for group in groups
        for seed, runs in group.runs_by_seed().items()
        if len(runs) > 1
    ]


def group_table(
    groups: Sequence[Group], metric: str, verdicts: Sequence[Verdict]
) -> tuple[list[list[str]], list[str]]:
    """Return one row per group and the header; scores as mean and standard deviation, in points."""
    header = ["group", "runs", f"best {metric}", "last", "over plain", "gap closed", "s/epoch"]
    by_group = {verdict.group: verdict for verdict in verdicts}
    form = spread_text if column_of(metric) in METRICS.values() else _plain_mean
    rows = []
    for group in groups:
        scores = [scores_of(run, metric) for run in group.runs]
        row = [
            group.label,
            str(len(group.runs)),
            form([s.best for s in scores]),
            form([s.last for s in scores]),
        ]
        verdict = by_group.get(group)
        closed = "" if verdict is None or verdict.closed is None else f"{verdict.closed:.0%}"
        row += ["" if verdict is None else str(verdict.gain), closed]
        seconds = [mean for mean in map(_mean_seconds, group.runs) if mean is not None]
        row.append(f"{statistics.mean(seconds):.1f}" if seconds else "-")
        rows.append(row)
    return rows, header


def spread_apart(rows: Sequence[Sequence[str]], header: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Return a table for programs: columns with entries like `50.6 ± 0.7` as two, `name` and `name ±`."""
    wide = [any(_SPREAD in row[column] for row in rows) for column in range(len(header))]
    names = [(name, f"{name} ±") if apart else (name,) for name, apart in zip(header, wide, strict=True)]
    cells = [
        [
            part
            for text, apart in zip(row, wide, strict=True)
            for part in (text.partition(_SPREAD)[::2] if apart else (text,))
        ]
        for row in rows
    ]
    return cells, [name for both in names for name in both]


def _plain_mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4g}"


def save_table(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str]) -> None:
    """Write rows as CSV, atomically."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    write_text_atomically(path, buffer.getvalue())
