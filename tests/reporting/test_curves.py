"""Curves of groups of runs: what is drawn, and that odd lengths do no harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from utils.reporting.curves import COLORS, Curve, CurveGroup, plot_groups


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def curve(*values: float, begin: int = 1) -> Curve:
    return Curve(np.arange(begin, begin + len(values), dtype=np.float64), np.array(values))


def test_a_group_is_its_mean_shaded_from_worst_to_best(tmp_path: Path, drawn: list[Figure]) -> None:
    groups = [
        CurveGroup("plain (2 seeds)", (curve(0.1, 0.2), curve(0.3, 0.4)), (0.2, 0.4)),
        CurveGroup("distilled", (curve(0.5, 0.6),), (0.6,)),
    ]
    plot_groups(
        tmp_path / "a.png", groups, title="t", ylabel="y", levels={"the teacher": 0.8}, verdicts=["so"]
    )
    curves, points = drawn[0].axes
    mean, other, level = curves.lines
    np.testing.assert_allclose(mean.get_ydata(), [0.2, 0.3])
    np.testing.assert_allclose(other.get_ydata(), [0.5, 0.6])
    assert [mean.get_color(), other.get_color()] == list(COLORS[:2])
    assert level.get_ydata() == [0.8, 0.8] and level.get_linestyle() == "--"
    (band,) = curves.collections
    assert band.get_paths()[0].get_extents().bounds == pytest.approx((1, 0.1, 1, 0.3))
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain (2 seeds)", "distilled", "the teacher"]
    assert [line.get_ydata() for line in points.lines][0].tolist() == [0.2, 0.4]
    drawn[0].canvas.draw()
    renderer = drawn[0].canvas.get_renderer()  # type: ignore[attr-defined]
    assert not legend.get_window_extent(renderer).overlaps(curves.get_window_extent(renderer))


def test_runs_of_unequal_length_have_a_mean_as_far_as_all_go(tmp_path: Path, drawn: list[Figure]) -> None:
    group = CurveGroup("g", (curve(0.1, 0.2, 0.3, 0.4), curve(0.3, 0.4), curve(0.2, begin=2)))
    plot_groups(tmp_path / "a.png", [group, CurveGroup("h", (curve(0.5, begin=9),))], title="t", ylabel="y")
    (axes,) = drawn[0].axes
    mean, beyond, single = axes.lines
    assert (list(mean.get_xdata()), list(beyond.get_xdata())) == ([2.0], [2.0, 3.0, 4.0])
    assert np.asarray(mean.get_ydata()) == pytest.approx([0.8 / 3])
    assert list(single.get_xdata()) == [9.0]


def test_runs_without_a_common_epoch_and_many_groups_with_long_names_are_drawn(tmp_path: Path) -> None:
    apart = CurveGroup("apart", (curve(0.1, 0.2), curve(0.3, 0.4, begin=5)), (0.2, 0.4))
    many = [
        CurveGroup(f"{number} " + "a long $ name " * 15, (curve(0.1, 0.2),), (0.1,)) for number in range(30)
    ]
    plot_groups(tmp_path / "a.png", [apart, *many], title="t", ylabel="y")
    image = cv2.imread(str(tmp_path / "a.png"))
    assert image is not None and image.shape[1] >= 900
