"""Several teachers answer together, and the student's own average can be one of them."""

import pytest
import torch

from tests.distillation.networks import NAMES, network
from utils.batch import StudentOutput
from utils.distillation.ensemble import Teachers, mean_level, mean_probability, specialists_level
from utils.distillation.teacher import Teacher, TeacherInStudentFrame
from utils.errors import UserError


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_the_mean_of_probabilities_is_exact_where_logits_are_far_out():
    logits = torch.tensor([[-40.0, 40.0, 0.0, -3.0], [-40.0, 40.0, 0.0, 1.0]])
    mean = mean_probability(logits)
    assert mean[:3].tolist() == [-40.0, 40.0, 0.0]
    assert float(mean[3].sigmoid()) == pytest.approx(float(logits[:, 3].sigmoid().mean()), rel=1e-6)


def test_equal_teachers_say_together_what_each_says():
    level = torch.randn(1, 3, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_level([level, level.clone()]), level, atol=1e-4, rtol=1e-4)


def test_boxes_are_means_of_sizes_weighted_by_objectness():
    level = torch.zeros(2, 1, 1, 1, 1, 6)
    level[1, ..., :4] = 2.0
    level[:, ..., 4] = torch.tensor([-30.0, 5.0]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(mean_level(list(level))[..., :4], level[1, ..., :4], atol=1e-4, rtol=1e-4)
    level[:, ..., 4] = 5.0
    wh = (2 * mean_level(list(level))[..., 2:4].sigmoid()) ** 2
    wanted = ((2 * level[..., 2:4].sigmoid()) ** 2).mean(0)
    torch.testing.assert_close(wh, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_one_that_tells_no_classes_apart_knows_all_that_are_one(images, turned):
    """With --single-cls, beside a teacher that knows all of the merged classes, or a part of them."""
    student, merged = network(names=["item"]), ["a", "b", "c"]
    for known, is_whole in ((["a", "b", "c"], True), (["b", "c", "x"], False)):
        members = [Teacher(network(1, names=["thing"])), Teacher(network(2, names=known))]
        teachers = Teachers(members[::-1] if turned else members, student, ["item"], merged)
        assert teachers.fit.classes.student == (0,) and not teachers.fit.classes.unknown
        together, each = teachers(images)
        assert together.levels[0].shape[-1] == 6
        own = each[0 if turned else 1]
        for level, raw in zip(own.levels, own.unconverted_levels, strict=True):
            assert torch.equal(level[..., 4], raw[..., 4]) == is_whole  # else without the objects x
        if not is_whole:  # an object that one of them does not know is one all the same
            wanted = torch.stack([view.levels[0][..., 4] for view in each]).amax(0)
            assert torch.equal(together.levels[0][..., 4], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_reduced_precision_teachers_say_together_what_they_say_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    levels = 40 * torch.randn(2, 2, 3, 4, 4, 8, generator=generator).sign()
    levels[:, 1] = 3 * torch.randn(2, 3, 4, 4, 8, generator=generator)
    halves = list(levels.to(dtype))
    together = mean_level(halves)
    assert together.dtype is dtype and together.isfinite().all()
    torch.testing.assert_close(together, mean_level([level.float() for level in halves]).to(dtype))


@pytest.mark.parametrize("turned", [False, True])
def test_strangers_leave_the_classes_to_one_that_tells_none_apart(images, turned):
    student = network(names=["item"])
    for merged, others in ((["a", "b"], ["xy"]), (["a", "b", "c"], ["ax", "by"])):
        members = [Teacher(network(1, names=["thing"]))]
        members += [Teacher(network(2, names=list(names))) for names in others]
        teachers = Teachers(members[::-1] if turned else members, student, ["item"], merged)
        assert teachers.fit.classes.student == (0,)
        together, each = teachers(images)
        if others == ["xy"]:  # a stranger's background says nothing
            knowing, stranger = each[::-1] if turned else each
            assert not stranger.levels and len(stranger.features) == 3
            torch.testing.assert_close(together.levels[0], knowing.levels[0], atol=2e-2, rtol=1e-3)


def test_one_teacher_speaks_for_itself(images):
    teachers = Teachers([Teacher(network(1))], network(), NAMES)
    together, (alone,) = teachers(images)
    assert together is alone


def test_teachers_answer_for_the_levels_that_all_share_and_the_classes_that_any_knows(images):
    six = Teacher(network(1, cfg="models/hub/yolov5n6.yaml"))
    other = Teacher(network(2, names=["ring", "cat", "cell"]))
    names = [*NAMES, "comet"]
    student = network(names=names)
    teachers = Teachers([six, other], student, names)
    assert teachers.fit.classes.student == (0, 1, 2) and teachers.fit.classes.unknown == ("comet",)
    assert teachers.note == (
        "the teachers together: 3 of 4 classes known, each learnt from those that know it; "
        "no class term for 1 class (comet)"
    )
    together, each = teachers(images)
    assert len(together.levels) == 3 and all(level.shape[-1] == 8 for level in together.levels)
    assert [level.shape[-1] for view in each for level in view.levels] == [8] * 3 + [7] * 3
    features = student.forward_features(images)
    own = teachers.fit.of_student(StudentOutput(features, student.forward_head(features)))
    assert [level.shape for level in own.levels] == [level.shape for level in together.levels]


def logit(*probabilities):
    return torch.tensor(probabilities).logit()


def test_each_class_is_learnt_from_the_teachers_that_know_it():
    """By hand, for three cells: an object of a class that both know, of one that one knows, and none."""
    box = torch.zeros(3, 4)
    first = torch.cat((box, logit([0.8, 0.9, 0.3], [0.9, 0.1, 0.8], [0.01, 0.5, 0.4])), 1)  # knows a and b
    second = torch.cat((box, logit([0.6, 0.8, 0.2], [0.05, 0.9, 0.9], [0.03, 0.5, 0.5])), 1)  # knows a and c
    levels = [level.view(1, 1, 1, 3, 7) for level in (first, second)]
    columns = [torch.tensor([0, 1]), torch.tensor([0, 2])]
    found = specialists_level(levels, columns, 3).sigmoid().view(3, 8)[:, 4:]
    shared = (0.8 + 0.6) / 2
    wanted = [
        [shared, (0.8 * 0.9 + 0.6 * 0.8) / 2 / shared, 0.8 * 0.3 / shared, 0.6 * 0.2 / shared],
        [0.9, (0.9 * 0.1 + 0.05 * 0.9) / 2 / 0.9, 0.8, 0.05 * 0.9 / 0.9],
        [0.03, (0.01 * 0.5 + 0.03 * 0.5) / 2 / 0.03, 0.01 * 0.4 / 0.03, 0.5],
    ]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=1e-4)


def test_a_specialist_alone_says_what_it_would_say_without_the_others():
    level = torch.randn(1, 3, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    found = specialists_level([level], [torch.arange(3)], 3)
    torch.testing.assert_close(found, level, atol=1e-4, rtol=1e-4)


def test_specialists_who_are_sure_of_background_give_numbers():
    """The sigmoid of -120 is 0 in float32."""
    found = specialists_level([torch.full((1, 1, 1, 2, 7), -120.0)] * 2, [torch.arange(2)] * 2, 2)
    assert found.isfinite().all() and bool((found[..., 4:] < -10).all())


def test_classes_in_another_order_are_averaged_with_their_own_kind(images):
    first, second = Teacher(network(1)), Teacher(network(2, names=["ring", "cell", "dot"]))
    teachers = Teachers([first, second], network(), NAMES)
    together, each = teachers(images)
    wanted = torch.stack([view.levels[1][..., 5:].sigmoid() for view in each]).mean(0)
    torch.testing.assert_close(together.levels[1][..., 5:].sigmoid(), wanted, atol=1e-5, rtol=1e-5)
    teachers.assert_unchanged()


def test_teachers_without_a_common_level_are_refused():
    twice = Teacher(network(1), "twice.pt", scale=2.0)
    half = Teacher(network(2), "half.pt", scale=0.25)
    with pytest.raises(UserError, match=r"twice\.pt and half\.pt.*no level"):
        Teachers([twice, half], network(), NAMES)


def test_a_teacher_that_is_not_frozen_may_change(images):
    average = network(1)
    teacher = Teacher(average, "ema", frozen=False)
    teachers = Teachers([teacher], network(), NAMES)
    before = teachers(images)[0].levels[0]
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(teachers(images)[0].levels[0], before)
    teachers.assert_unchanged()


def test_a_teacher_is_scored_in_the_students_pixels_and_classes(images):
    teacher = Teacher(network(1, names=["dot", "cat", "cell"]), scale=2.0)
    teacher.fit_to(network(), NAMES)
    judged = TeacherInStudentFrame(teacher, len(NAMES))
    seen = judged.decode_levels(judged.forward_head(judged.forward_features(images)))
    larger = torch.nn.functional.interpolate(
        images, scale_factor=2, mode="bilinear", align_corners=False, antialias=True
    )
    with torch.no_grad():
        own = teacher.model.decode_levels(teacher.model.forward_head(teacher.model.forward_features(larger)))
    torch.testing.assert_close(seen[..., :4], own[..., :4] / 2, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(seen[..., 4], own[..., 4], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[..., 5:7], own[..., [7, 5]], atol=1e-4, rtol=1e-4)
    assert not seen[..., 7].any()
