"""Raw levels of a teacher laid onto other anchors and classes, where logits are large or precision is low."""

import pytest
import torch

from utils.distillation.matching import anchors_rescaled, objectness_of

ANCHORS = torch.tensor([[2.0, 3.0], [4.0, 6.0], [8.0, 7.0]])
HALVES = [torch.float16, torch.bfloat16]


def level_of(dtype=torch.float32):
    """Logits of +-40 and of everything in between, among them 4 classes."""
    generator = torch.Generator().manual_seed(0)
    level = 40 * torch.randn(2, 3, 4, 4, 9, generator=generator).sign()
    level[1] = 3 * torch.randn(3, 4, 4, 9, generator=generator)
    return level.to(dtype)


def sizes_of(level, anchors):
    """Widths and heights (B, A, H, W, 2) in grid units."""
    return (2 * level[..., 2:4].sigmoid()) ** 2 * anchors[:, None, None]


@pytest.mark.parametrize("dtype", HALVES)
def test_boxes_in_reduced_precision_are_moved_to_other_anchors_as_in_float32(dtype):
    level, other = level_of(dtype), ANCHORS * torch.tensor([[1.5, 0.7], [10.0, 10.0], [0.1, 0.1]])
    moved = anchors_rescaled(level, ANCHORS, other)
    assert moved.dtype is dtype and moved.isfinite().all()
    torch.testing.assert_close(moved, anchors_rescaled(level.float(), ANCHORS, other).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_objectness_of_some_classes_in_reduced_precision_is_that_in_float32(dtype):
    level, classes = level_of(dtype), torch.tensor([0, 2])
    seen = objectness_of(level, classes)
    assert seen.isfinite().all()
    torch.testing.assert_close(seen, objectness_of(level.float(), classes), rtol=1e-5, atol=1e-5)


def test_objectness_of_some_classes_is_shared_by_the_best_of_them_and_the_best_of_all():
    """Classes 0 and 2 are asked for; scores of the others or of the second best do not add to it."""
    scores = torch.tensor([[0.6, 0.3, 0.5], [0.6, 0.9, 0.5], [0.1, 0.8, 0.4]])
    level = torch.cat((torch.zeros(3, 5), scores.logit()), -1).reshape(1, 1, 1, 3, 8)
    level[..., 4] = torch.tensor(0.9).logit()
    seen = objectness_of(level, torch.tensor([0, 2])).sigmoid().flatten()
    torch.testing.assert_close(seen, 0.9 * torch.tensor([1.0, 0.6 / 0.9, 0.4 / 0.8]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_sizes_that_other_anchors_cannot_express_end_at_four_times_these(factor):
    """Anchors of a tenth of the size, or of ten times the size, of those that the boxes were relative to."""
    level, other = level_of(), ANCHORS / factor
    moved = anchors_rescaled(level, ANCHORS, other)
    assert moved.isfinite().all()
    before, after, limit = sizes_of(level, ANCHORS), sizes_of(moved, other), 4 * other[:, None, None]
    assert (before > limit).any() == (factor > 1)
    assert (after <= limit).all()
    torch.testing.assert_close(after, torch.minimum(before, limit), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(moved[..., [0, 1, 4, 5, 6, 7, 8]], level[..., [0, 1, 4, 5, 6, 7, 8]])
