"""What a distiller tells of an epoch, and when it asks its teachers."""

from types import SimpleNamespace

import pytest
import torch

from utils.batch import Batch, Progress, StudentOutput
from utils.distillation.balance import GradientBalance
from utils.distillation.diagnosis import Diagnosis
from utils.distillation.distiller import Distiller
from utils.distillation.pseudo_boxes import PseudoBoxes
from utils.distillation.schedule import DistillSchedule
from utils.losses.recipe import EpochReport

BATCH = Batch(torch.zeros(1, 3, 32, 32), torch.zeros(0, 6), torch.ones(1, dtype=torch.bool))
OUTPUT = StudentOutput((), ())


class Teachers:
    """They say nothing, and it is noted when."""

    members = ()
    fit = SimpleNamespace(of_student=lambda output: output)

    def __init__(self, events):
        self.events = events

    def __call__(self, _images):
        self.events.append("asked")
        return None, []

    def checksums(self):
        return []


class Numbers:
    """A preset with given values, one after the other."""

    names = ("box", "cls")

    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, *_arguments):
        value = self.values.pop(0)
        return {"box": torch.tensor(0.0), "cls": torch.tensor(value)}


class Watch(Diagnosis):
    """Keeps what it is told of epochs."""

    def __init__(self):
        super().__init__(None, 1.0)
        self.told = []

    def after_epoch(self, *report):
        self.told.append(report)
        return iter(())


def distiller_of(preset, schedule=DistillSchedule(), ratio=1.0):  # noqa: B008
    distiller = Distiller(Teachers([]), preset, ratio, schedule, diagnosis=Watch())
    distiller.train()
    return distiller


def reported(distiller, steps, ratio, first=0):
    """What the diagnosis hears after an epoch of so many of its 4 steps with this mean gradient ratio."""
    for step in range(first, first + steps):
        distiller(BATCH, OUTPUT, Progress(step, 0, 4, 4))
    list(distiller.review(EpochReport({"distill_grad_ratio": ratio}, 0.25)))
    return distiller.diagnosis.told[-1]


def test_the_gradient_ratio_is_told_without_the_schedules_factor():
    schedule = DistillSchedule(warmup_epochs=1)
    loss, ratio, score, warm, sees = reported(distiller_of(Numbers(1, 2, 3, 4), schedule), 4, 0.3)
    assert (loss, score, warm, sees) == (2.5, 0.25, False, True)
    assert ratio == pytest.approx(0.3 / (1.5 / 4))  # factors 0, 1/4, 1/2, 3/4
    balanced = distiller_of(Numbers(1.0), ratio=GradientBalance(0.5))
    assert reported(balanced, 1, 0.3)[1] == pytest.approx(0.3)


def test_a_weight_that_follows_can_be_read():
    assert distiller_of(Numbers()).gauges == () and distiller_of(Numbers()).readings() == {}
    balanced = distiller_of(Numbers(), ratio=GradientBalance(0.5))
    balanced.observe(torch.tensor(2.0), Progress(0, 0, 4, 4))
    assert balanced.gauges == ("distill_ratio",)
    assert {name: float(value) for name, value in balanced.readings().items()} == {"distill_ratio": 0.25}


SCHEDULES = [
    (DistillSchedule(warmup_epochs=2), 2, 0.25),
    (DistillSchedule("cosine", final=0.2), 8, 0.6),
    (DistillSchedule(), 8, 1.0),
]


@pytest.mark.parametrize(("schedule", "step", "factor"), SCHEDULES, ids=["warm-up", "cosine", "constant"])
def test_a_weight_that_follows_leaves_the_schedules_factor_to_it(schedule, step, factor):
    """In warm-up and along a cosine the ratio is to be the target times the factor: no reason to move."""
    balance, progress = GradientBalance(0.5), Progress(step, step // 4, 4, 4)
    distiller = distiller_of(Numbers(1.0), schedule, balance)
    assert schedule.factor(progress) == pytest.approx(factor)
    for _ in range(2):  # the first sets the weight, the second moves it
        distiller.observe(torch.tensor(0.5 * factor), progress)
        assert float(balance()) == pytest.approx(1.0)
    assert int(balance.seen) == 2
    assert float(distiller(BATCH, OUTPUT, progress)["distill_cls"]) == pytest.approx(factor)


def test_when_teaching_is_over_a_weight_that_follows_stays():
    balance = GradientBalance(0.5)
    distiller_of(Numbers(), DistillSchedule(stop_epochs=1), balance).observe(
        torch.tensor(2.0), Progress(12, 3, 4, 4)
    )
    assert float(balance()) == 1.0 and int(balance.seen) == 0


def test_a_step_that_is_no_finite_number_is_left_out_of_the_mean():
    assert reported(distiller_of(Numbers(1.0, float("nan"), 2.0)), 3, 1.0)[0] == 1.5


def test_boxes_without_a_detection_in_an_epoch_are_told(monkeypatch):
    assert reported(distiller_of(Numbers(1.0)), 1, 1.0)[-1]
    silent = PseudoBoxes.__new__(PseudoBoxes)
    monkeypatch.setattr(PseudoBoxes, "ahead", lambda *_: Numbers(1.0))
    assert not reported(distiller_of(silent), 1, 1.0)[-1]


def test_an_epoch_goes_on_from_a_state():
    distiller, later = distiller_of(Numbers(1.0, 2.0)), distiller_of(Numbers(6.0))
    for step in range(2):
        distiller(BATCH, OUTPUT, Progress(step, 0, 4, 4))
    later.set_extra_state(distiller.get_extra_state())
    assert reported(later, 1, 1.0, first=2)[0] == 3.0
    older = distiller_of(Numbers(6.0))
    older.set_extra_state({**distiller.get_extra_state(), "seen": [3.0, 2, 2.0, True]})
    assert reported(older, 1, 1.0, first=2)[0] == 3.0


def test_the_teacher_is_asked_before_the_students_pass():
    events = []
    distiller = Distiller(Teachers(events), Numbers(1.0), 2.0)
    rest = distiller.ahead(BATCH, Progress(0, 0, 4, 4))
    events.append("student")
    assert float(rest(OUTPUT)["distill_cls"]) == 2.0
    assert events == ["asked", "student"]
