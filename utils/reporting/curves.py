"""The curves of several runs in one chart, with their spread over seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from utils.reporting.draw import drawable
from utils.reporting.plots import PALETTE, chart_style, new_figure, save_figure

Floats = NDArray[np.float64]

# The first one is for the baseline of the comparison.
COLORS = ("0.35", *(PALETTE[name] for name in ("vermillion", "blue", "green", "purple", "orange", "sky")))
STYLES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))  # next when the colours are used up
FEW_EPOCHS = 15  # up to this many are marked individually
NUMBERS_ACROSS = 4  # more beside one another overlap
LABEL_WIDTH = 100  # characters


@dataclass(frozen=True)
class Curve:
    """A run: its finite values (E,) at its epochs (E,), ascending."""

    epochs: Floats
    values: Floats


@dataclass(frozen=True)
class CurveGroup:
    """Runs drawn as one line: their mean, shaded from minimum to maximum.

    label: for the legend. best: the value of each run for the points beside the curves; empty for none.
    """

    label: str
    curves: tuple[Curve, ...]
    best: tuple[float, ...] = ()


def plot_groups(
    path: Path,
    groups: Sequence[CurveGroup],
    *,
    title: str,
    ylabel: str,
    verdicts: Sequence[str] = (),
    levels: Mapping[str, float] | None = None,
    best_title: str = "best",
) -> None:
    """Save curves by epoch, the first group in grey; beside them the best values of the runs, if given.

    verdicts: sentences below the title. levels: scores to draw as dashed lines, by their label in the legend.
    The mean of a group covers the epochs that all of its runs have; beyond them each run is a thin line.
    """
    levels = levels or {}
    with chart_style():
        labels = ["\n".join(textwrap.wrap(drawable(group.label), LABEL_WIDTH)) for group in groups]
        lines = sum(label.count("\n") + 1 for label in (*labels, *levels))
        figure = new_figure(9.0, 4.6 + 0.2 * lines)
        with_points = any(group.best for group in groups)
        panels = figure.subplots(
            1, 1 + with_points, squeeze=False, sharey=True, width_ratios=[4, 1][: 1 + with_points]
        )[0]
        is_crowded = with_points and len(groups) > NUMBERS_ACROSS
        axes = panels[0]
        handles: list[Line2D] = []
        for place, (group, label, look) in enumerate(zip(groups, labels, _looks(), strict=False)):
            handles.append(_draw(axes, group, label, *look))
            if with_points:
                _draw_points(panels[1], place, group, look[0], 90 if is_crowded else 0)
        for (name, score), style in zip(levels.items(), cycle(((0, (4, 3)), (0, (1, 2)))), strict=False):
            for panel in panels:
                line = panel.axhline(
                    score, color="black", linewidth=1.2, linestyle=style, label=drawable(name)
                )
            handles.append(line)
        axes.set(xlabel="epoch", ylabel=ylabel)
        for panel in panels:
            panel.margins(y=0.17 if is_crowded else 0.09)  # room for the numbers above the points
        if axes.get_ylim()[0] < 0 <= axes.dataLim.ymin:
            axes.set_ylim(bottom=0)  # there are no scores below
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.grid(alpha=0.3)
        if with_points:
            panels[1].set_title(best_title, fontsize=10)
            panels[1].set(xticks=(), xlim=(-0.7, len(groups) - 0.3))
            panels[1].grid(alpha=0.3, axis="y")
        said = [line for verdict in verdicts for line in textwrap.wrap(drawable(verdict), LABEL_WIDTH + 10)]
        figure.suptitle(drawable(title), fontsize=12)
        axes.set_title("\n".join(said), fontsize=9, loc="left", color="0.2")
        figure.legend(handles=handles, loc="outside lower left", ncols=1, frameon=False, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path, dpi=110)


def _looks() -> Iterator[tuple[str, object]]:
    """Return the colours and line styles of the groups, in order."""
    return iter((color, style) for style in cycle(STYLES) for color in COLORS)


def _draw(axes: Axes, group: CurveGroup, label: str, color: str, style: object) -> Line2D:
    """Draw a group; return its line for the legend."""
    epochs, stacked = _together(group.curves)
    marker = "." if len(epochs) <= FEW_EPOCHS else ""
    look = {"color": color, "linestyle": style, "marker": marker}
    if len(epochs):
        axes.plot(epochs, stacked.mean(0), linewidth=2, **look)  # type: ignore[arg-type]
        if len(stacked) > 1:
            low, high = stacked.min(0), stacked.max(0)
            axes.fill_between(epochs, low, high, color=color, alpha=0.18, linewidth=0)
    for curve in group.curves:
        beyond = curve.epochs >= (epochs[-1] if len(epochs) else -np.inf)
        if np.count_nonzero(beyond) > bool(len(epochs)):
            axes.plot(curve.epochs[beyond], curve.values[beyond], linewidth=0.9, alpha=0.8, **look)  # type: ignore[arg-type]
    return Line2D([], [], linewidth=2, label=label, **look)  # type: ignore[arg-type]


def _together(curves: Sequence[Curve]) -> tuple[Floats, Floats]:
    """Return the epochs that all runs have (E,), and their values there (runs, E)."""
    common = curves[0].epochs
    for curve in curves[1:]:
        common = np.intersect1d(common, curve.epochs)
    return common, np.stack([curve.values[np.isin(curve.epochs, common)] for curve in curves])


def _draw_points(axes: Axes, place: int, group: CurveGroup, color: str, rotation: int) -> None:
    """Draw a point per run and a line at their mean, with its value above, rotated by so many degrees."""
    if not group.best:
        return
    best = np.array(group.best)
    offsets = np.linspace(-0.15, 0.15, len(best)) if len(best) > 1 else np.zeros(1)
    axes.plot(place + offsets, best, "o", color=color, markersize=5, alpha=0.8)
    axes.hlines(best.mean(), place - 0.35, place + 0.35, color=color, linewidth=2)
    axes.annotate(
        f"{best.mean():.3f}", (place, best.max()), (0, 5), textcoords="offset points", ha="center",
        fontsize=8, color=color, rotation=rotation,
    )  # fmt: skip
