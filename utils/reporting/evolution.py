"""The chart of an evolution: the values of each hyperparameter and the fitness they reached.

Shapes: n generations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from utils.reporting.plots import chart_style, panels_of, save_figure

Floats = NDArray[np.float64]

COLUMNS = 5
_BEST: dict[str, Any] = {
    "marker": "*",
    "s": 130,
    "color": "crimson",
    "edgecolors": "white",
    "linewidths": 0.6,
    "zorder": 4,
}
_FAILED: dict[str, Any] = {"marker": "x", "s": 18, "color": "0.6", "linewidths": 1, "zorder": 2}


def plot_evolution(path: Path, numbers: Floats, fitness: Floats, values: Mapping[str, Floats]) -> None:
    """Save a chart of fitness by generation, and of fitness against each hyperparameter.

    numbers, fitness: (n,) per generation, at least one; a fitness of 0 is a failed one. values: (n,) per
    hyperparameter; one that never changed has no panel.
    """
    changed = {name: column for name, column in values.items() if np.ptp(column) > 0}
    rows = math.ceil((1 + len(changed)) / COLUMNS)
    columns = min(COLUMNS, 1 + len(changed))
    best = int(fitness.argmax())
    with chart_style():
        figure, axes_list = panels_of(rows, columns, (2.9, 2.4) if changed else (6.0, 4.0))
        _draw_course(axes_list[0], numbers, fitness, best)
        dots = None
        for axes, (name, column) in zip(axes_list[1:], changed.items(), strict=False):
            dots = _draw_dots(axes, column, fitness, numbers, best)
            axes.set_title(f"{name}, best {column[best]:.4g}", fontsize=9)
        for axes in axes_list:
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
        for axes in axes_list[1 + len(changed) :]:
            axes.set_axis_off()
        if dots is not None:
            bar = figure.colorbar(dots, ax=axes_list, fraction=0.03, aspect=50, pad=0.01)
            bar.set_label("generation", fontsize=8)
            bar.ax.tick_params(labelsize=7)
            bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        save_figure(figure, path)


def _draw_course(axes: Axes, numbers: Floats, fitness: Floats, best: int) -> None:
    """Draw fitness over generations, and the best so far as steps."""
    good = fitness > 0
    axes.step(numbers, np.maximum.accumulate(fitness), where="post", color="0.4", linewidth=1.2)
    axes.scatter(numbers[good], fitness[good], c=numbers[good], s=16, cmap="viridis", zorder=3)
    axes.scatter(numbers[~good], fitness[~good], **_FAILED)
    axes.scatter(numbers[best], fitness[best], **_BEST)
    axes.set_title(f"fitness, best {fitness[best]:.4g} (generation {numbers[best]:.0f})", fontsize=9)
    axes.set_xlabel("generation", fontsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _draw_dots(axes: Axes, values: Floats, fitness: Floats, numbers: Floats, best: int) -> PathCollection:
    """Draw a dot per generation, earlier ones darker; crosses failed, the star is the best."""
    good = fitness > 0
    # All panels share one colour scale, whatever has failed.
    scale: dict[str, Any] = {
        "vmin": numbers.min(),
        "vmax": max(numbers.max(), numbers.min() + 1),
        "cmap": "viridis",
    }
    dots = axes.scatter(values[good], fitness[good], c=numbers[good], s=16, zorder=3, **scale)
    axes.scatter(values[~good], fitness[~good], **_FAILED)
    axes.scatter(values[best], fitness[best], **_BEST)
    axes.set_ylabel("fitness", fontsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    return dots
