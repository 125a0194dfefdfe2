"""The tables and pictures of docs/experiments.md, from the records in experiments/results."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from experiments.plans import PLANS, Arm, Plan
from utils.config.files import replace_atomically, write_text_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGE = ROOT / "docs" / "experiments.md"
OTHER_PAGES = {"ablation": ROOT / "docs" / "why-distillation-failed.md"}
PICTURES = ROOT / "docs" / "images"


@dataclass(frozen=True)
class ArmResults:
    """The records of an arm, by seed."""

    arm: Arm
    by_seed: dict[int, dict[str, Any]]

    def curves(self) -> list[list[float]]:
        """The validation mAP50-95 of each seed, by scored epoch."""
        return [record["val_map50_95"] for record in self.by_seed.values()]

    def values(self, key: str) -> list[float]:
        """One figure of each seed."""
        return [record[key] for record in self.by_seed.values()]


def write_report() -> None:
    """Writes all tables between their marks, and a picture of the curves for each experiment."""
    for name, plan in PLANS.items():
        page = OTHER_PAGES.get(name, PAGE)
        results, teachers = read_records(name, plan)
        if not results:
            text = between_marks(page.read_text(encoding="utf-8"), name, "No record yet.\n")
            write_text_atomically(page, text)
            continue
        body = f"{table(plan, results, teachers)}\n"
        if any(len(curve) > 1 for entry in results for curve in entry.curves()):
            plot_curves(PICTURES / f"{name}.png", plan, results)
            body += f"\n![validation mAP50-95 by epoch](images/{name}.png)\n"
        write_text_atomically(page, between_marks(page.read_text(encoding="utf-8"), name, body))


def read_records(name: str, plan: Plan) -> tuple[list[ArmResults], dict[str, dict[str, Any]]]:
    """What is there of a plan: its arms with any record, and its teachers' scores."""
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
    """Markdown: one row an arm, with its difference from its plain twins of the same seeds."""
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
        cells += [_spread(entry.values(key)) for key in ("map50", "map50_95")]
        cells += compared(entry, plain, goal) if plain is not None and entry is not plain else ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(entry: ArmResults, plain: ArmResults, goal: float | None) -> list[str]:
    """Difference of mAP50-95 with its standard error, part of the gap closed, when plain's end is reached."""
    seeds = sorted(entry.by_seed.keys() & plain.by_seed.keys())
    if not seeds:
        return ["", "", ""]
    pairs = [(entry.by_seed[seed], plain.by_seed[seed]) for seed in seeds]
    differences = [100 * (own["map50_95"] - other["map50_95"]) for own, other in pairs]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(seeds) ** 0.5 if len(seeds) > 1 else None
    shown = f"{mean:+.1f}" + (f" ± {error:.1f}" if error is not None else "")
    closed = ""
    if goal is not None:
        gap = 100 * goal - statistics.mean(100 * other["map50_95"] for _, other in pairs)
        closed = f"{mean / gap:.0%}" if gap > 0 else ""
    if any(len(own["val_map50_95"]) < 2 for own, _ in pairs):  # scored at the end alone
        return [shown, closed, ""]
    reached = [_epochs_to(own["val_map50_95"], other["val_map50_95"][-1]) for own, other in pairs]
    part = f"{statistics.mean(reached):.0%} of the epochs" if max(reached) <= 1 else "not by every seed"
    return [shown, closed, part]


def _epochs_to(curve: Sequence[float], score: float) -> float:
    """The part of the epochs after which a curve has reached a score, 1.0 and more where it has not."""
    places = np.flatnonzero(np.asarray(curve) >= score)
    return (int(places[0]) + 1) / len(curve) if len(places) else float("inf")


def _spread(values: Sequence[float]) -> str:
    mean = 100 * statistics.mean(values)
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def plot_curves(path: Path, plan: Plan, results: Sequence[ArmResults]) -> None:
    """Validation mAP50-95 by epoch: the mean over the seeds, shaded from the worst to the best."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for entry in results:
        curves = entry.curves()
        length = min(map(len, curves))
        if length < 2:  # scored at the end alone
            continue
        stacked = 100 * np.array([curve[:length] for curve in curves])
        epochs = np.arange(1, length + 1)
        (line,) = axes.plot(epochs, stacked.mean(0), label=entry.arm.title.replace("`", ""), linewidth=1.6)
        axes.fill_between(
            epochs, stacked.min(0), stacked.max(0), color=line.get_color(), alpha=0.15, linewidth=0
        )
    axes.set(xlabel="epoch", ylabel="mAP50-95 on the validation split, %", title=plan.title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, lambda stream: figure.savefig(stream, format="png", dpi=110))
    plt.close(figure)


def between_marks(text: str, name: str, body: str) -> str:
    """The page with what stands between the marks of a name replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(text), f"the page lacks {begin}"
    return pattern.sub(lambda _: f"{begin}\n{body}{end}", text)
