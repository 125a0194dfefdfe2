"""What is put back into the loss has the effect that it stands for."""

import pytest
import torch

from experiments.ablation import AllCells, ConstantFactor, Gated, RawBoxes, Softmax
from utils.batch import Batch, StudentOutput
from utils.distillation.response import Response, ResponseGains
from utils.distillation.teacher import TeacherOutput
from utils.losses.detection import LossGains


def terms_of(kind, own, target):
    """The terms of one level of 3 anchors and 4 x 4 cells; `own` and `target` are (1, 3, 4, 4, 7)."""
    loss = kind(LossGains(), torch.tensor([[[1.0, 2.0], [2.0, 1.0], [3.0, 3.0]]]))
    batch = Batch(torch.zeros(1, 3, 32, 32), torch.zeros(0, 6), torch.ones(1, dtype=torch.bool))
    return loss(batch, StudentOutput((), (own,)), TeacherOutput((target,)))


@pytest.fixture
def levels():
    torch.manual_seed(0)
    own, target = torch.randn(2, 1, 3, 4, 4, 7)
    target[..., 4] = -9.0
    target[0, 0, 1, 1, 4] = 8.0  # one object
    return own, target


def test_a_mean_over_all_cells_makes_boxes_and_classes_next_to_nothing(levels):
    whole, diluted = terms_of(Response, *levels), terms_of(AllCells, *levels)
    assert diluted["obj"] == whole["obj"]
    for name in ("box", "cls"):
        assert 0.01 < float(diluted[name] / whole[name]) < 0.03  # one cell of 48


def test_softmax_does_not_see_that_all_classes_are_too_low(levels):
    own, target = levels
    own[..., 5:] = target[..., 5:] - 4
    assert float(terms_of(Softmax, own, target)["cls"]) == pytest.approx(0, abs=1e-6)
    assert float(terms_of(Response, own, target)["cls"]) > 0.1


def test_a_gate_lets_false_alarms_pass(levels):
    own, target = levels
    own[..., 4] = target[..., 4]
    own[0, 0, 3, 3, 4] = 4.0
    whole, gated = terms_of(Response, own, target)["obj"], terms_of(Gated, own, target)["obj"]
    assert float(whole) > 0.05 and float(gated) < 0.001 * float(whole)


def test_raw_boxes_are_compared_as_they_are(levels):
    own, target = levels
    shifted = own.clone()
    shifted[..., :4] = target[..., :4] + 2
    wanted = 4 * ResponseGains().box * 0.05
    assert float(terms_of(RawBoxes, shifted, target)["box"]) == pytest.approx(wanted, rel=1e-3)


def test_a_constant_factor_has_the_same_value_and_no_kink(levels):
    own, target = levels
    whole, constant = terms_of(Response, own, target), terms_of(ConstantFactor, own, target)
    for name in ("cls", "obj"):
        assert float(constant[name]) == pytest.approx(float(whole[name]), rel=1e-5)
    slopes = {}
    for kind in (Response, ConstantFactor):
        near = (target + 1e-4).requires_grad_()
        terms = terms_of(kind, near, target)
        (slope,) = torch.autograd.grad(terms["cls"] + terms["obj"], near)
        slopes[kind] = float(slope[..., 4:].abs().max())
    assert slopes[ConstantFactor] < 0.01 * slopes[Response]
