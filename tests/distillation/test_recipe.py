"""What is learnt from a teacher, and what is said of it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from models.yolo import Model
from utils.batch import Batch, StudentOutput
from utils.config.options import DistillOptions
from utils.distillation import recipe
from utils.distillation.ensemble import Teachers
from utils.distillation.recipe import build_preset, compare_scores
from utils.distillation.teacher import Teacher
from utils.errors import UserError
from utils.losses.detection import DetectionLoss, LossGains


def network(names, seed=0):
    torch.manual_seed(seed)
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
    strangers = [Teacher(network([name, "car"]), f"{name}.pt") for name in ("cat", "dog")]
    teachers = Teachers(strangers, student, ["dot", "cell"])
    assert build_preset(options, SimpleNamespace(say=said.append), teachers) is None
    assert said[0].startswith("cat.pt and dog.pt know none of the data's classes: only features are")
    warned = []
    asked = replace(options, distill_loss="boxes", given=frozenset({"distill_loss"}))
    assert build_preset(asked, SimpleNamespace(say=said.append, warn=warned.append), teachers) is None
    assert warned == said[:1]  # what was asked for is not done


PRESETS_CLASS_GAIN = {
    "response": lambda preset: preset.cls / 3,
    "l2": lambda preset: preset.gains.cls,
    "objectness": lambda preset: preset.gains.cls,
    "boxes": lambda preset: preset.detection.gains.cls,
}


@pytest.mark.parametrize("kind", PRESETS_CLASS_GAIN)
def test_a_class_weighs_the_same_whichever_others_the_teacher_knows(kind):
    """The terms are means over the classes that both know; so their gain goes with the number of these."""
    names = ["a", "b", "c", "d"]
    student = network(names)
    detection = DetectionLoss(student.head.anchors, 4, LossGains(cls=0.4))
    context = SimpleNamespace(model=student, names=names, detection=detection, device="cpu", say=len)
    gains = []
    for known in (names, ["a", "x", "y", "z"]):
        teachers = Teachers([Teacher(network(known))], student, names)
        preset = build_preset(DistillOptions(teacher=("t.pt",), distill_loss=kind), context, teachers)
        gains.append(PRESETS_CLASS_GAIN[kind](preset))
    assert gains == pytest.approx([0.4, 0.1])


@pytest.mark.parametrize(
    ("kind", "soft", "has_term"),
    [("response", False, True), ("l2", False, True), ("boxes", False, True), ("boxes", True, False),
     ("kl", False, False)],
)  # fmt: skip
def test_a_single_class_in_common_has_a_class_term_or_a_line_says_why_not(kind, soft, has_term):
    names, said = ["a", "b", "c", "d"], []
    student, teacher = network(names), Teacher(network(["a", "x"], seed=1))
    detection = DetectionLoss(student.head.anchors, 4, LossGains())
    context = SimpleNamespace(
        model=student, names=names, detection=detection, device="cpu", warn=said.append, say=len
    )
    teachers = Teachers([teacher], student, names)
    options = DistillOptions(teacher=("t.pt",), distill_loss=kind, soft_loss=soft, t_conf_thres=0.0)
    preset = build_preset(options, context, teachers)
    batch = Batch(torch.rand(1, 3, 64, 64), torch.zeros(0, 6), torch.ones(1, dtype=torch.bool))
    taught, _ = teachers(batch.images)
    features = student.forward_features(batch.images)
    output = teachers.fit.of_student(StudentOutput(features, student.forward_head(features)))
    with torch.no_grad():
        assert (float(preset(batch, output, taught)["cls"]) > 0) == has_term
    assert bool(said) != has_term and all("no class term" in line for line in said)


class Judged:
    """Scores that a network has for each class."""

    def __init__(self, *by_class):
        self.by_class = by_class

    def over(self, classes=None):
        chosen = self.by_class if classes is None else [self.by_class[number] for number in classes]
        return 2 * sum(chosen) / len(chosen), sum(chosen) / len(chosen)


def scored(teachers, judged, options=None):
    """What is said and warned of where networks are judged one after the other, the student last."""
    said, warned, queue = [], [], list(judged)
    context = SimpleNamespace(
        names=NAMES, model=None, is_new=True, say=said.append, warn=warned.append,
        evaluate=lambda _: queue.pop(0),
    )  # fmt: skip
    options = options or DistillOptions(teacher=("t.pt",))
    return compare_scores(options, context, teachers), said, warned


NAMES = ["cell", "dot", "ring"]


def test_a_teacher_is_compared_by_the_classes_that_it_knows():
    teachers = Teachers([Teacher(network(["cell", "dot", "cat"]), "t.pt")], network(NAMES), NAMES)
    diagnosis, said, warned = scored(teachers, [Judged(0.2, 0.3, 0.0), Judged(0.3, 0.3, 0.0)])
    assert "mAP50 0.500, mAP50-95 0.250 on the validation split over 2 classes that it knows" in said[1]
    assert "does not know 1 class (ring)" in warned[0]
    told = "(mAP50-95 0.250) is not better than the student (0.300) over the classes that it knows: "
    assert told in warned[1]
    assert diagnosis.teacher_map is None and not diagnosis.scores
    assert len(scored(teachers, [Judged(0.2, 0.3, 0.0), Judged(0.1, 0.1, 0.9)])[2]) == 1


def test_what_one_teacher_lacks_does_not_count_against_another():
    whole, part = (Teacher(network(names), f"{len(names)}.pt") for names in (NAMES, ["cell", "dot"]))
    teachers = Teachers([whole, part], network(NAMES), NAMES)
    assert whole.known.student == (0, 1, 2) and part.known.student == (0, 1)
    student = Judged(0.5, 0.5, 0.5)
    diagnosis, said, warned = scored(teachers, [Judged(0.2, 0.2, 0.8), Judged(0.3, 0.3, 0), student])
    assert diagnosis.scores == {"teacher 3.pt": pytest.approx((0.8, 0.4))} and len(warned) == 1
    assert said[3] == "the teachers together: 3 of 3 classes known, each learnt from those that know it"


def test_a_ratio_that_follows_is_judged_by_what_it_is_to_hold():
    teachers = Teachers([Teacher(network(NAMES), "t.pt")], network(NAMES), NAMES)
    options = DistillOptions(teacher=("t.pt",), distill_ratio="auto", auto_ratio=0.25)
    assert scored(teachers, [Judged(1, 1, 1), Judged(0, 0, 0)], options)[0].held_at == 0.25
    assert scored(teachers, [Judged(1, 1, 1), Judged(0, 0, 0)])[0].held_at is None


@pytest.mark.parametrize(
    ("known", "told"),
    [
        ([["cell", "dot", "hoop"]], "the teacher does not know 1 class (ring); "),
        ([["cell", "dot"]], ""),  # none of its classes can be meant
        ([["cell", "dot", "hoop"], ["Ring", "hoop"]], ""),
        ([["cell", "hoop"], ["dot", "hoop"]], "the teachers do not know 1 class (ring); "),
    ],
)
def test_classes_that_may_only_be_called_otherwise_are_asked_about(known, told):
    teachers = Teachers([Teacher(network(own), "t.pt") for own in known], network(NAMES), NAMES)
    advice = recipe.advice_on_names(teachers)
    assert bool(advice) == bool(told) and advice.startswith(told)
    assert not advice or "called otherwise there (as in hoop), write" in advice


def test_a_state_tells_a_teacher_that_is_the_students_average_from_none():
    one, own = Teacher(network(NAMES), "t.pt"), Teacher(network(NAMES), "ema", frozen=False)
    student = network(NAMES)
    assert Teachers([one], student, NAMES).checksums() != Teachers([one, own], student, NAMES).checksums()


@pytest.mark.parametrize(
    ("known", "scale", "words"),
    [(["cell", "dot"], 1.0, "classes ring"), (NAMES, 2.0, "1 of the student's 3 levels"), (NAMES, 1.0, "")],
)
def test_without_labels_a_teacher_of_a_part_of_the_head_is_refused(known, scale, words):
    student = network(NAMES)
    teachers = Teachers([Teacher(network(known), "t.pt", scale=scale)], student, NAMES)
    detection = DetectionLoss(student.head.anchors, 3, LossGains())
    context = SimpleNamespace(
        model=student, names=NAMES, detection=detection, device="cpu", say=len, warn=len
    )
    options = DistillOptions(teacher=("t.pt",), with_gt_loss=False)
    if not words:
        assert build_preset(options, context, teachers) is not None
        return
    with pytest.raises(UserError, match=rf"{words}, which nothing would train.*--no-with-gt-loss"):
        build_preset(options, context, teachers)


def test_a_single_class_of_another_name_is_taken_and_told():
    teacher = Teacher(network(["person"]), "t.pt")
    teacher.fit_to(network(["car"]), ["car"])
    assert teacher.mapping == "its class 'person' is taken for 'car'"
    teacher.fit_to(network(["Person"]), ["Person"])
    assert teacher.mapping == ""


@pytest.mark.parametrize(
    ("asked", "imgsz", "image_size", "scale"),
    [
        (0, 64, 64, 1), (128, 64, 64, 2), (40, 64, 64, 1), (32, 64, 64, 0.5), (96, 64, 64, 1.5),
        (672, 336, 352, 2), (336, 336, 352, 1), (352, 336, 352, 1), (704, 336, 352, 2),
        (84, 336, 352, 0.25), (112, 224, 224, 0.5), (400, 100, 128, 4), (0, 336, 352, 1),
    ],
)  # fmt: skip
def test_a_teachers_pictures_are_as_large_as_asked_for(asked, imgsz, image_size, scale, monkeypatch):
    """Ratios to --imgsz hold for its rounded size; others are rounded up to the multiple of 32, as it is."""
    members = []

    def kept(found, *_arguments):
        members.extend(found)
        raise StopIteration

    monkeypatch.setattr(recipe, "Teachers", kept)
    context = SimpleNamespace(
        model=network(NAMES), ema=network(NAMES), image_size=image_size, names=NAMES, merged=()
    )
    with pytest.raises(StopIteration):
        options = DistillOptions(teacher=("ema",), teacher_img_size=asked, imgsz=imgsz)
        recipe.build_distiller(options, [None], context)
    assert [member.scale for member in members] == [scale]
