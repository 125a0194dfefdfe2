"""The tables and plots of docs/experiments.md, from the records in experiments/results."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.arms import Arm
from experiments.plans import PLANS, TEACHERS, Plan
from utils.config.files import write_text_atomically
from utils.reporting.curves import Curve, CurveGroup, plot_groups
from utils.reporting.seeds import gain_over, gap_closed, part_to_reach, spread_text
from utils.words import counted

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGE = ROOT / "docs" / "experiments.md"
OTHER_PAGES = dict.fromkeys(("ablation", "ablation-voc"), ROOT / "docs" / "why-distillation-failed.md")
PICTURES = ROOT / "docs" / "images"


@dataclass(frozen=True)
class ArmResults:
    """The records of an arm, by seed."""

    arm: Arm
    by_seed: dict[int, dict[str, Any]]

    def curves(self) -> list[list[float]]:
        """Return the validation mAP50-95 of each seed, by scored epoch."""
        return [record["val_map50_95"] for record in self.by_seed.values()]

    def values(self, key: str) -> list[float]:
        """Return one metric of each seed."""
        return [record[key] for record in self.by_seed.values()]


def write_report() -> None:
    """Write all tables between their markers, and a plot of the curves of each experiment."""
    for name, plan in PLANS.items():
        page = OTHER_PAGES.get(name, PAGE)
        results, teachers = read_records(name, plan)
        if not results:
            text = between_marks(page.read_text(encoding="utf-8"), name, "No record yet.\n")
            write_text_atomically(page, text)
            continue
        body = f"{table(plan, results, teachers)}\n{remarks(results, teachers)}"
        if any(len(curve) > 1 for entry in results for curve in entry.curves()):
            plot_curves(PICTURES / f"{name}.png", plan, results)
            body += f"\n![validation mAP50-95 by epoch](images/{name}.png)\n"
        write_text_atomically(page, between_marks(page.read_text(encoding="utf-8"), name, body))


def read_records(name: str, plan: Plan) -> tuple[list[ArmResults], dict[str, dict[str, Any]]]:
    """Read the records of a plan: its arms that have any, and its teachers' scores."""
    results = []
    for arm in plan.arms:
        files = sorted((RESULTS / name).glob(f"{arm.name}-s[0-9]*.json"))
        by_seed = {record["seed"]: record for record in map(_read, files)}
        if by_seed:
            results.append(ArmResults(arm, by_seed))
    files = sorted((RESULTS / name).glob("teacher-*.json"))
    return results, {path.stem.removeprefix("teacher-"): _read(path) for path in files}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def table(plan: Plan, results: Sequence[ArmResults], teachers: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table with a row per arm and its difference from plain runs of the same seeds."""
    lines = [
        "| | seeds | mAP50 | mAP50-95 | over plain | gap closed | at plain's final score |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in teachers.values():
        scores = f"{100 * record['map50']:.1f} | {100 * record['map50_95']:.1f}"
        lines.append(f"| teacher: {record['title']} | | {scores} | | | |")
    plain = next((entry for entry in results if entry.arm.name == plan.reference), None)
    target = next((entry for entry in results if entry.arm.name == plan.target), None)
    for entry in results:
        goal = teachers.get(entry.arm.teacher or "", {}).get("map50_95")
        if plan.target is not None:
            goal = statistics.mean(target.values("map50_95")) if target is not None else None
        cells = [entry.arm.title, str(len(entry.by_seed))]
        cells += [spread_text(entry.values(key)) for key in ("map50", "map50_95")]
        cells += compared(entry, plain, goal) if plain is not None and entry is not plain else ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def remarks(results: Sequence[ArmResults], teachers: dict[str, dict[str, Any]]) -> str:
    """Return caveats about how the rows were obtained; usually empty."""
    found = ""
    for name, record in teachers.items():
        sums = {r.get("teacher_sha256") for e in results if e.arm.teacher == name for r in e.by_seed.values()}
        sums.add(record.get("teacher_sha256"))
        if len(sums - {None}) > 1:
            found += f"\nThe teacher `{name}` was trained again in between: not all rows have the same one.\n"
        elif len(sums) > 1 and TEACHERS[name].options:  # one that was trained, not a public file
            which = f"which training of the teacher `{name}` they had"
            found += f"\nSome records do not tell {which}: it may not be the same.\n"
    records = [record for entry in results for record in entry.by_seed.values()]
    on_cpus = [record for record in records if str(record.get("machine", "")).startswith("cpu")]
    reduced = ["--amp-dtype bf16" in record["command"] for record in on_cpus]
    if any(reduced) and not all(reduced):
        count = f"{reduced.count(False)} of the {len(reduced)} runs"
        found += f"\n{count} were made on a CPU without bf16, and computed in float32.\n"
    return found


def compared(entry: ArmResults, plain: ArmResults, goal: float | None) -> list[str]:
    """Return three cells: gain over plain, fraction of the gap closed, when plain's final score is reached.

    The first has the mean difference of mAP50-95, its standard error, and the smallest of any seed.
    """
    own, other = (
        {seed: record["map50_95"] for seed, record in arm.by_seed.items()} for arm in (entry, plain)
    )
    gain = gain_over(own, other)
    if gain is None:
        return ["", "", ""]
    closed = gap_closed(own, other, goal) if goal is not None else None
    seeds = sorted(own.keys() & other.keys())
    least = min(100 * (own[seed] - other[seed]) for seed in seeds)
    shown = [f"{gain} (least {least:+.1f})", "" if closed is None else f"{closed:.0%}"]
    curves = [(entry.by_seed[s]["val_map50_95"], plain.by_seed[s]["val_map50_95"]) for s in seeds]
    if any(len(curve) < 2 for curve, _ in curves):  # scored only at the end
        return [*shown, ""]
    reached = [part_to_reach(curve, goal_curve[-1]) for curve, goal_curve in curves]
    part = f"{statistics.mean(reached):.0%} of the epochs" if max(reached) <= 1 else "not by every seed"
    return [*shown, part]


def plot_curves(path: Path, plan: Plan, results: Sequence[ArmResults]) -> None:
    """Plot validation mAP50-95 by epoch: the mean over seeds, shaded from the worst to the best."""
    groups = []
    for entry in results:
        curves = [np.array(curve, dtype=np.float64) for curve in entry.curves()]
        if min(map(len, curves)) < 2:  # scored only at the end
            continue
        label = f"{entry.arm.title.replace('`', '')} ({counted(len(curves), 'seed')})"
        drawn = tuple(Curve(np.arange(1.0, len(curve) + 1), curve) for curve in curves)
        groups.append(CurveGroup(label, drawn))
    plot_groups(path, groups, title=plan.title, ylabel="mAP50-95 on the validation split")


def between_marks(text: str, name: str, body: str) -> str:
    """Replace the text between a page's markers of a name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(text), f"the page lacks {begin}"
    return pattern.sub(lambda _: f"{begin}\n{body}{end}", text)
