"""Each thing that looks wrong in a distillation is said once, with what to do."""

import pytest

from utils.distillation.diagnosis import Diagnosis


def said(*reports, ratio=1.0, teacher=0.5):
    watch = Diagnosis(teacher, ratio)
    return [text for report in reports for text in watch.after_epoch(*report)]


def test_a_healthy_run_gets_no_word():
    assert not said((1.0, 0.5, 0.1), (0.8, 0.4, 0.3), (0.9, 1.2, 0.49))


def test_a_teacher_no_better_than_the_student_is_named_once():
    watch = Diagnosis(0.3, 1.0)
    (text,) = watch.at_start([(0.3, 0.3)])
    assert "not better" in text and "0.300" in text
    assert not list(watch.after_epoch(1.0, 1.0, 0.4))
    assert not list(Diagnosis(None, 1.0).at_start([]))


def test_of_several_teachers_one_that_is_better_is_enough():
    assert not list(Diagnosis(0.3, 1.0).at_start([(0.2, 0.4), (0.5, 0.4)]))
    (text,) = Diagnosis(0.3, 1.0).at_start([(0.2, 0.4), (0.35, 0.4)])
    assert "mAP50-95 0.350" in text and "(0.400)" in text


def test_a_student_that_passes_its_teacher_is_told():
    (text,) = said((1.0, 1.0, 0.4), (1.0, 1.0, 0.6), (1.0, 1.0, 0.7))
    assert "better than its teacher" in text


def test_a_gradient_ratio_out_of_bounds_comes_with_a_ratio_to_try():
    (weak,) = said((1.0, 0.002, None), (1.0, 0.003, None), ratio=2.0)
    assert "hardly counts" in weak and "--distill-ratio 1000" in weak and "auto" in weak
    (strong,) = said((1.0, 20.0, None), ratio=2.0)
    assert "labels hardly count" in strong and "--distill-ratio 0.1" in strong


@pytest.mark.parametrize(("ratio", "is_told"), [(0.049, True), (0.051, False), (4.9, False), (5.1, True)])
def test_the_bounds_of_a_gradient_ratio_are_a_twentieth_and_five(ratio, is_told):
    assert bool(said((1.0, ratio, None))) == is_told


def test_while_the_weight_warms_up_its_gradient_is_not_judged():
    assert not said((1.0, 0.002, None, False))
    assert said((1.0, 0.002, None, False), (1.0, 0.002, None, True))


def test_a_loss_of_zero_is_named():
    (text,) = said((0.0, 0.0, None), (0.0, 0.0, None))
    assert "is zero" in text


def test_a_loss_that_rises_for_a_whole_warm_up_is_named_and_one_that_turns_is_not():
    (text,) = said(*((float(value), 1.0, None) for value in (1, 2, 3, 4, 5)))
    assert "risen" in text
    assert not said(*((float(value), 1.0, None) for value in (1, 2, 3, 2, 5, 6, 7, 8)))
    rising = [(float(value), 1.0, None, value > 5) for value in range(1, 7)]
    assert not said(*rising[:5]) and said(*rising)
    assert not said(*rising[:5], (3.0, 1.0, None, True))


def test_a_step_that_is_no_finite_number_hides_no_rise():
    values = (1.0, 2.0, float("nan"), 3.0, 4.0, 5.0)
    (text,) = said(*((value, 1.0, None) for value in values))
    assert "risen" in text


def test_a_teacher_whose_boxes_are_wanted_and_who_has_none_is_named_once():
    (text,) = said(*[(0.3, 0.002, None, True, False)] * 2)  # and no larger weight is advised
    assert "--t-conf-thres" in text and "detect.py" in text


def test_a_held_ratio_is_judged_by_what_was_asked_for_and_not_in_the_first_epoch():
    watch = Diagnosis(0.5, 1.0, held_at=0.5)
    assert not list(watch.after_epoch(1.0, 16.0, None))
    assert not list(watch.after_epoch(1.0, 0.2, None)) and not list(watch.after_epoch(0.9, 1.4, None))
    (text,) = watch.after_epoch(1.0, 6.0, None)
    assert "6 times" in text and "--auto-ratio asks for 0.5" in text
