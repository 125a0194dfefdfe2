"""The ground-truth loss against the original implementation's values and against its properties."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.batch import Batch, StudentOutput
from utils.losses import detection
from utils.losses.detection import DetectionLoss, LossGains
from utils.losses.terms import binary_cross_entropy

CASES = json.loads(Path(__file__).with_name("detection_reference.json").read_text())
STRIDES = (8, 16, 32)
ANCHORS_PX = torch.tensor(
    [
        [[10, 13], [16, 30], [33, 23]],
        [[30, 61], [62, 45], [59, 119]],
        [[116, 90], [156, 198], [373, 326]],
    ],
    dtype=torch.float32,
)
ANCHORS_GRID = ANCHORS_PX / torch.tensor(STRIDES).view(3, 1, 1)


def random_levels(r, batch, size, nc):
    """Raw predictions as the reference values' recipe draws them."""
    return [
        torch.tensor(1.5 * r.standard_normal((batch, 3, size // s, size // s, 5 + nc)), dtype=torch.float32)
        for s in STRIDES
    ]


def reference_case(case):
    r = np.random.RandomState(case["seed"])
    levels = random_levels(r, case["batch"], case["image_size"], case["nc"])
    targets = torch.zeros(0, 6)
    if n := case["targets"]:
        image, cls = r.randint(0, case["batch"], n), r.randint(0, case["nc"], n)
        centre, size = r.uniform(0.02, 0.98, (n, 2)), r.uniform(0.02, 0.6, (n, 2))
        targets = torch.tensor(np.column_stack((image, cls, centre, size)), dtype=torch.float32)
    batch = make_batch(targets, case["batch"])
    return batch, levels


def make_batch(targets, count, labelled=None):
    labelled = torch.ones(count, dtype=torch.bool) if labelled is None else torch.tensor(labelled)
    return Batch(images=torch.zeros(count, 3, 8, 8), targets=targets, labelled=labelled)


def loss_of(nc, **gains):
    return DetectionLoss(ANCHORS_GRID, nc, LossGains(**gains))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
def test_terms_and_gradients_equal_the_reference_values(case):
    batch, levels = reference_case(case)
    levels = [level.requires_grad_() for level in levels]
    terms = loss_of(case["nc"], **case["hyp"])(batch, StudentOutput((), tuple(levels)))
    gains = case["hyp"]
    assert float(terms["box"].detach()) == pytest.approx(case["box"] * 1.0, rel=1e-4)
    assert float(terms["cls"].detach()) == pytest.approx(case["cls"], rel=1e-4)
    assert float(terms["obj"].detach()) == pytest.approx(case["obj"], rel=2e-3)
    total = sum(terms.values()) * case["batch"]
    assert float(total.detach()) == pytest.approx(case["total"], rel=2e-3)
    total.backward()
    # The objectness targets' tolerance (a shared cell takes the better box here) bounds the gradients'.
    for level, wanted in zip(levels, case["grad_abs_sum"], strict=True):
        assert float(level.grad.abs().sum()) == pytest.approx(wanted, rel=2e-3)
    assert gains["fl_gamma"] == 0


def test_loss_does_not_depend_on_the_order_of_targets():
    batch, levels = reference_case(CASES[0])
    order = torch.randperm(len(batch.targets), generator=torch.Generator().manual_seed(0))
    shuffled = make_batch(batch.targets[order], 2)
    output = StudentOutput((), tuple(levels))
    first, second = loss_of(3)(batch, output), loss_of(3)(shuffled, output)
    for name in first:
        assert float(first[name]) == pytest.approx(float(second[name]), rel=1e-6)


def test_targets_outside_every_anchor_leave_box_and_class_terms_at_zero():
    targets = torch.tensor([[0, 1, 0.5, 0.5, 1e-4, 1e-4]])
    levels = random_levels(np.random.RandomState(0), 1, 64, 3)
    terms = loss_of(3)(make_batch(targets, 1), StudentOutput((), tuple(levels)))
    assert float(terms["box"]) == 0 and float(terms["cls"]) == 0 and float(terms["obj"]) > 0


def test_a_perfect_prediction_has_no_box_loss_and_little_else():
    """Logits that decode to the targets exactly, confident where matched, silent elsewhere."""
    loss = loss_of(3)
    targets = torch.tensor([[0, 2, 0.45, 0.55, 0.3, 0.35]])
    levels = [torch.full((1, 3, 64 // s, 64 // s, 8), -12.0) for s in STRIDES]
    from utils.losses.assignment import assign_targets

    for level, anchors in zip(levels, ANCHORS_GRID, strict=True):
        pairs = assign_targets(targets, anchors[None], [tuple(level.shape[2:4])], 4.0)
        index = (pairs.image, pairs.anchor, pairs.row, pairs.column)
        level[index + (slice(0, 2),)] = ((pairs.boxes[:, :2] + 0.5) / 2).clamp(1e-6, 1 - 1e-6).logit()
        level[index + (slice(2, 4),)] = ((pairs.boxes[:, 2:] / anchors[pairs.anchor]).sqrt() / 2).logit()
        level[index + (4,)] = 12.0
        level[index + (7,)] = 12.0
    terms = loss(make_batch(targets, 1), StudentOutput((), tuple(levels)))
    assert float(terms["box"]) < 1e-4
    assert float(terms["obj"]) < 1e-3
    assert float(terms["cls"]) < 1e-3


def test_an_unlabelled_image_has_no_influence_on_loss_and_gradient():
    r = np.random.RandomState(3)
    levels = [level.requires_grad_() for level in random_levels(r, 2, 64, 3)]
    targets = torch.tensor([[0, 1, 0.4, 0.4, 0.3, 0.3]])
    both = loss_of(3)(make_batch(targets, 2, [True, False]), StudentOutput((), tuple(levels)))
    sum(both.values()).backward()
    assert all(float(level.grad[1].abs().sum()) == 0 for level in levels)
    alone = loss_of(3)(make_batch(targets, 1), StudentOutput((), tuple(level[:1] for level in levels)))
    for name in both:
        assert float(both[name].detach()) == pytest.approx(float(alone[name].detach()), rel=1e-6)


@pytest.mark.parametrize("nc", [1, 3])
def test_the_loss_of_a_mixed_batch_is_that_of_its_labelled_images_alone(nc):
    """All terms with their normalisers, and the gradient of every logit."""
    r = np.random.RandomState(5)
    labelled = [False, True, True, False, True]
    known = torch.tensor([1, 2, 4])
    levels = [level.requires_grad_() for level in random_levels(r, 5, 64, nc)]
    alone = [level.detach()[known].requires_grad_() for level in levels]
    count = 12
    image, rows = r.randint(0, 3, count), r.uniform(0.1, 0.5, (count, 4))
    classes = r.randint(0, nc, count)
    few = torch.tensor(np.column_stack((image, classes, rows)), dtype=torch.float32)
    mixed = few.clone()
    mixed[:, 0] = known[few[:, 0].long()].float()
    loss = loss_of(nc, cls_pw=0.7, obj_pw=1.3, label_smoothing=0.1)
    terms = loss(make_batch(mixed, 5, labelled), StudentOutput((), tuple(levels)))
    wanted = loss(make_batch(few, 3), StudentOutput((), tuple(alone)))
    assert set(terms) == set(wanted) == {"box", "obj", "cls"}
    for name in terms:
        torch.testing.assert_close(terms[name], wanted[name], rtol=1e-5, atol=1e-7)  # sums in another order
    sum(terms.values()).backward()
    sum(wanted.values()).backward()
    for level, other in zip(levels, alone, strict=True):
        torch.testing.assert_close(level.grad[known], other.grad, rtol=1e-4, atol=1e-8)
        assert not level.grad[[0, 3]].any()


def test_a_batch_without_a_label_has_no_loss_and_no_gradient():
    levels = [level.requires_grad_() for level in random_levels(np.random.RandomState(0), 2, 64, 3)]
    terms = loss_of(3)(make_batch(torch.zeros(0, 6), 2, [False, False]), StudentOutput((), tuple(levels)))
    assert [float(value.detach()) for value in terms.values()] == [0, 0, 0]
    sum(terms.values()).backward()
    assert not any(level.grad.any() for level in levels)


def test_half_precision_logits_of_40_stay_finite():
    levels = [(torch.randn(1, 3, 4, 4, 8).sign() * 40).to(torch.bfloat16) for _ in STRIDES]
    targets = torch.tensor([[0, 1, 0.4, 0.4, 0.3, 0.3]])
    terms = loss_of(3)(make_batch(targets, 1), StudentOutput((), tuple(levels)))
    assert all(torch.isfinite(value) for value in terms.values())


def test_public_gains_are_scaled_by_levels_classes_and_image_size():
    gains = LossGains(box=0.05, obj=1.0, cls=0.5).scaled(level_count=4, class_count=20, image_size=320)
    assert gains.box == pytest.approx(0.05 * 3 / 4)
    assert gains.obj == pytest.approx(0.25 * 3 / 4)
    assert gains.cls == pytest.approx(0.5 * 20 / 80 * 3 / 4)


def test_focal_form_weighs_an_easy_cell_less_than_a_hard_one():
    from utils.losses.terms import binary_cross_entropy

    logits, targets = torch.tensor([4.0, -4.0]), torch.tensor([1.0, 1.0])
    plain = binary_cross_entropy(logits, targets)
    focal = binary_cross_entropy(logits, targets, gamma=1.5)
    # By hand: alpha (1 - p)^gamma BCE with alpha = .25.
    by_hand = 0.25 * (1 - logits.sigmoid()) ** 1.5 * plain
    torch.testing.assert_close(focal, by_hand)


@pytest.mark.parametrize("gamma", [0.5, 1.5])
def test_the_focal_form_is_finite_where_prediction_and_target_agree(gamma):
    logits = torch.tensor([-20.0, 20.0, 0.0], requires_grad=True)
    targets = torch.tensor([0.0, 1.0 + 1.2e-7, 1.0])
    loss = binary_cross_entropy(logits, targets, gamma=gamma)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logits.grad).all()


def test_ranks_meet_in_training_and_not_in_a_validation_where_one_may_have_more_batches(monkeypatch):
    met = []
    monkeypatch.setattr(detection, "is_distributed", lambda: True)
    monkeypatch.setattr(detection, "sum_over_ranks", lambda value: met.append(value) or value)
    loss = DetectionLoss(ANCHORS_GRID, 2, LossGains())
    levels = random_levels(np.random.RandomState(0), 2, 64, 2)
    batch = Batch(torch.zeros(2, 3, 64, 64), torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.4]]), torch.ones(2) > 0)
    alone = loss.eval()(batch, StudentOutput((), tuple(levels)))
    assert not met
    together = loss.train()(batch, StudentOutput((), tuple(levels)))
    assert met and all(torch.allclose(alone[name], together[name]) for name in alone)
