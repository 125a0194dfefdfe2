"""What is learnt from a teacher, and what is said of it."""

from types import SimpleNamespace

import pytest

from utils.config.options import DistillOptions
from utils.distillation.recipe import build_preset


@pytest.mark.parametrize(("given", "told"), [("none", "cwd"), ("pkd", "pkd")])
def test_a_teacher_that_knows_no_class_is_told_with_the_feature_loss_that_remains(given, told):
    said = []
    teachers = SimpleNamespace(source="t.pt", fit=SimpleNamespace(classes=SimpleNamespace(student=())))
    options = DistillOptions(teacher=("t.pt",), feature_loss=given)
    assert build_preset(options, SimpleNamespace(say=said.append), teachers) is None
    assert said == [
        f"t.pt knows none of the data's classes: only features are learnt from it (--feature-loss {told})"
    ]
