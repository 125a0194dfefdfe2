"""The teacher's weight in the course of a run."""

import pytest
import torch

from utils.batch import Batch, Progress, StudentOutput
from utils.distillation.distiller import Distiller
from utils.distillation.features import FeatureLoss
from utils.distillation.schedule import DistillSchedule


def at(epoch, step_in_epoch=0, epochs=100, steps=50):
    return Progress(epoch * steps + step_in_epoch, epoch, steps, epochs)


def test_a_constant_schedule_rises_with_the_warm_up_and_stays():
    schedule = DistillSchedule(warmup_epochs=3)
    assert schedule.factor(at(0)) == 0
    assert schedule.factor(at(1, 25)) == pytest.approx(0.5)  # half of 3 epochs of 50 steps
    assert schedule.factor(at(3)) == schedule.factor(at(99, 49)) == 1


def test_a_cosine_falls_to_its_final_part_at_the_last_epoch_that_is_taught():
    schedule = DistillSchedule("cosine", final=0.1, stop_epochs=20)
    assert schedule.factor(at(0)) == 1
    assert schedule.factor(at(40)) == pytest.approx(0.55)
    assert schedule.factor(at(79, 49)) == pytest.approx(0.1, abs=1e-3)
    assert schedule.factor(at(80)) == 0 and schedule.is_over(at(80)) and not schedule.is_over(at(79, 49))


def test_a_short_warm_up_is_as_long_as_was_asked_for():
    schedule = DistillSchedule(warmup_epochs=1)
    assert schedule.factor(at(0, 7, steps=13)) == pytest.approx(7 / 13)
    assert schedule.factor(at(1, steps=13)) == 1 and schedule.is_warm(at(1, steps=13))


def test_a_cosine_begins_to_fall_when_the_warm_up_is_over():
    schedule = DistillSchedule("cosine", final=0.1, warmup_epochs=20, stop_epochs=10)
    assert schedule.factor(at(10)) == pytest.approx(0.5)
    assert schedule.factor(at(20)) == 1
    assert schedule.factor(at(55)) == pytest.approx(0.55)  # half of the 70 epochs that are left
    assert schedule.factor(at(89, 49)) == pytest.approx(0.1, abs=1e-3)


class Unasked:
    """A teacher that must not be asked, and a preset that asks it."""

    names = ("box",)

    def __call__(self, *_arguments):
        raise AssertionError("the teacher was asked")


def test_in_the_closing_epochs_the_teacher_is_not_asked_and_all_terms_are_zero():
    distiller = Distiller(Unasked(), Unasked(), 1.0, DistillSchedule(stop_epochs=2))
    batch = Batch(torch.zeros(1, 3, 32, 32), torch.zeros(0, 6), torch.ones(1, dtype=torch.bool))
    assert distiller(batch, StudentOutput((), ()), at(98)) == {"distill_box": torch.zeros(())}
    with pytest.raises(AssertionError, match="asked"):
        distiller(batch, StudentOutput((), ()), at(97))


def test_in_the_closing_epochs_projections_still_have_a_gradient_of_zero():
    """DDP waits for a gradient of each parameter that it wraps."""
    distiller = Distiller(
        Unasked(), Unasked(), 1.0, DistillSchedule(stop_epochs=2), [FeatureLoss("score-l2", (4, 6), (5, 8))]
    )
    batch = Batch(torch.zeros(1, 3, 32, 32), torch.zeros(0, 6), torch.ones(1, dtype=torch.bool))
    sum(distiller(batch, StudentOutput((), ()), at(98)).values()).backward()
    gradients = [parameter.grad for parameter in distiller.parameters()]
    assert len(gradients) == 8 and all(slope is not None and not slope.any() for slope in gradients)
