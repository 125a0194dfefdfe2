"""What compare.py does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.comparison.disagreement import draw_disagreement
from utils.comparison.groups import Group, different_data, group_runs, known_settings
from utils.comparison.runs import METRICS, Run, check_metric, column_of, find_runs, is_better_low, read_run
from utils.comparison.tables import (
    MOST_SETTINGS,
    SIZE_COLUMN,
    Verdict,
    group_table,
    repeated_seeds,
    run_table,
    save_table,
    scores_of,
    spread_apart,
    teacher_score,
    verdict_on,
)
from utils.config.files import next_run_folder
from utils.config.options import CompareOptions
from utils.errors import UserError
from utils.reporting.console import Console
from utils.reporting.curves import Curve, CurveGroup, plot_groups
from utils.words import counted, first_names

MOST_VERDICTS = 4  # in the chart


def run_compare(options: CompareOptions, console: Console | None = None) -> Path:
    """Compare runs, or a student and its teacher, as the options say; return the folder of the results."""
    console = console or Console()
    if options.weights:
        return draw_disagreement(options, console)
    ignored = known_settings(options.ignore)
    runs = readable_runs(options.runs, options.metric, console)
    groups = group_runs(runs, options.ignore, options.group)
    for name in different_data(groups):
        console.warn(f"different {name}: the scores compare only if they are of the same images and classes")
    verdicts = [v for v in (verdict_on(group, groups, options.metric, ignored) for group in groups) if v]
    for text in repeated_seeds(verdicts):
        console.warn(text)
    folder = next_run_folder(Path(options.project), options.name, options.exist_ok)
    rows, header = run_table(groups, options.metric)
    shown = header.index(SIZE_COLUMN) + 1 + MOST_SETTINGS
    console.table([row[:shown] for row in rows], header[:shown])
    if len(header) > shown:
        console.info(
            f"see {folder / 'runs.csv'} for {counted(len(header) - shown, 'more differing setting')}"
        )
    save_table(folder / "runs.csv", rows, header)
    if verdicts or any(len(group.runs) > 1 for group in groups):
        rows, header = group_table(groups, options.metric, verdicts)
        console.info("")
        console.table(rows, header)
        save_table(folder / "groups.csv", *spread_apart(rows, header))
    for verdict in verdicts:
        console.info(f"\n{verdict}")
    draw_groups(folder / "comparison.png", groups, options.metric, verdicts)
    console.info(f"\ncurves in {folder / 'comparison.png'}, tables beside it")
    return folder


def readable_runs(given: Sequence[Path], metric: str, console: Console) -> list[Run]:
    """Return the runs that can be compared; warn about why each other one cannot.

    Raises:
        UserError: none is left, or there is no such metric.
    """
    found, notes = [], []
    for folder in find_runs(given, console.warn):
        own: list[str] = []
        try:
            found.append((read_run(folder, own.append), own))
        except UserError as error:
            notes.append(f"left out: {error}")
    check_metric(metric, [run for run, _ in found])
    runs = []
    for run, own in found:
        try:
            scores_of(run, metric)
            runs.append(run)
            notes += own
        except UserError as error:
            notes.append(f"left out: {error}")
    for note in notes:
        console.warn(note)
    if not runs:
        places = first_names([str(path) for path in given], 3)
        raise UserError(
            "no run to compare", places, "name folders that train.py has written, as in runs/train/exp*"
        )
    return runs


def draw_groups(path: Path, groups: Sequence[Group], metric: str, verdicts: Sequence[Verdict]) -> None:
    """Plot the curves of all groups, and their teachers' scores as lines."""
    drawn = []
    for group in groups:
        curves = tuple(Curve(*run.curve(metric)) for run in group.runs)
        drawn.append(
            CurveGroup(group.label, curves, tuple(scores_of(run, metric).best for run in group.runs))
        )
    levels: dict[str, float] = {}
    sizes = {(group.values or {}).get("imgsz") for group in groups}
    for group in groups:
        score = teacher_score(group, metric)
        if score is not None and not any(abs(score - other) < 1e-6 for other in levels.values()):
            names = (group.values or {}).get("teacher") or ["teacher"]
            place = f" at {(group.values or {}).get('imgsz')} px" if len(sizes) > 1 else ""
            levels[f"the teacher {' or '.join(names)} itself{place}: {score:.3f}"] = score
    known = {column: name for name, column in METRICS.items()}
    name = known.get(column_of(metric), column_of(metric))
    data = sorted({str(g.values["data"]) for g in groups if g.values is not None and "data" in g.values})
    place = f" ({' and '.join(data)})" if data else ""
    split = " on the validation split" if column_of(metric) in METRICS.values() else ""
    plot_groups(
        path,
        drawn,
        title=f"{name}{split}{place}",
        ylabel=name,
        verdicts=[str(verdict) for verdict in verdicts[:MOST_VERDICTS]],
        levels=levels,
        best_title="lowest" if is_better_low(metric) else "best of each run",
    )
