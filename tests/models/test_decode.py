"""Raw outputs to pixels."""

import math

import pytest
import torch

from models.decode import boxes_cxcywh_grid, decode, decode_above, decode_best

ANCHORS = torch.tensor([[[10.0, 20.0], [30.0, 40.0]], [[50.0, 60.0], [70.0, 80.0]]])
STRIDES = torch.tensor([8.0, 16.0])


def raw_levels(dtype=torch.float32, classes=3):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, 4, 6, 5 + classes), (2, 2, 2, 3, 5 + classes))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def one_by_one(levels):
    """The definition, prediction by prediction."""
    images = []
    for image in range(2):
        rows = []
        for level, anchors, stride in zip(levels, ANCHORS.tolist(), STRIDES.tolist(), strict=True):
            for anchor, row, column in torch.cartesian_prod(*map(torch.arange, level.shape[1:4])).tolist():
                s = [1 / (1 + math.exp(-x)) for x in level[image, anchor, row, column].tolist()]
                width, height = anchors[anchor]
                xy = [(2 * s[0] - 0.5 + column) * stride, (2 * s[1] - 0.5 + row) * stride]
                rows.append([*xy, (2 * s[2]) ** 2 * width, (2 * s[3]) ** 2 * height, *s[4:]])
        images.append(rows)
    return torch.tensor(images)


@pytest.mark.parametrize("least", [0.0, 0.3, 0.6, 0.99, 1.0])
def test_those_above_a_threshold_are_decoded_as_among_all(least):
    levels = raw_levels()
    decoded = decode(levels, ANCHORS, STRIDES)
    image, row, found = decode_above(levels, ANCHORS, STRIDES, least)
    expected = (decoded[..., 4] > least).nonzero(as_tuple=True)
    assert torch.equal(image, expected[0]) and torch.equal(row, expected[1])
    torch.testing.assert_close(found, decoded[expected])
    assert least in (0.99, 1.0) or len(image) > 5


@pytest.mark.parametrize("most", [1, 10, 1000])
def test_the_best_are_decoded_as_among_all(most):
    levels = raw_levels()
    levels[1][1, 0, 0, 0, 4] = float("nan")
    decoded = decode(levels, ANCHORS, STRIDES)
    found = decode_best(levels, ANCHORS, STRIDES, most)
    rows = found[..., 6].long()
    best, label = (decoded[..., 5:] * decoded[..., 4:5]).max(-1)
    best = best.nan_to_num(0.0)
    expected, _ = best.topk(min(most, best.shape[1]))
    torch.testing.assert_close(found[..., 4], expected)
    for image in range(2):
        own, real = decoded[image, rows[image]], expected[image] > 0
        torch.testing.assert_close(found[image, real, :4], own[real, :4], rtol=1e-5, atol=1e-4)
        assert torch.equal(found[image, real, 5], label[image, rows[image]][real].float())
        assert len(set(rows[image].tolist())) == rows.shape[1]


def test_every_prediction_follows_the_definition():
    levels = raw_levels()
    decoded = decode(levels, ANCHORS, STRIDES)
    torch.testing.assert_close(decoded, one_by_one(levels), rtol=1e-5, atol=1e-4)


def test_the_raw_levels_stay_as_they_were_however_they_lie_in_memory():
    levels = raw_levels()
    before = [level.clone() for level in levels]
    as_heads_give_them = [x.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2) for x in levels]
    assert torch.equal(decode(as_heads_give_them, ANCHORS, STRIDES), decode(levels, ANCHORS, STRIDES))
    assert all(torch.equal(level, old) for level, old in zip(levels, before, strict=True))


def test_half_precision_outputs_are_decoded_in_float32():
    levels = raw_levels(torch.float16)
    decoded = decode(levels, ANCHORS, STRIDES.half())
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, decode([level.float() for level in levels], ANCHORS, STRIDES))


