"""Images as two networks see them, side by side.

Shapes: H W pixels, n detections, m labels. The colours are distinguishable for the colour-blind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from utils.reporting.draw import drawable, name_of
from utils.reporting.naming import short_title
from utils.reporting.plots import PALETTE, chart_style, new_figure, save_figure

Floats = NDArray[np.float64]

PANEL_INCHES = 3.0  # width of one panel
TALLEST, FLATTEST = 1.4, 0.5  # limits of a panel's height over width, whatever the image's
OBJECTNESS_SCENES = 4
LABEL, BOTH, ALONE = PALETTE["green"], PALETTE["sky"], PALETTE["orange"]


@dataclass(frozen=True)
class Scene:
    """An image with its labels and the outputs of two networks; all boxes in its pixels.

    image_rgb: (H, W, 3). amount: how much the networks differ. labels: (m, 5) class, x1, y1, x2, y2, None
    for an unlabelled image. found: per network (n, 6) x1, y1, x2, y2, confidence, class. alone: per network
    (n,) bool, whether the other network misses it. objectness: per network (H, W), 0..1. shown_confidence:
    minimum confidence of detections to be shown.
    """

    image_rgb: NDArray[np.uint8]
    name: str
    amount: float
    labels: Floats | None
    found: tuple[Floats, Floats]
    alone: tuple[NDArray[np.bool_], NDArray[np.bool_]]
    objectness: tuple[NDArray[np.floating], NDArray[np.floating]]
    shown_confidence: float


def plot_disagreement(
    path: Path, scenes: Sequence[Scene], titles: tuple[str, str], names: Sequence[str]
) -> None:
    """Save the images with labels, the first network's boxes and the second's, one row per image."""
    with chart_style():
        figure, rows = _rows(scenes, ("labels", *titles))
        for scene, panels in zip(scenes, rows, strict=True):
            for panel in panels:
                panel.imshow(scene.image_rgb)
            _caption(
                panels[0], f"{drawable(scene.name)}, disagreement {scene.amount:.2f}", scene.labels is None
            )
            for label in scene.labels if scene.labels is not None else ():
                _box(panels[0], scene, label[1:], name_of(int(label[0]), names), LABEL)
            for panel, found, alone in zip(panels[1:], scene.found, scene.alone, strict=True):
                shown = found[:, 4] >= scene.shown_confidence
                for row, is_alone in sorted(
                    zip(found[shown], alone[shown], strict=True), key=lambda entry: entry[0][4]
                ):
                    text = f"{name_of(int(row[5]), names)} {row[4]:.2f}"
                    _box(panel, scene, row[:4], text, ALONE if is_alone else BOTH)
        least = scenes[0].shown_confidence
        entries = (
            (LABEL, "labelled"),
            (BOTH, "seen by both"),
            (ALONE, f"seen by one alone, from confidence {least:g} on"),
        )
        lines = [Line2D([], [], color=color, linewidth=3, label=text) for color, text in entries]
        figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        save_figure(figure, path, dpi=120)


def plot_objectness(path: Path, scenes: Sequence[Scene], titles: tuple[str, str]) -> None:
    """Save where each network sees any object, and where the second sees more or less than the first."""
    scenes = scenes[:OBJECTNESS_SCENES]
    with chart_style():
        figure, rows = _rows(scenes, ("labels", *titles, "difference"), bars=True)
        shown: list[AxesImage] = []
        for scene, panels in zip(scenes, rows, strict=True):
            panels[0].imshow(scene.image_rgb)
            _caption(panels[0], drawable(scene.name), scene.labels is None)
            for label in scene.labels if scene.labels is not None else ():
                _box(panels[0], scene, label[1:], "", LABEL)
            first, second = scene.objectness
            shown = [
                _heat(panels[1], scene, first, "viridis", 0.0),
                _heat(panels[2], scene, second, "viridis", 0.0),
                _heat(panels[3], scene, second - first, "PuOr_r", -1.0),
            ]
        _bar(figure, rows[-1][1:3], shown[1], ("nothing", "objectness", "surely an object"))
        sides = [f"{drawable(title.partition(' ')[0])} more" for title in titles]
        _bar(figure, rows[-1][3:], shown[2], (sides[0], "", sides[1]))
        save_figure(figure, path, dpi=120)


def _bar(figure: Figure, above: Sequence[Axes], shown: AxesImage, ends: tuple[str, str, str]) -> None:
    """Add a colour bar below panels, with words for its left end, middle and right end."""
    grid = above[0].get_gridspec()
    assert grid is not None
    first, last = (panel.get_subplotspec() for panel in (above[0], above[-1]))
    assert first is not None and last is not None
    place = figure.add_subplot(grid[-1, first.colspan.start : last.colspan.stop])
    bar = figure.colorbar(shown, cax=place, orientation="horizontal")
    low, high = shown.get_clim()
    bar.set_ticks([low, (low + high) / 2, high], labels=list(ends), fontsize=8)
    left, middle, right = place.get_xticklabels()
    left.set_horizontalalignment("left")
    middle.set_horizontalalignment("center")
    right.set_horizontalalignment("right")


def _rows(
    scenes: Sequence[Scene], titles: Sequence[str], bars: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """Create a figure with a row of panels per image, as high as the image needs, and titles on top.

    bars: adds a last row for colour bars.
    """
    aspects = [min(max(s.image_rgb.shape[0] / s.image_rgb.shape[1], FLATTEST), TALLEST) for s in scenes]
    height = sum(aspects) * PANEL_INCHES + 0.25 * len(scenes) + 0.8
    figure = new_figure(len(titles) * PANEL_INCHES, height)
    ratios = [*aspects, 0.05] if bars else aspects
    grid = figure.add_gridspec(len(ratios), len(titles), height_ratios=ratios)
    panels = [
        [figure.add_subplot(grid[row, column]) for column in range(len(titles))] for row in range(len(scenes))
    ]
    for column, title in enumerate(titles):
        panels[0][column].set_title(drawable(short_title(title)), fontsize=11, pad=18)
    for panel in (panel for row in panels for panel in row):
        panel.set(xticks=(), yticks=())
        for side in panel.spines.values():
            side.set_visible(False)
    return figure, panels


def _caption(panel: Axes, text: str, unlabelled: bool) -> None:
    """Write a line above an image's left edge, which may continue over the next panel."""
    mark = ", unlabelled" if unlabelled else ""
    panel.annotate(
        text + mark, (0, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", fontsize=8,
        color="0.25", annotation_clip=False,
    ).set_in_layout(False)  # fmt: skip


def _box(panel: Axes, scene: Scene, corners: Floats, text: str, color: str) -> None:
    """Draw an outline with its text on a plate, inside the image."""
    height, width = scene.image_rgb.shape[:2]
    limits = (width - 1, height - 1, width - 1, height - 1)
    x1, y1, x2, y2 = np.clip(corners, 0, limits).tolist()
    outline = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.8)
    panel.add_patch(outline)
    if not text:
        return
    above, right = y1 > 0.06 * height, x1 > 0.6 * width
    panel.text(
        x2 if right else x1, y1, text, fontsize=6.5, color="black",
        ha="right" if right else "left", va="bottom" if above else "top",
        bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
    ).set_in_layout(False)  # fmt: skip


def _heat(panel: Axes, scene: Scene, values: NDArray[np.floating], colors: str, low: float) -> AxesImage:
    """Draw values (H, W) from `low` to 1 in colour over the image in grey."""
    panel.imshow(scene.image_rgb.mean(axis=2), cmap="gray", vmin=0, vmax=255)
    return panel.imshow(values, cmap=colors, vmin=low, vmax=1, alpha=0.8)
