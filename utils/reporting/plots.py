"""The charts of a run: labels, score curves, confusion matrix, results.

Shapes: n labels, C classes that occur in the labels, K classes.
Charts are drawn on canvases of their own, not through pyplot: no window opens, nothing must be closed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Protocol

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from utils.config.files import replace_atomically
from utils.reporting.draw import color_of, name_of
from utils.reporting.fonts import default_font, font_for
from utils.reporting.results import read_results

Floats = NDArray[np.float64]

LEGEND_CLASSES = 20
ANNOTATED_CLASSES = 30
NAMED_CLASSES = 120  # more names than this are unreadable along an axis
DRAWN_LABELS = 2000
BRIGHTEST_LINE = 0.62  # relative to white; brighter lines are hard to see on white

# Distinguishable for the colour-blind. Source: Okabe and Ito, Color Universal Design (2008).
PALETTE = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}

_style_lock = Lock()


class ScoreCurves(Protocol):
    """What `plot_curves` reads: scores of the C classes that occur in the labels."""

    @property
    def classes(self) -> NDArray[np.int64]:
        """(C,) class numbers."""

    @property
    def ap(self) -> Floats:
        """(C, T) average precision at T IoU thresholds, the first .5."""

    @property
    def confidence_axis(self) -> Floats:
        """(X,) confidences at which the next three curves are sampled."""

    @property
    def precision_curve(self) -> Floats:
        """(C, X) over confidence."""

    @property
    def recall_curve(self) -> Floats:
        """(C, X) over confidence."""

    @property
    def f1_curve(self) -> Floats:
        """(C, X) over confidence."""

    @property
    def recall_axis(self) -> Floats:
        """(X,) recalls at which `pr_curve` is sampled."""

    @property
    def pr_curve(self) -> Floats:
        """(C, X) precision over recall."""


def plot_labels(path: Path, labels: NDArray[np.floating], names: Sequence[str], unlabelled: int = 0) -> None:
    """Save a chart of the number, position and size of the labels.

    labels: (n, 5) class, centre x, centre y, width, height, normalised to their images.
    unlabelled: number of further, unlabelled images; shown if there are any.
    """
    with chart_style():
        width = min(12.0, max(6.0, 0.12 * len(names)))
        figure, panels = panels_of(2, 2, (width, 0.8 * width))
        counts, boxes, centres, sizes = panels
        _draw_class_counts(counts, labels[:, 0].astype(np.int64), names, width - 1)
        if unlabelled:
            counts.set_title(f"{counts.get_title()}\n+ {unlabelled} unlabelled images")
        _draw_boxes_centred(boxes, labels)
        _draw_density(centres, labels[:, 1:3], ("centre x", "centre y"))
        centres.invert_yaxis()  # as in images, y points down
        _draw_density(sizes, labels[:, 3:5], ("width", "height"))
        save_figure(figure, path)


def _draw_class_counts(axes: Axes, class_ids: NDArray[np.int64], names: Sequence[str], inches: float) -> None:
    size = max(len(names), int(class_ids.max(initial=-1)) + 1)
    counts = np.bincount(class_ids, minlength=size)
    bars = axes.bar(np.arange(size), counts, color=[_shade(number) for number in range(size)], width=0.8)
    axes.set_title(f"{len(class_ids)} labels in {np.count_nonzero(counts)} of {size} classes")
    named = _named_places(size)
    axes.set_xticks(named, [name_of(number, names) for number in named])
    font_size = _tick_size(len(named), inches)
    axes.tick_params(axis="x", labelrotation=0 if size <= 6 else 90, labelsize=font_size)
    if size <= 12:
        axes.bar_label(bars, fontsize=8)
    axes.margins(x=0.01)
    axes.set_ylim(0, 1.08 * max(1, counts.max(initial=0)))


def _draw_boxes_centred(axes: Axes, labels: NDArray[np.floating]) -> None:
    """Draw the box outlines on top of each other, at most `DRAWN_LABELS` of them, evenly sampled."""
    shown = labels[:: max(1, math.ceil(len(labels) / DRAWN_LABELS))]
    corners = np.array(((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))) / 2
    outlines = [corners * size for size in shown[:, 3:5]]
    colors = [_shade(int(class_id)) for class_id in shown[:, 0]]
    alpha = min(0.6, max(0.05, 60 / max(len(shown), 1)))
    axes.add_collection(LineCollection(outlines, colors=colors, linewidths=0.8, alpha=alpha))
    axes.set(xlim=(-0.52, 0.52), ylim=(-0.52, 0.52), xticks=(), yticks=())
    axes.set_title("box sizes, relative to the image")


def _draw_density(axes: Axes, points: NDArray[np.floating], labels: tuple[str, str]) -> None:
    """Draw a histogram of points in the unit square."""
    bins = min(50, max(16, round(len(points) ** 0.5)))  # few points in fine bins look like noise
    counts, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=bins, range=((0, 1), (0, 1)))
    shown = np.where(counts > 0, counts, np.nan).T
    axes.imshow(
        shown,
        origin="lower",
        extent=(0, 1, 0, 1),
        aspect="auto",
        cmap="GnBu",
        vmin=-0.4 * counts.max(initial=1),  # so that a single box stands out from the white background
        interpolation="nearest",
    )
    axes.set(xlabel=labels[0], ylabel=labels[1])


def plot_curves(folder: Path, scores: ScoreCurves, names: Sequence[str]) -> None:
    """Save P_curve.png, R_curve.png, F1_curve.png and PR_curve.png, all at IoU .5.

    Each has a line for every class and a thick one for their mean.
    """
    confidence = scores.confidence_axis
    plans = (
        ("P_curve.png", "confidence", "precision", confidence, scores.precision_curve),
        ("R_curve.png", "confidence", "recall", confidence, scores.recall_curve),
        ("F1_curve.png", "confidence", "F1", confidence, scores.f1_curve),
        ("PR_curve.png", "recall", "precision", scores.recall_axis, scores.pr_curve),
    )
    class_names = [name_of(int(class_id), names) for class_id in scores.classes]
    for file, x_label, y_label, axis, curves in plans:
        if x_label == "recall":
            values, summary = scores.ap[:, 0], f"mean AP {scores.ap[:, 0].mean():.3f} at IoU .5"
        else:
            mean = curves.mean(axis=0)
            values = curves.max(axis=1)
            summary = f"mean, best {mean.max():.3f} at {axis[mean.argmax()]:.3f}"
        with chart_style():
            figure, (axes,) = panels_of(1, 1, (9.0, 6.0))
            _draw_curves(axes, axis, curves, [int(class_id) for class_id in scores.classes])
            axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, 1), ylim=(0, 1.01))
            entries = [f"{value:.3f} {name}" for value, name in zip(values, class_names, strict=True)]
            _add_legend(axes, summary, entries)
            save_figure(figure, folder / file)


def _draw_curves(axes: Axes, axis: Floats, curves: Floats, class_ids: list[int]) -> None:
    """Draw thin lines for the classes (C, X), then a thick one for the mean as the last line."""
    many = len(class_ids) > LEGEND_CLASSES
    for class_id, curve in zip(class_ids, curves, strict=True):
        color, width = ("0.75", 0.7) if many else (_shade(class_id), 1.2)
        axes.plot(axis, curve, color=color, linewidth=width)
    axes.plot(axis, curves.mean(axis=0), color="black", linewidth=3)
    axes.grid(alpha=0.3)


def _add_legend(axes: Axes, summary: str, entries: list[str]) -> None:
    """Add a legend beside the curves: the mean, and the classes by name if they are few."""
    lines: list[Line2D] = [axes.lines[-1]]
    labels = [summary]
    if len(entries) <= LEGEND_CLASSES:
        lines += axes.lines[:-1]
        labels += entries
    else:
        lines += axes.lines[:1]
        labels.append(f"each of {len(entries)} classes")
    axes.legend(lines, labels, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)


def plot_confusion(path: Path, matrix: NDArray[np.integer], names: Sequence[str]) -> None:
    """Save the confusion matrix as shares of each true class.

    matrix: (K + 1, K + 1) counts [predicted, true], the last row and column background.
    """
    size = len(matrix)
    totals = matrix.sum(axis=0, keepdims=True)
    parts = np.where(matrix > 0, matrix / np.maximum(totals, 1), np.nan)
    ticks = [*(name_of(number, names) for number in range(size - 1)), "background"]
    side = min(16.0, max(6.0, 3.0 + 0.15 * size))
    with chart_style():
        figure, (axes,) = panels_of(1, 1, (side * 1.15, side))
        shown = axes.imshow(parts, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        named = _named_places(size)
        ticks, font_size = [ticks[place] for place in named], _tick_size(len(named), side - 2)
        axes.set_xticks(named, ticks, rotation=90 if size > 6 else 0, fontsize=font_size)
        axes.set_yticks(named, ticks, fontsize=font_size)
        axes.set(xlabel="true", ylabel="predicted", title="share of each true class (columns sum to 1)")
        if size <= ANNOTATED_CLASSES + 1:
            _write_cells(axes, parts, min(11.0, 0.35 * 72 * (side - 2) / size))
        figure.colorbar(shown, ax=axes, fraction=0.04, aspect=40, pad=0.02)
        save_figure(figure, path)


def _write_cells(axes: Axes, parts: Floats, font_size: float) -> None:
    for (row, column), part in np.ndenumerate(parts):
        if part >= 0.005:
            ink = "white" if part > 0.5 else "black"
            axes.text(column, row, f"{part:.2f}", ha="center", va="center", color=ink, fontsize=font_size)


def plot_results(csv_path: Path) -> Path:
    """Save results.png beside a results.csv and return its path.

    Any columns: `train/x` and `val/x` share a panel, as do `x/lr0` and `x/lr1`; the x axis is `epoch`, or the
    row number without such a column, counted from 1. Cells that are blank or not finite are left out.
    """
    columns = read_results(csv_path)
    epochs = columns.pop("epoch", None)  # 0-based in the file
    panels: dict[str, list[str]] = {}
    for column in columns:
        panels.setdefault(_panel_of(column), []).append(column)
    width = min(5, max(1, math.ceil(len(panels) ** 0.5)))
    with chart_style():
        figure, axes_list = panels_of(max(1, math.ceil(len(panels) / width)), width, (3.6, 2.8))
        for axes, (title, members) in zip(axes_list, panels.items(), strict=False):
            for member in members:
                values = columns[member]
                x = 1 + (np.arange(len(values), dtype=np.float64) if epochs is None else epochs)
                _draw_series(axes, x, values, member)
            axes.set_title(title if len(members) > 1 else members[0], fontsize=10)
            axes.set_xlabel("epoch", fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            axes.grid(alpha=0.3)
            if len(members) > 1:
                axes.legend(fontsize=7)
        for axes in axes_list[len(panels) :]:
            axes.set_axis_off()
        picture = csv_path.with_suffix(".png")
        save_figure(figure, picture)
    return picture


def _panel_of(column: str) -> str:
    """Return the panel of a column: its name without the prefix and without a number after a letter."""
    return re.sub(r"(?<=[A-Za-z])\d+$", "", column.split("/", 1)[-1])


def _draw_series(axes: Axes, epochs: Floats, values: Floats, label: str) -> None:
    """Draw a column as it is or, given enough values, faint with a smoothed line above it."""
    given = np.isfinite(epochs) & np.isfinite(values)
    x, y = epochs[given], values[given]
    smooth = len(y) >= 8
    (raw,) = axes.plot(x, y, linewidth=1, marker=".", markersize=3, alpha=0.4 if smooth else 1.0)
    if smooth:
        axes.plot(x, _smoothed(y), linewidth=1.8, color=raw.get_color(), label=label)
    else:
        raw.set_label(label)


def _smoothed(values: Floats) -> Floats:
    """Return a Gaussian moving average, narrow enough to follow a run.

    Padding by odd reflection keeps the first and the last value where they are.
    """
    width = max(1.0, len(values) / 60)
    reach = math.ceil(3 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    longer = np.pad(values, reach, mode="reflect", reflect_type="odd")
    smooth: Floats = np.convolve(longer, kernel / kernel.sum(), mode="valid")
    return smooth


@contextmanager
def chart_style() -> Iterator[None]:
    """Apply the charts' style, whatever the user's matplotlibrc says; a `$` in a name is not parsed as math.

    One thread at a time: matplotlib's settings are global to the process.
    """
    with (
        _style_lock,
        matplotlib.rc_context({"text.parse_math": False, "font.family": "DejaVu Sans", "savefig.dpi": 150}),
    ):
        yield


def save_figure(figure: Figure, path: Path, dpi: int | None = None) -> None:
    """Save a figure atomically in the format of its suffix; dpi: None for the style's.

    Raises:
        UserError: the system refuses to write there.
    """
    for text in figure.findobj(Text):
        letters = text.get_text().replace("\n", "")
        if not letters.isascii() and (font := font_for(letters)) not in (None, default_font()):
            text.get_fontproperties().set_file(font)
    kind, resolution = path.suffix.removeprefix("."), dpi or matplotlib.rcParams["savefig.dpi"]
    replace_atomically(path, lambda stream: figure.savefig(stream, format=kind, dpi=resolution))


def panels_of(rows: int, columns: int, panel_size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Create a figure on a canvas of its own with rows x columns axes of `panel_size` inches."""
    figure = new_figure(columns * panel_size[0], rows * panel_size[1])
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure of that many inches on a canvas of its own."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _shade(class_id: int) -> tuple[float, float, float]:
    """Return the colour of a class for matplotlib, dark enough for a white background."""
    blue, green, red = color_of(class_id)
    brightness = (0.114 * blue + 0.587 * green + 0.299 * red) / 255
    factor = min(1.0, BRIGHTEST_LINE / brightness) / 255
    return red * factor, green * factor, blue * factor


def _named_places(count: int) -> list[int]:
    """Return the classes whose names an axis shows: all, or evenly sampled ones if there are too many."""
    return list(range(0, count, math.ceil(count / NAMED_CLASSES)))


def _tick_size(count: int, inches: float) -> float:
    """Return the font size at which so many names fit side by side into so many inches."""
    return min(10.0, max(4.0, 72 * inches / count * 0.8))
