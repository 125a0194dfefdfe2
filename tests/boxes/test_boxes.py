"""Box formats and overlaps against values worked out by hand and properties that must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from utils.boxes import aligned_iou, cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh

KINDS = ("iou", "giou", "diou", "ciou")


def _random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=generator) * 100
    return torch.cat((centres, 5 + torch.rand(count, 2, generator=generator) * 60), dim=1)


def test_corners_and_centres_are_inverse_in_torch_and_numpy() -> None:
    boxes = _random_boxes(50, seed=0)
    assert torch.equal(
        cxcywh_to_xyxy(torch.tensor([[10.0, 20.0, 4.0, 6.0]])), torch.tensor([[8.0, 17, 12, 23]])
    )
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)
    array = boxes.numpy().reshape(5, 10, 4)
    np.testing.assert_allclose(xyxy_to_cxcywh(cxcywh_to_xyxy(array)), array, rtol=1e-5)


def test_pairwise_overlap_of_known_boxes() -> None:
    a = torch.tensor([[0.0, 0, 10, 10], [5.0, 5, 5, 5]])
    b = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [5, 5, 5, 5]])
    expected = torch.tensor([[1, 1 / 3, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(pairwise_iou(a, b), expected)
    stacked = pairwise_iou(torch.stack((a, a + 1)), torch.stack((b, b)))
    torch.testing.assert_close(stacked, torch.stack((expected, pairwise_iou(a + 1, b))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_overlaps_itself_fully(kind: str) -> None:
    boxes = _random_boxes(1000, seed=1)
    torch.testing.assert_close(aligned_iou(boxes, boxes, kind), torch.ones(1000), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_overlap_is_symmetric_and_at_most_one(kind: str) -> None:
    a, b = _random_boxes(200, seed=2), _random_boxes(200, seed=3)
    forward = aligned_iou(a, b, kind)
    torch.testing.assert_close(forward, aligned_iou(b, a, kind))
    assert forward.max() <= 1 + 1e-6 and forward.min() >= -1.5


def test_aligned_overlap_is_the_diagonal_of_the_pairwise_one() -> None:
    a, b = _random_boxes(200, seed=4), _random_boxes(200, seed=5)
    pairwise = pairwise_iou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)).diagonal()
    torch.testing.assert_close(aligned_iou(a, b, "iou"), pairwise, atol=1e-6, rtol=1e-5)


def test_family_on_boxes_worked_out_by_hand() -> None:
    # 10 x 10 at the origin and 10 x 20 centred 10 to the right: they touch, the hull is 20 x 20.
    a, b = torch.tensor([[5.0, 10, 10, 10]]), torch.tensor([[15.0, 10, 10, 20]])
    distance = 10**2 / (20**2 + 20**2)
    shape = 4 / math.pi**2 * (math.atan(0.5) - math.atan(1.0)) ** 2
    assert aligned_iou(a, b, "iou").item() == pytest.approx(0, abs=1e-6)
    assert aligned_iou(a, b, "giou").item() == pytest.approx(-(400 - 300) / 400, abs=1e-6)
    assert aligned_iou(a, b, "diou").item() == pytest.approx(-distance, abs=1e-6)
    assert aligned_iou(a, b, "ciou").item() == pytest.approx(-distance - shape**2 / (shape + 1), abs=1e-6)


def test_boxes_that_are_apart_still_pull_on_each_other() -> None:
    a = torch.tensor([[10.0, 10, 5, 5]], requires_grad=True)
    aligned_iou(a, torch.tensor([[50.0, 10, 5, 5]]), "ciou").sum().backward()
    assert a.grad is not None and a.grad[0, 0] > 0 and a.grad[0, 1].abs() < 1e-6


def test_trade_off_takes_no_part_in_the_gradient() -> None:
    a = _random_boxes(1, seed=6).double().requires_grad_()
    b = _random_boxes(1, seed=7).double()
    (gradient,) = torch.autograd.grad(aligned_iou(a, b, "ciou").sum(), a)
    (diou,) = torch.autograd.grad(aligned_iou(a, b, "diou").sum(), a)
    atan_gap = torch.atan(b[:, 2] / b[:, 3]) - torch.atan(a[:, 2] / a[:, 3])
    shape = 4 / math.pi**2 * atan_gap.square()
    alpha = (shape / (shape - aligned_iou(a, b, "iou") + 1)).detach()
    (expected,) = torch.autograd.grad((alpha * shape).sum(), a)
    torch.testing.assert_close(gradient, diou - expected, atol=1e-5, rtol=1e-3)


def test_half_precision_input_gives_full_precision_overlap() -> None:
    a, b = _random_boxes(20, seed=8).half(), _random_boxes(20, seed=9).half()
    result = aligned_iou(a, b)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, aligned_iou(a.float(), b.float()))


def test_boxes_without_size_give_finite_values_and_gradients() -> None:
    a = torch.zeros(3, 4, requires_grad=True)
    value = aligned_iou(a, torch.zeros(3, 4))
    value.sum().backward()
    assert value.isfinite().all() and a.grad is not None and a.grad.isfinite().all()
