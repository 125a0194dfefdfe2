"""The experiments' own script, on a small image set."""

import pytest

from experiments.ablation import CAUSES

DEMO = ["--weights", "weights/demo_student.pt", "--teacher", "weights/demo_teacher.pt"]
SMALL = ["--img", "64", "--batch", "4", "--workers", "0", "--device", "cpu", "--noautoanchor", "--noplots"]


@pytest.fixture(scope="module")
def small_set(make_shapes, tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("small"), images=4, names=("ring", "star"))


@pytest.mark.parametrize("cause", CAUSES)
def test_a_student_trains_with_each_cause_of_a_weak_distillation(
    cause, small_set, run_script, rows_of, tmp_path
):
    words = ["--data", small_set, "--epochs", "1", "--distill-loss", "response", "--project", tmp_path]
    done = run_script("experiments/ablation.py", cause, *DEMO, *SMALL, *words)
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(tmp_path / "exp")
    assert float(row["train/distill_box_loss"]) > 0 and float(row["train/distill_obj_loss"]) > 0
