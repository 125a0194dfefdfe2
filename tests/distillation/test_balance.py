"""`--distill-ratio auto` holds the ratio of the gradients."""

import pytest
import torch

from utils.distillation.balance import HIGHEST, STEP_LIMIT, GradientBalance


def test_the_first_measurement_sets_the_weight_at_once():
    balance = GradientBalance(0.5)
    balance.observe(torch.tensor(0.01), factor=1.0)
    assert float(balance()) == pytest.approx(50)


def test_a_later_measurement_moves_the_weight_half_of_the_way_in_log_space():
    balance = GradientBalance(1.0)
    for measured, weight in ((0.5, 2.0), (0.25, 4.0), (4.0, 2.0), (0.36, 2 / 0.6)):
        balance.observe(torch.tensor(measured), factor=1.0)
        assert float(balance()) == pytest.approx(weight, rel=1e-6)


def test_a_steady_loss_is_held_at_the_target():
    balance, strength = GradientBalance(0.5), 0.02
    for _ in range(12):
        strength *= 0.9  # the student comes closer to its teacher
        balance.observe(strength * balance(), factor=1.0)
    assert float(strength * balance()) == pytest.approx(0.5, rel=0.12)


def test_one_odd_batch_moves_it_no_further_than_the_limit():
    balance = GradientBalance(1.0)
    balance.observe(torch.tensor(1.0), factor=1.0)
    balance.observe(torch.tensor(1e-6), factor=1.0)
    assert float(balance()) == pytest.approx(STEP_LIMIT)


def test_the_schedules_factor_is_not_undone():
    balance = GradientBalance(1.0)
    balance.observe(torch.tensor(0.1), factor=0.1)
    assert float(balance()) == pytest.approx(1.0)
    balance.observe(torch.tensor(0.1), factor=0.0)
    assert float(balance()) == pytest.approx(1.0)


@pytest.mark.parametrize("odd", [0.0, float("nan"), float("inf")])
def test_what_is_no_ratio_is_left_aside(odd):
    balance = GradientBalance(1.0)
    balance.observe(torch.tensor(odd), factor=1.0)
    assert float(balance()) == 1.0 and int(balance.seen) == 0


def test_the_weight_stays_in_bounds_and_in_the_state():
    balance = GradientBalance(1.0)
    balance.observe(torch.tensor(1e-12), factor=1.0)
    assert float(balance()) == HIGHEST
    other = GradientBalance(1.0)
    other.load_state_dict(balance.state_dict())
    assert float(other()) == HIGHEST and int(other.seen) == 1


def test_an_observation_leaves_the_graph_of_the_step_alone():
    balance, x = GradientBalance(1.0), torch.tensor(3.0, requires_grad=True)
    total = x * balance()
    balance.observe(torch.tensor(0.5), factor=1.0)
    total.backward()
    assert float(x.grad) == 1.0
