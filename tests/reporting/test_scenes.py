"""Images with two networks' boxes and maps, of every shape."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.reporting.scenes import Scene, plot_disagreement, plot_objectness


def scene(height: int, width: int, labels: np.ndarray | None, count: int = 3) -> Scene:
    rng = np.random.default_rng(height + width)
    corners = np.sort(rng.uniform(-5, max(height, width) + 5, (2, count, 2, 2)), axis=2)
    boxes = corners.reshape(2, count, 4)
    found = [np.hstack((part, np.full((count, 1), 0.5), rng.integers(0, 3, (count, 1)))) for part in boxes]
    maps = rng.uniform(0, 1, (2, height, width))
    return Scene(
        image_rgb=rng.integers(0, 255, (height, width, 3), dtype=np.uint8),
        name="a name with $ and 血.png",
        amount=1.25,
        labels=labels,
        found=(found[0], found[1]),
        alone=(np.array([True] * count), np.array([False] * count)),
        objectness=(maps[0], maps[1]),
        shown_confidence=0.25,
    )


@pytest.mark.filterwarnings("error::UserWarning")
def test_one_picture_or_several_of_any_shape_are_drawn(tmp_path: Path) -> None:
    labels = np.array([[0.0, 1.0, 1.0, 30.0, 20.0], [7.0, 0.0, 0.0, 900.0, 900.0]])
    scenes = [scene(64, 64, labels), scene(30, 400, None), scene(300, 40, labels[:0], count=0)]
    titles = ("student", "teacher runs/train/a-run-with-a-very-long-name-indeed/weights/best.pt")
    # Rows as high as the images want, from half to 1.4 times as high as wide, and room for words.
    for chosen, inches in ((scenes[:1], 3 + 0.25 + 0.8), (scenes, 3 * (1 + 0.5 + 1.4) + 3 * 0.25 + 0.8)):
        plot_disagreement(tmp_path / "d.jpg", chosen, titles, ["a", "b"])
        plot_objectness(tmp_path / "o.jpg", chosen, titles)
        for name, columns in (("d.jpg", 3), ("o.jpg", 4)):
            image = cv2.imread(str(tmp_path / name))
            assert image is not None
            assert image.shape[:2] == pytest.approx((120 * inches, 360 * columns), abs=2)


def test_boxes_seen_by_both_by_one_and_labels_have_colours_of_their_own(tmp_path: Path) -> None:
    one = scene(64, 64, np.array([[0.0, 5.0, 5.0, 60.0, 60.0]]), count=1)
    one.image_rgb[:] = 255
    for found in one.found:
        found[0, :4] = (5, 5, 60, 60)
    plot_disagreement(tmp_path / "d.png", [one], ("student", "teacher"), ["a", "b", "c"])
    image = cv2.imread(str(tmp_path / "d.png"))
    assert image is not None
    panels = np.array_split(image[60:-60], 3, axis=1)
    green, orange, sky = (0x73, 0x9E, 0x00), (0x00, 0x9F, 0xE6), (0xE9, 0xB4, 0x56)  # blue, green, red
    for panel, own, others in zip(
        panels, (green, orange, sky), ((orange, sky), (green, sky), (green, orange)), strict=True
    ):
        assert (np.abs(panel.astype(int) - own).max(axis=2) < 6).sum() > 100
        for color in others:
            assert not (np.abs(panel.astype(int) - color).max(axis=2) < 6).any()
