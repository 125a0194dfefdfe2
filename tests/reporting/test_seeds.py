"""Figures over seeds, by hand."""

import pytest

from utils.reporting.naming import short_title, weights_name
from utils.reporting.seeds import gain_over, gap_closed, part_to_reach, spread_text


def test_a_gain_is_the_mean_over_common_seeds_with_its_standard_error():
    own, other = {0: 0.24, 1: 0.36, 2: 0.9}, {0: 0.20, 1: 0.30, 7: 0.1}
    gain = gain_over(own, other)
    assert (gain.points, gain.error, gain.seeds) == (pytest.approx(5.0), pytest.approx(1.0), 2)
    assert str(gain) == "+5.0 ± 1.0"
    assert str(gain_over({0: 0.1}, {0: 0.2})) == "-10.0"
    assert gain_over({0: 0.1}, {1: 0.2}) is None


def test_the_gap_is_that_from_the_other_runs_to_the_goal():
    assert gap_closed({0: 0.3}, {0: 0.2}, 0.4) == pytest.approx(0.5)
    assert gap_closed({0: 0.3}, {0: 0.2}, 0.2) is None and gap_closed({0: 0.3}, {}, 0.9) is None


def test_a_score_is_reached_at_the_first_epoch_that_has_it():
    assert part_to_reach([0.1, 0.3, 0.2, 0.4], 0.3) == 0.5
    assert part_to_reach([0.1], 0.3) == float("inf")
    assert spread_text([0.2, 0.3]) == "25.0 ± 7.1" and spread_text([0.2]) == "20.0"


@pytest.mark.parametrize(
    ("path", "name"),
    [("weights/yolov5s.pt", "yolov5s"), ("runs/train/exp3/weights/best.pt", "exp3"), ("best.pt", "best"),
     ("C:\\runs\\exp\\weights\\epoch7.pt", "exp"), ("weights/best.pt", "best")],
)  # fmt: skip
def test_weights_of_a_run_are_called_by_the_run(path, name):
    assert weights_name(path) == name
    assert short_title(f"teacher {path}") == f"teacher {name}"


def test_a_long_title_keeps_its_end():
    assert short_title("a" * 50 + "end") == "…" + "a" * 30 + "end"
