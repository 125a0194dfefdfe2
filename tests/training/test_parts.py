"""Optimizer, schedule, average and anchors, each against a value worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from utils.batch import Progress
from utils.training.autoanchor import best_possible_recall, check_anchors, fit_anchors
from utils.training.ema import ModelEma
from utils.training.optimizer import BIASES, NORMS, WEIGHTS, RateSchedule, build_optimizer, parameter_groups

SCHEDULE = RateSchedule(
    rate=0.01,
    final=0.1,
    cosine=False,
    momentum=0.937,
    warmup_epochs=3,
    warmup_momentum=0.8,
    warmup_bias_rate=0.1,
    batch_size=16,
)


def small_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))


def rates_at(step, epoch, schedule=SCHEDULE, steps_per_epoch=50, epochs=10):
    network = small_network()
    optimizer = build_optimizer([network], "SGD", rate=0.01, momentum=0.937, weight_decay=5e-4)
    schedule.set_rates(optimizer, Progress(step, epoch, steps_per_epoch, epochs))
    return optimizer.param_groups


def test_only_weights_decay_and_norm_weights_and_biases_have_groups_of_their_own():
    network = small_network()
    groups = parameter_groups([network])
    assert [len(group) for group in groups] == [2, 2, 1]
    optimizer = build_optimizer([network], "AdamW", rate=0.01, momentum=0.9, weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.5, 0.0]
    assert groups[NORMS][0] is network[1].weight
    assert groups[BIASES][0] is network[0].bias and groups[WEIGHTS][0] is network[0].weight


def test_frozen_parameters_are_in_no_group():
    network = small_network()
    network[0].requires_grad_(False)
    assert [len(group) for group in parameter_groups([network])] == [1, 1, 1]


def test_warm_up_takes_biases_down_and_everything_else_up():
    groups = rates_at(0, 0)
    assert [group["lr"] for group in groups] == [0.1, 0.0, 0.0]
    assert groups[0]["momentum"] == pytest.approx(0.8)
    halfway = rates_at(75, 1)  # of max(3 epochs of 50, 100) = 150 steps
    target = 0.01 * (1 - 0.1 * 0.9)
    assert halfway[0]["lr"] == pytest.approx((0.1 + target) / 2)
    assert halfway[1]["lr"] == pytest.approx(target / 2)
    assert halfway[1]["momentum"] == pytest.approx((0.8 + 0.937) / 2)


def test_after_warm_up_rates_fall_along_a_line_or_a_cosine():
    assert rates_at(250, 5)[1]["lr"] == pytest.approx(0.01 * (1 - 0.5 * 0.9))
    cosine = RateSchedule(**{**SCHEDULE.__dict__, "cosine": True})
    expected = 0.01 * (1 - (1 - math.cos(0.3 * math.pi)) / 2 * 0.9)
    assert rates_at(150, 3, cosine)[1]["lr"] == pytest.approx(expected)


def test_accumulation_grows_to_the_nominal_batch():
    steps = [SCHEDULE.accumulate(Progress(step, 0, 50, 10)) for step in (0, 75, 150, 400)]
    assert steps == [1, 2, 4, 4]
    large = RateSchedule(**{**SCHEDULE.__dict__, "batch_size": 128})
    assert large.accumulate(Progress(400, 8, 50, 10)) == 1


@pytest.mark.parametrize(("batch", "batches"), [(24, 3), (40, 2), (48, 1), (96, 1)])
def test_the_nominal_batch_is_met_as_nearly_as_whole_batches_can(batch, batches):
    """64 images are 2.67, 1.6, 1.33 and 0.67 batches."""
    assert replace(SCHEDULE, batch_size=batch).accumulate(Progress(400, 8, 50, 10)) == batches


def test_the_nominal_batch_is_a_hyperparameter():
    assert replace(SCHEDULE, nominal_batch=16).accumulate(Progress(1000, 9, 100, 10)) == 1
    assert replace(SCHEDULE, nominal_batch=128).accumulate(Progress(1000, 9, 100, 10)) == 8


def test_the_average_follows_the_ramped_decay_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = ModelEma(model)
    ema.update(model)
    expected = 1.0
    for update in (2, 3):
        nn.init.constant_(model.weight, float(update))
        ema.update(model)
        decay = 0.9999 * (1 - math.exp(-update / 2000))
        expected = decay * expected + (1 - decay) * update
    assert float(ema.model.weight) == pytest.approx(expected, rel=1e-6)


def test_the_average_takes_in_batch_statistics_and_copies_counters():
    model = nn.BatchNorm2d(2)
    ema = ModelEma(model)
    for _ in range(3):
        model(torch.randn(4, 2, 3, 3) + 5)
        ema.update(model)
    assert int(ema.model.num_batches_tracked) == 3
    assert float(ema.model.running_mean.mean()) > 0.3
    assert not ema.model.training


def test_recall_counts_boxes_within_the_limit_of_an_anchor():
    sizes = np.array([[10.0, 10], [30, 30], [100, 20]])
    recall, fitting = best_possible_recall(sizes, np.array([[10.0, 12], [25, 20]]), 4.0)
    assert recall == pytest.approx(2 / 3)  # 100 x 20 is 4 times too wide for 25 x 20
    assert fitting == pytest.approx(4 / 3)


def test_fitted_anchors_find_the_clusters_of_the_data():
    rng = np.random.default_rng(0)
    centres = np.array([[12.0, 14], [60, 30], [150, 160]])
    sizes = np.concatenate([c * rng.uniform(0.95, 1.05, (200, 2)) for c in centres])
    anchors = fit_anchors(sizes, 3, 4.0)
    np.testing.assert_allclose(anchors, centres, rtol=0.08)
    assert np.array_equal(anchors, fit_anchors(sizes, 3, 4.0)), "the same seed gives the same anchors"


def test_fitting_anchors_to_boxes_of_one_size_gives_usable_anchors():
    anchors = fit_anchors(np.full((50, 2), 40.0), 9, 4.0)
    assert np.isfinite(anchors).all() and (anchors > 0).all()
    assert best_possible_recall(np.full((50, 2), 40.0), anchors, 4.0)[0] == 1


def test_anchors_that_fit_are_kept_and_bad_ones_replaced():
    from models.yolo import Model

    model = Model("models/yolov5n.yaml", nc=2)
    before = model.head.anchors.clone()
    rng = np.random.default_rng(0)
    assert "kept" in check_anchors(model, rng.uniform(12, 200, (300, 2)), 4.0, pytest.fail)
    assert torch.equal(model.head.anchors, before)
    thin = np.column_stack((rng.uniform(2, 4, 300), rng.uniform(150, 300, 300)))
    assert "replaced" in check_anchors(model, thin, 4.0, pytest.fail)
    assert not torch.equal(model.head.anchors, before)
    pixels = (model.head.anchors * model.head.stride.view(-1, 1, 1)).reshape(-1, 2).double().numpy()
    assert best_possible_recall(thin, pixels, 4.0)[0] > 0.98


def test_boxes_under_two_pixels_leave_the_anchors_alone():
    warnings = []
    assert "kept" in check_anchors(None, np.full((20, 2), 1.5), 4.0, warnings.append)
    assert "under 2 px" in warnings[0]


@pytest.mark.parametrize(
    "sizes",
    [
        [[5, 300], [300, 5], [8, 8]],
        [[3, 3], [600, 600]] * 50,
        [[2, 100], [2, 640]] * 20,
        np.repeat(np.exp(np.random.default_rng(0).uniform(1, 6, (8, 2))), 10, 0),
        np.exp(np.random.default_rng(0).uniform(1, 6, (12, 2))),
        np.column_stack((np.full(200, 3.0), np.linspace(10, 640, 200))),
    ],
    ids=["three", "two", "as wide", "eight", "twelve", "lines"],
)
def test_few_or_uniform_sizes_all_get_an_anchor(sizes):
    anchors = fit_anchors(np.array(sizes, float), 9, 4.0)
    assert anchors.shape == (9, 2)
    assert best_possible_recall(np.array(sizes, float), anchors, 4.0)[0] == 1


def test_boxes_that_no_anchors_can_fit_are_warned_of():
    from models.yolo import Model

    warnings = []
    sizes = np.concatenate([np.full((90, 2), 0.5), np.full((10, 2), 30.0)])
    check_anchors(Model("models/yolov5n.yaml", nc=2), sizes, 4.0, warnings.append)
    assert warnings == [
        "no anchor fits 90% of the boxes, from which nothing is learnt: "
        "train with a larger --img, or raise anchor_t in the file of --hyp"
    ]


def test_momentum_starts_at_zero_even_when_the_first_step_is_skipped():
    """The loss scaler skips a step whose gradients are not finite, without the optimizer's knowing."""
    network = small_network()
    optimizer = build_optimizer([network], "SGD", rate=0.01, momentum=0.9, weight_decay=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    start = [parameter.detach().clone() for parameter in network.parameters()]
    for value in (float("inf"), 1.0):
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, value)
        scaler.scale(torch.zeros(()))  # the scaler wants to have seen a loss
        scaler.step(optimizer)
        scaler.update()
    # The scale is 2 in the first step and 1 after the overflow; Nesterov: g + 0.9 g.
    for before, after in zip(start, network.parameters(), strict=True):
        torch.testing.assert_close(before - after, torch.full_like(after, 0.01 * 1.9))


def test_momentum_may_be_zero():
    optimizer = build_optimizer([small_network()], "SGD", rate=0.01, momentum=0.0, weight_decay=0)
    assert not optimizer.param_groups[0]["nesterov"]
