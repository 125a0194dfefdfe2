"""Gradients of several losses, taken apart within one backward pass."""

import pytest
import torch

from models.yolo import Model
from utils.batch import StudentOutput
from utils.training.gauge import GradientTaps


def network():
    torch.manual_seed(0)
    model = Model("models/demo-student.yaml", nc=2).to(memory_format=torch.channels_last)
    return model.train()


def losses():
    """Of outputs alone, of outputs and features together, and of nothing."""
    return [
        lambda output: sum(level.square().mean() for level in output.levels),
        lambda output: (
            sum(level[..., 4].sigmoid().sum() for level in output.levels[1:])
            + sum(feature.abs().mean() * 50 for feature in output.features)
        ),
        lambda output: torch.zeros(()),
    ]


@pytest.mark.parametrize("frozen", ["nothing", "a part of the neck", "all but the head"])
def test_the_norms_are_those_of_gradients_taken_one_by_one(frozen):
    model = network()
    head = len(model.model) - 1
    first = {"nothing": 0, "a part of the neck": head - 3, "all but the head": head}[frozen]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(int(name.split(".")[1]) >= first)
    trained = [feature.requires_grad for feature in model.forward_features(torch.rand(1, 3, 64, 64))]
    assert (any(trained), all(trained)) == (first < head, first == 0)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    features = model.forward_features(images)
    # Apart: a coarser map is made of a finer one, which is not what the head's input is about.
    apart = tuple(feature.detach().requires_grad_(first == 0) for feature in features)
    single = StudentOutput(apart, model.forward_head(apart))
    roots = apart if first == 0 else single.levels
    expected = []
    for loss in losses():
        total = loss(single)
        found = (
            torch.autograd.grad(total, roots, retain_graph=True, allow_unused=True)
            if total.requires_grad
            else []
        )
        expected.append(sum(float(g.double().square().sum()) for g in found if g is not None) ** 0.5)
    taps = GradientTaps(model, StudentOutput(features, model.forward_head(features)))
    sum(loss(taps.view()) for loss in losses()).backward()
    assert taps.squares().sqrt().tolist() == pytest.approx(expected, rel=1e-5)
    assert expected[2] == 0 < min(expected[:2])


def test_the_gradients_of_the_weights_are_the_same_with_taps():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for tapped in (False, True):
        model = network()
        features = model.forward_features(images)
        output = StudentOutput(features, model.forward_head(features))
        taps = GradientTaps(model, output)
        sum(loss(taps.view() if tapped else output) for loss in losses()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
