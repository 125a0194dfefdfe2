"""Feature losses by hand, and the properties that hold for each."""

import math

import pytest
import torch

from utils.distillation import features
from utils.distillation.features import FeatureLoss, channelwise_divergence, standardised

KINDS = ("cwd", "pkd", "score-l2")


def maps(seed, channels=(4, 6), size=8, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, c, size // 2**i, size // 2**i, generator=generator) for i, c in enumerate(channels)
    )


def raw_levels(features, objectness=2.0):
    return [
        torch.full((f.shape[0], 3, *f.shape[2:], 7), -1.0).index_fill(4, torch.tensor([4]), objectness)
        for f in features
    ]


def test_channelwise_divergence_of_two_cells_by_hand():
    own, target = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, math.log(3)]]]])
    wanted = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(channelwise_divergence(own, target)) == pytest.approx(wanted, rel=1e-6)


def test_standardised_channels_have_mean_zero_and_variance_one():
    (x,) = standardised(5 + 3 * torch.randn(4, 2, 8, 8))
    assert float(x.mean().abs()) < 1e-5
    torch.testing.assert_close(x.var((0, 2, 3), unbiased=False), torch.ones(2), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_features_have_no_loss(kind):
    loss = FeatureLoss(kind, (4, 6), (4, 6))
    own = maps(0)
    projected = [project(x).detach() for project, x in zip(loss.projections, own, strict=True)]
    assert float(loss(own, projected, raw_levels(own)).detach()) == pytest.approx(0, abs=1e-5)


def test_each_loss_is_the_sum_over_levels_of_what_its_formula_says():
    own, target, raw = maps(0), maps(1), raw_levels(maps(0))
    by_hand = dict.fromkeys(KINDS, 0.0)
    for x, y, level in zip(own, target, raw, strict=True):
        a, b = ((z - z.mean((0, 2, 3), True)) / z.var((0, 2, 3), False, keepdim=True).sqrt() for z in (x, y))
        p, q = (z.flatten(2).softmax(-1) for z in (a, b))
        by_hand["cwd"] += float((q * (q / p).log()).sum(-1).mean())
        by_hand["pkd"] += float((a - b).square().mean() / 2)
        score = level.sigmoid()[..., 4] * level.sigmoid()[..., 5:].amax(-1)
        weight = score.amax(1, keepdim=True) / score.amax(1).sum()
        by_hand["score-l2"] += float(((x - y).square() * weight).sum() / x.shape[1])
    for kind, gain in (("cwd", 0.02), ("pkd", 0.1), ("score-l2", 0.3)):
        loss = FeatureLoss(kind, (4, 6), (4, 6))
        loss.projections = torch.nn.ModuleList([torch.nn.Identity()] * 2)
        assert float(loss(own, target, raw)) == pytest.approx(gain * by_hand[kind], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_other_channels_are_brought_together_and_the_projections_learn(kind):
    loss = FeatureLoss(kind, (4, 6), (5, 8))
    own = tuple(x.requires_grad_() for x in maps(0))
    wanted = maps(1, channels=(5, 8))
    total = loss(own, wanted, raw_levels(own))
    total.backward()
    assert torch.isfinite(total) and total.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in loss.parameters())
    assert all(float(x.grad.abs().sum()) > 0 for x in own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_stays_finite(kind, dtype):
    loss = FeatureLoss(kind, (4, 6), (4, 6)).to(dtype)
    own = tuple((40 * x).to(dtype) for x in maps(0))
    assert torch.isfinite(loss(own, tuple((40 * x).to(dtype) for x in maps(1)), raw_levels(own)))


def test_squared_error_counts_where_the_teacher_sees_something():
    loss = FeatureLoss("score-l2", (2,), (2,))
    raw = torch.full((1, 3, 1, 2, 7), -30.0)
    raw[0, 1, 0, 1, 4:6] = 30.0  # an object in the second cell
    own, target = torch.zeros(1, 2, 1, 2), torch.tensor([[[[9.0, 2.0]], [[9.0, 4.0]]]])
    assert float(loss.distance(own, target, raw)) == pytest.approx((4 + 16) / 2, rel=1e-5)
    assert float(loss.distance(own, target, torch.full_like(raw, -30.0))) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["cwd", "pkd", "score-l2"])
def test_small_gradients_are_not_lost_in_float16(kind):
    """They are taken before the loss is scaled up, which in float16 would be too late."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(8, 16, 40, 40, generator=generator).half()
    own = (target + 0.1 * torch.rand(8, 16, 40, 40, generator=generator)).half()
    raw = torch.randn(8, 3, 40, 40, 7, generator=generator)
    loss = FeatureLoss(kind, [16], [16])
    slopes = []
    for maps in (own.clone().requires_grad_(), own.double().requires_grad_()):
        exact = maps.dtype is torch.float64
        with pytest.MonkeyPatch.context() as patch:
            if exact:
                patch.setattr(features, "differentiated_at_once", lambda function, x: function(x))
            (loss.distance(maps, target, raw) * 65536).backward()
        slopes.append(maps.grad.double())
    assert slopes[0].isfinite().all()
    assert ((slopes[0] == 0) & (slopes[1] != 0)).double().mean() < 1e-3
    assert float((slopes[0] - slopes[1]).norm() / slopes[1].norm()) < 2e-3
