"""What is learnt from a teacher, and what is said of it."""

from types import SimpleNamespace

import pytest

from models.yolo import Model
from utils.config.options import DistillOptions
from utils.distillation.ensemble import Teachers
from utils.distillation.recipe import build_preset
from utils.distillation.teacher import Teacher


def network(names):
    model = Model("models/demo-student.yaml", nc=len(names))
    model.names = list(names)
    return model


@pytest.mark.parametrize(("given", "told"), [("none", "cwd"), ("pkd", "pkd")])
def test_teachers_without_a_class_for_the_student_are_told_with_the_feature_loss_that_remains(given, told):
    said = []
    student = network(names=["dot", "cell"])
    teachers = Teachers([Teacher(network(names=["car", "bus"]), "t.pt")], student, ["dot", "cell"])
    options = DistillOptions(teacher=("t.pt",), feature_loss=given)
    assert build_preset(options, SimpleNamespace(say=said.append), teachers) is None
    assert said == [
        f"t.pt knows none of the data's classes: only features are learnt from it (--feature-loss {told})"
    ]
    said.clear()
    apart = [Teacher(network([name, "car"]), f"{name}.pt") for name in ("dot", "cell")]
    assert (
        build_preset(options, SimpleNamespace(say=said.append), Teachers(apart, student, ["dot", "cell"]))
        is None
    )
    assert said[0].startswith("dot.pt and cell.pt have no class of the data in common: only features are")
