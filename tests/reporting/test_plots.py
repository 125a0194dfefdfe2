"""Charts: they exist, show what they should, and take every odd input a run can bring."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from utils.reporting import plots
from utils.reporting.draw import color_of
from utils.reporting.plots import plot_confusion, plot_curves, plot_labels, plot_results

COCO_SIZED = [f"class {number}" for number in range(80)]
CURVES = ("P_curve.png", "R_curve.png", "F1_curve.png", "PR_curve.png")


@dataclass(frozen=True)
class Scores:
    """Made-up scores of so many classes."""

    classes: NDArray[np.int64]
    ap: NDArray[np.float64]
    confidence_axis: NDArray[np.float64]
    precision_curve: NDArray[np.float64]
    recall_curve: NDArray[np.float64]
    f1_curve: NDArray[np.float64]
    recall_axis: NDArray[np.float64]
    pr_curve: NDArray[np.float64]


def scores(count: int) -> Scores:
    axis = np.linspace(0, 1, 50)
    falling = (1 - axis) * np.linspace(0.5, 1, count)[:, None]
    return Scores(
        np.arange(count), np.full((count, 10), 0.5), axis, 1 - falling, falling, falling, axis, falling
    )


def read(path: Path) -> NDArray[np.uint8]:
    image = cv2.imread(str(path))
    assert image is not None
    return np.asarray(image, np.uint8)


def shows(image: NDArray[np.uint8], color: tuple[int, int, int]) -> bool:
    return bool((np.abs(image.astype(int) - np.array(color)).max(axis=2) < 12).any())


@pytest.mark.parametrize("count", [1, 3, 80])
def test_the_four_curves_are_saved_for_any_number_of_classes(tmp_path: Path, count: int) -> None:
    plot_curves(tmp_path, scores(count), COCO_SIZED[:count])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(CURVES)
    few = count <= plots.LEGEND_CLASSES
    assert all(shows(read(tmp_path / name), color_of(0)) == few for name in CURVES)


def test_odd_names_disturb_no_chart(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    names = ["_hidden", "a$b^$", "猫", "größe"]
    plot_curves(tmp_path, scores(4), names)
    plot_confusion(tmp_path / "confusion.png", np.eye(5, dtype=np.int64), names)
    plot_labels(tmp_path / "labels.jpg", np.array([[2, 0.5, 0.5, 0.1, 0.1]]), names)
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize("count", [1, 3, 80])
def test_the_confusion_of_any_number_of_classes_is_saved(tmp_path: Path, count: int) -> None:
    matrix = np.zeros((count + 1, count + 1), np.int64)
    matrix[0, 0], matrix[count, 0] = 90, 10  # the other columns stay empty
    plot_confusion(tmp_path / "confusion.png", matrix, COCO_SIZED[:count])
    image = read(tmp_path / "confusion.png")
    assert shows(image, (137, 72, 8)) or shows(image, (154, 81, 8))  # the dark end of the scale


def test_confusion_is_drawn_in_parts_of_each_true_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[NDArray[np.float64]] = []
    monkeypatch.setattr(plots, "_write_cells", lambda axes, parts, font_size: drawn.append(parts))
    matrix = np.array([[6, 1, 0], [2, 3, 0], [2, 0, 0]])  # [predicted, true]
    plot_confusion(tmp_path / "confusion.png", matrix, ["a", "b"])
    expected = np.array([[0.6, 0.25, np.nan], [0.2, 0.75, np.nan], [0.2, np.nan, np.nan]])
    np.testing.assert_allclose(drawn[0], expected)


@pytest.mark.parametrize(("labels", "classes"), [(0, 1), (1, 1), (40, 3), (5000, 80)])
def test_labels_are_drawn_for_any_number_of_them(tmp_path: Path, labels: int, classes: int) -> None:
    random = np.random.default_rng(0)
    rows = np.hstack((random.integers(0, classes, (labels, 1)), random.random((labels, 4)))).astype(
        np.float32
    )
    plot_labels(tmp_path / "labels.jpg", rows, COCO_SIZED[:classes])
    assert shows(read(tmp_path / "labels.jpg"), color_of(0)) == (labels > 0)


@pytest.mark.parametrize(
    ("unlabelled", "title"), [(0, ["1 labels"]), (7, ["1 labels", "+ 7 unlabelled images"])]
)
def test_unlabelled_images_are_counted_above_the_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unlabelled: int, title: list[str]
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    rows = np.array([[0, 0.5, 0.5, 0.1, 0.1]])
    plot_labels(tmp_path / "labels.jpg", rows, ["a", "b"], unlabelled)
    lines = figures[0].axes[0].get_title().splitlines()
    assert [line.startswith(start) for line, start in zip(lines, title, strict=True)] == [True] * len(title)


def test_results_of_any_columns_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("epoch, train/box_loss,metrics/recall, x/lr0\n0,1.5,,0.1\n1,nan,0.25,0.05\n2,0.5,inf\n")
    assert plot_results(path) == tmp_path / "results.png"
    assert shows(read(tmp_path / "results.png"), (180, 119, 31))  # the first colour of lines


@pytest.mark.parametrize("text", ["", "epoch\n", "epoch,train/box_loss\n", "a,b\n1,2\n"])
def test_results_of_no_or_odd_rows_are_drawn(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(text)
    assert plot_results(path).is_file()


@pytest.mark.parametrize(
    ("column", "panel"),
    [
        ("train/box_loss", "box_loss"),
        ("val/box_loss", "box_loss"),
        ("x/lr0", "lr"),
        ("x/lr12", "lr"),
        ("metrics/mAP_0.5", "mAP_0.5"),
        ("metrics/mAP_0.5:0.95", "mAP_0.5:0.95"),
        ("plain", "plain"),
    ],
)
def test_related_columns_share_a_panel(column: str, panel: str) -> None:
    assert plots._panel_of(column) == panel


@pytest.mark.parametrize("count", [8, 9, 60, 400])
def test_smoothing_keeps_length_and_a_constant_and_calms_noise(count: int) -> None:
    np.testing.assert_allclose(plots._smoothed(np.full(count, 3.0)), np.full(count, 3.0))
    noise = np.random.default_rng(0).normal(size=count)
    assert plots._smoothed(noise).shape == noise.shape
    np.testing.assert_allclose(plots._smoothed(noise)[[0, -1]], noise[[0, -1]])
    assert np.abs(np.diff(plots._smoothed(noise))).mean() < np.abs(np.diff(noise)).mean()


def test_lines_of_every_class_are_dark_enough_for_a_white_ground() -> None:
    brightness = np.array([plots._shade(number) for number in range(80)]) @ (0.299, 0.587, 0.114)
    assert brightness.max() < 0.63


def test_charts_of_two_threads_leave_the_settings_as_they_were(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    folders = [tmp_path / str(number) for number in range(2)]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda folder: plot_curves(folder, scores(2), ["a", "b"]), folders))
    assert dict(matplotlib.rcParams) == before
    pictures = {tuple((folder / name).read_bytes() for name in CURVES) for folder in folders}
    assert len(pictures) == 1
