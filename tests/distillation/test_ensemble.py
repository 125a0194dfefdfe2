"""Several teachers answer together, and the student's own average can be one of them."""

import pytest
import torch

from tests.distillation.networks import NAMES, network
from utils.distillation.ensemble import Teachers, mean_level, mean_probability
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
    for known, is_complete in ((["a", "b", "c"], True), (["b", "c", "x"], False)):
        members = [Teacher(network(1, names=["thing"])), Teacher(network(2, names=known))]
        teachers = Teachers(members[::-1] if turned else members, student, ["item"], merged)
        assert teachers.fit.classes.student == (0,)
        assert (not teachers.fit.classes.unknown) == is_complete
        together, each = teachers(images)
        assert together.levels[0].shape[-1] == 6
        if is_complete:  # its objectness is whole: nothing of it is another class's
            own = each[0 if turned else 1]
            for level, raw in zip(own.levels, own.unconverted_levels, strict=True):
                assert torch.equal(level[..., 4], raw[..., 4])


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
def test_one_that_tells_no_classes_apart_has_nothing_in_common_with_strangers(images, turned):
    student = network(names=["item"])
    for merged, others in ((["a", "b"], ["xy"]), (["a", "b", "c"], ["ax", "by"])):
        members = [Teacher(network(1, names=["thing"]))]
        members += [Teacher(network(2, names=list(names))) for names in others]
        teachers = Teachers(members[::-1] if turned else members, student, ["item"], merged)
        assert not teachers.fit.classes.student
        teachers(images)


def test_one_teacher_speaks_for_itself(images):
    teachers = Teachers([Teacher(network(1))], network(), NAMES)
    together, (alone,) = teachers(images)
    assert together is alone


def test_teachers_answer_for_the_levels_and_classes_that_all_share(images):
    six = Teacher(network(1, cfg="models/hub/yolov5n6.yaml"))
    other = Teacher(network(2, names=["ring", "cat", "cell"]))
    student = network(cfg="models/yolov5n.yaml")
    teachers = Teachers([six, other], student, NAMES)
    assert teachers.fit.classes.student == (0, 2)
    together, each = teachers(images)
    assert len(together.levels) == 3 and all(level.shape[-1] == 7 for level in together.levels)
    assert [level.shape[-1] for view in each for level in view.levels] == [7] * 6
    probability = torch.stack([view.levels[0][..., 5:].sigmoid() for view in each]).mean(0)
    torch.testing.assert_close(together.levels[0][..., 5:].sigmoid(), probability, atol=1e-5, rtol=1e-5)


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
