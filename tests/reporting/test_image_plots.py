"""Images of batches."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils.reporting.draw import Image, color_of
from utils.reporting.image_plots import AMBER, BATCH_SIDE, plot_batch

NONE = torch.zeros(0, 6)


def grey_batch(count: int, size: int = 64) -> torch.Tensor:
    return torch.full((count, 3, size, size), 200, dtype=torch.uint8)


def read(path: Path) -> Image:
    image = cv2.imread(str(path))
    assert image is not None
    return np.asarray(image, np.uint8)


def near(image: Image, color: tuple[int, int, int]) -> np.ndarray:
    return np.abs(image.astype(int) - np.array(color)).max(axis=2) < 12


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (16, 4, 4), (20, 4, 4)]
)
def test_up_to_sixteen_images_form_a_grid(tmp_path: Path, count: int, columns: int, rows: int) -> None:
    path = tmp_path / "batch.png"
    plot_batch(path, grey_batch(count), NONE, [f"{i}.jpg" for i in range(count)], ["a"])
    height, width = read(path).shape[:2]
    assert (height, width) == (rows * (64 + 22 + 4), columns * (64 + 4))


def test_colors_are_those_of_the_image_in_both_number_formats(tmp_path: Path) -> None:
    images = grey_batch(1)
    images[:, 0] = 250  # red
    images[:, 1:] = 10
    plot_batch(tmp_path / "bytes.png", images, NONE, ["a.jpg"], ["a"])
    plot_batch(tmp_path / "floats.png", images.float() / 255, NONE, ["a.jpg"], ["a"])
    plot_batch(tmp_path / "halves.png", images.half() / 255, NONE, ["a.jpg"], ["a"])
    assert tuple(read(tmp_path / "bytes.png")[60, 30]) == (10, 10, 250)
    assert (read(tmp_path / "bytes.png") == read(tmp_path / "floats.png")).all()
    assert near(read(tmp_path / "halves.png")[60:61, 30:31], (10, 10, 250)).all()


def test_boxes_lie_on_their_own_image(tmp_path: Path) -> None:
    path = tmp_path / "batch.png"
    targets = torch.tensor([[1.0, 2, 0.5, 0.5, 0.5, 0.5]])
    plot_batch(path, grey_batch(2, 128), targets, ["a.jpg", "b.jpg"], ["x", "y", "z"])
    found = near(read(path), color_of(2))
    xs = np.nonzero(found)[1]
    second = 128 + 4 + 2
    assert not found[:, : second - 2].any()
    assert abs(xs.min() - (second + 32)) <= 1 and abs(xs.max() - (second + 96)) <= 1


def test_confidences_are_written_beside_names(tmp_path: Path) -> None:
    targets = torch.tensor([[0.0, 0, 0.5, 0.5, 0.5, 0.5]])
    plot_batch(tmp_path / "labels.png", grey_batch(1, 128), targets, ["a.jpg"], ["x"])
    plot_batch(tmp_path / "found.png", grey_batch(1, 128), targets, ["a.jpg"], ["x"], torch.tensor([0.7]))
    plates = [near(read(tmp_path / name), color_of(0)).sum() for name in ("labels.png", "found.png")]
    assert plates[1] > plates[0]


def test_images_that_nobody_labelled_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "batch.png"
    labelled = torch.tensor([True, False])
    plot_batch(path, grey_batch(2, 128), NONE, ["a.jpg", "b.jpg"], ["x"], labelled=labelled)
    marked = near(read(path), AMBER)
    assert not marked[:, :132].any()
    assert marked[:, 132:].any()


def test_the_mark_of_a_narrow_image_keeps_its_beginning(tmp_path: Path) -> None:
    for size, name in ((64, "narrow.png"), (192, "wide.png")):
        plot_batch(tmp_path / name, grey_batch(1, size), NONE, [""], ["x"], labelled=torch.tensor([False]))
    narrow, wide = read(tmp_path / "narrow.png"), read(tmp_path / "wide.png")
    start = 2 + 192 - 90
    assert (narrow[24:46, 2:66] == wide[2:24, start : start + 64]).all()


def test_the_mark_of_a_narrow_image_leaves_its_name_all_the_width(tmp_path: Path) -> None:
    names = ["cells_0042.jpg"] * 2
    plot_batch(tmp_path / "plain.png", grey_batch(2, 96), NONE, names, ["x"])
    known = torch.tensor([True, False])
    plot_batch(tmp_path / "marked.png", grey_batch(2, 96), NONE, names, ["x"], labelled=known)
    plain, marked = read(tmp_path / "plain.png"), read(tmp_path / "marked.png")
    assert (marked[:24] == plain[:24]).all()
    assert not near(marked, AMBER)[:, :100].any() and near(marked, AMBER)[24:46, 102:198].any()


def test_large_batches_are_scaled_down(tmp_path: Path) -> None:
    path = tmp_path / "batch.jpg"
    targets = torch.tensor([[3.0, 0, 0.5, 0.5, 0.9, 0.9]])
    plot_batch(path, grey_batch(4, 1280), targets, ["a.jpg"] * 4, ["x"])
    assert max(read(path).shape) <= BATCH_SIDE + 2 * (22 + 4)


def test_long_and_foreign_file_names_and_missing_paths_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "batch.png"
    plot_batch(
        path, grey_batch(3, 32), NONE, ["x" * 200 + ".jpg", "ünïcode 猫.png"], ["a"], labelled=torch.zeros(3)
    )
    assert read(path).shape == (2 * (58 + 22), 2 * 36, 3)