def test_gradients_are_those_of_finite_differences():
    levels = [level[:1, :, :2, :2].double().requires_grad_() for level in raw_levels(classes=1)]
    weights = torch.randn(1, 16, 6, generator=torch.Generator().manual_seed(1))

    def total():
        return (decode(levels, ANCHORS, STRIDES) * weights).sum()

    for level, found in zip(levels, torch.autograd.grad(total(), levels), strict=True):
        for index in ((0, 0, 0, 1, 0), (0, 1, 1, 0, 2), (0, 1, 1, 1, 3), (0, 0, 1, 1, 4)):
            step = 1e-2  # wide, for decoding is in float32
            with torch.no_grad():
                level[index] += step
                above = total()
                level[index] -= 2 * step
                slope = (above - total()) / (2 * step)
                level[index] += step
            assert found[index].item() == pytest.approx(slope.item(), rel=2e-2, abs=5e-2)


def test_a_shape_first_met_in_inference_mode_can_be_trained_on_later():
    shape = (1, 2, 5, 7, 6)  # no other test's
    with torch.inference_mode():
        decode([torch.zeros(shape)], ANCHORS[:1], STRIDES[:1])
    level = torch.zeros(shape, requires_grad=True)
    decode([level], ANCHORS[:1], STRIDES[:1]).sum().backward()
    assert level.grad.abs().sum() > 0


def test_nothing_hangs_on_values_so_a_gpu_need_not_be_waited_for():
    """On the meta device there are no values: reading one would fail."""
    with torch.device("meta"):
        levels = [torch.empty(level.shape) for level in raw_levels()]
        assert decode(levels, ANCHORS.to("meta"), STRIDES.to("meta")).shape == (2, 60, 8)


def test_a_shape_first_met_in_an_export_is_decoded_rightly_in_it_and_after_it():
    class Head(torch.nn.Module):
        def forward(self, level):
            return decode([level], ANCHORS[:1], STRIDES[:1])

    level = torch.randn(1, 2, 3, 11, 6, generator=torch.Generator().manual_seed(0))  # no other test's shape
    exported = torch.export.export(Head(), (level,)).module()(level)
    eager = decode([level], ANCHORS[:1], STRIDES[:1])
    assert type(eager) is torch.Tensor
    assert torch.equal(exported, eager)
    cells = (eager[0, :, 0].view(2, 3, 11) - level[0, ..., 0].sigmoid() * 16 + 4) / 8
    torch.testing.assert_close(cells[0, 0], torch.arange(11.0), rtol=0, atol=1e-4)


def test_changed_anchors_count_at_once():
    levels = raw_levels()
    before = decode(levels, ANCHORS, STRIDES)
    after = decode(levels, ANCHORS * 2, STRIDES)
    torch.testing.assert_close(after[..., 2:4], before[..., 2:4] * 2)


def test_boxes_relative_to_their_cell():
    anchors = torch.tensor([[2.0, 3.0], [1.0, 1.0], [5.0, 6.0]])
    raw = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [100.0, -100.0, 100.0, -100.0], [math.log(3), 0, math.log(3), 0]]
    )
    wanted = torch.tensor([[0.5, 0.5, 2.0, 3.0], [1.5, -0.5, 4.0, 0.0], [1.0, 0.5, 2.25 * 5, 6.0]])
    torch.testing.assert_close(boxes_cxcywh_grid(raw, anchors), wanted)


def test_both_decoders_agree():
    level = raw_levels()[0]
    decoded = decode([level], ANCHORS[:1], STRIDES[:1]).view(2, 2, 4, 6, 8)
    boxes = boxes_cxcywh_grid(level[..., :4], (ANCHORS[0] / 8)[None, :, None, None])
    corner = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(4), indexing="xy"), -1)
    torch.testing.assert_close((boxes[..., :2] + corner) * 8, decoded[..., :2])
    torch.testing.assert_close(boxes[..., 2:] * 8, decoded[..., 2:4])
