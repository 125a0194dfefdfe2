"""The chart of an evolution."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.reporting.evolution import plot_evolution

RED = (60, 20, 220)  # crimson, as OpenCV has it


def red_pixels(picture: np.ndarray) -> np.ndarray:
    """(n, 2) x, y of the pixels with the colour of the best."""
    return np.argwhere((np.abs(picture.astype(int) - RED) < 12).all(axis=2))[:, ::-1]


def test_every_value_that_changed_has_a_panel_and_each_panel_its_star(tmp_path: Path) -> None:
    numbers = np.arange(9.0)
    fitness = np.array([0.2, 0.3, 0.0, 0.25, 0.5, 0.31, 0.4, 0.35, 0.45])
    values = {"lr0": numbers / 100, "box": 0.05 + numbers[::-1] / 50, "degrees": np.zeros(9)}
    plot_evolution(tmp_path / "evolve.png", numbers, fitness, values)
    picture = cv2.imread(str(tmp_path / "evolve.png"))
    height, width = picture.shape[:2]
    assert 2 < width / height < 4  # three panels beside each other: degrees has none
    stars = red_pixels(picture)
    groups = np.split(np.sort(stars[:, 0]), np.flatnonzero(np.diff(np.sort(stars[:, 0])) > width / 12) + 1)
    assert len(groups) == 3
    # The best score is the highest point of each panel.
    assert stars[:, 1].max() < height / 2.5


@pytest.mark.parametrize("fitness", [[0.0], [0.0, 0.0], [0.3, 0.3]])
def test_few_generations_and_failed_ones_can_be_drawn(fitness: list[float], tmp_path: Path) -> None:
    count = len(fitness)
    plot_evolution(
        tmp_path / "e.png",
        np.arange(count, dtype=float),
        np.array(fitness),
        {"lr0": np.linspace(1, 2, count)},
    )
    assert cv2.imread(str(tmp_path / "e.png")) is not None
