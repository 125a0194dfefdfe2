"""The experiments' own script, on a small image set."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.ablation import CAUSES

ROOT = Path(__file__).resolve().parents[2]
DEMO = ["--weights", "weights/demo_student.pt", "--teacher", "weights/demo_teacher.pt"]
SMALL = ["--img", "64", "--batch", "4", "--workers", "0", "--device", "cpu", "--noautoanchor", "--noplots"]


@pytest.fixture(scope="module")
def small_set(make_shapes, tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("small"), images=4, names=("ring", "star"))


@pytest.mark.parametrize("cause", CAUSES)
def test_a_student_trains_with_each_cause_of_a_weak_distillation(cause, small_set, rows_of, tmp_path):
    words = ["--data", small_set, "--epochs", "1", "--distill-loss", "response", "--project", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.ablation", cause, *DEMO, *SMALL, *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(tmp_path / "exp")
    assert float(row["train/distill_box_loss"]) > 0 and float(row["train/distill_obj_loss"]) > 0
