"""The images of a run: a run does not end because one cannot be written."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.yolo import Model
from utils.batch import Batch, Progress
from utils.evaluation.evaluate import EvaluationSettings
from utils.training.plots import RunPlots

INDEX = SimpleNamespace(
    all_labels=lambda: np.array([[0, 0.5, 0.5, 0.2, 0.2]], np.float32), unlabelled_count=0, names=["a"]
)


BATCH = Batch(
    torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, 6), torch.ones(2, dtype=torch.bool)
)


@pytest.mark.fault(
    "a plot of a run cannot be written (a folder is in its place)",
    "one warning; the run continues without plots",
)
def test_a_run_goes_on_without_pictures_where_one_cannot_be_written(tmp_path):
    warnings = []
    pictures = RunPlots(tmp_path, INDEX, warnings.append, enabled=True)
    (tmp_path / "labels.jpg" / "in the way").mkdir(parents=True)
    pictures.labels()
    pictures.training_batch(BATCH, Progress(0, 0, 1, 1))
    assert len(warnings) == 1 and str(tmp_path / "labels.jpg") in warnings[0]
    assert "goes on without plots" in warnings[0]
    assert [path.name for path in tmp_path.iterdir()] == ["labels.jpg"]


def test_pictures_are_drawn_where_nothing_is_in_the_way(tmp_path):
    pictures = RunPlots(tmp_path, INDEX, pytest.fail, enabled=True)
    pictures.labels()
    pictures.training_batch(BATCH, Progress(0, 0, 1, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.jpg", "train_batch0.jpg"]


def test_a_teacher_is_compared_in_the_classes_that_it_knows(tmp_path):
    pictures = RunPlots(tmp_path, INDEX, pytest.fail, enabled=True)
    model = Model("models/demo-student.yaml", nc=1)
    others = {name: copy.copy(model) for name in ("all", "part", "none")}
    others["part"].known_classes, others["none"].known_classes = (0,), ()
    _, *observers = pictures.observers(model, others, EvaluationSettings())
    assert [(one.titles[1], one.classes) for one in observers] == [("all", None), ("part", (0,))]
