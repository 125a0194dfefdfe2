"""Which cells are paired with a target."""

import json
from pathlib import Path

import pytest
import torch

from utils.losses.assignment import assign_targets

ANCHOR = torch.tensor([[2.0, 2.0]])


def cells_of(x, y, size=2.0, grid=(8, 8), limit=4.0):
    rows, columns = grid
    targets = torch.tensor([[0, 0, x / columns, y / rows, size / columns, size / rows]])
    pairs = assign_targets(targets, ANCHOR[None], [grid], limit)
    return sorted(zip(pairs.column.tolist(), pairs.row.tolist(), strict=True)), pairs


def test_a_target_takes_its_cell_and_the_two_nearest_neighbours():
    assert cells_of(3.2, 4.3)[0] == [(2, 4), (3, 3), (3, 4)]
    assert cells_of(3.7, 4.8)[0] == [(3, 4), (3, 5), (4, 4)]


def test_a_target_in_the_middle_of_its_cell_takes_that_alone():
    assert cells_of(3.5, 4.5)[0] == [(3, 4)]


@pytest.mark.parametrize(("x", "y", "own"), [(0.1, 0.1, (0, 0)), (7.9, 7.9, (7, 7))])
def test_no_neighbour_lies_across_the_border(x, y, own):
    assert cells_of(x, y)[0] == [own]


def test_boxes_are_relative_to_the_cell_that_answers():
    _, pairs = cells_of(3.2, 4.3)
    centres = pairs.boxes[:, :2] + torch.stack((pairs.column, pairs.row), 1)
    torch.testing.assert_close(centres, torch.tensor([[3.2, 4.3]]).expand(3, 2))
    assert float(pairs.boxes[:, :2].min()) > -0.5 and float(pairs.boxes[:, :2].max()) < 1.5


def test_an_anchor_answers_only_within_the_ratio_limit():
    assert cells_of(3.5, 4.5, size=7.9)[0] == [(3, 4)]
    assert cells_of(3.5, 4.5, size=8.1)[0] == []
    assert cells_of(3.5, 4.5, size=0.49)[0] == []


def test_numbers_of_pairs_equal_the_reference_values():
    from_file = json.loads(Path(__file__).with_name("detection_reference.json").read_text())
    import numpy as np

    anchors_px = torch.tensor(
        [[[10, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]], [[116, 90], [156, 198], [373, 326]]]
    )
    for case in from_file:
        r = np.random.RandomState(case["seed"])
        size, batch, n = case["image_size"], case["batch"], case["targets"]
        for stride in (8, 16, 32):  # the predictions come first in the recipe's stream
            r.standard_normal((batch, 3, size // stride, size // stride, 5 + case["nc"]))
        if not n:
            continue
        image, cls = r.randint(0, batch, n), r.randint(0, case["nc"], n)
        boxes = np.column_stack((r.uniform(0.02, 0.98, (n, 2)), r.uniform(0.02, 0.6, (n, 2))))
        targets = torch.tensor(np.column_stack((image, cls, boxes)), dtype=torch.float32)
        strides = torch.tensor([8, 16, 32])
        grids = [(size // stride, size // stride) for stride in strides.tolist()]
        pairs = assign_targets(targets, anchors_px / strides[:, None, None], grids, 4.0)
        assert list(pairs.counts) == case["matched_per_level"]


def test_all_levels_at_once_are_each_alone():
    generator = torch.Generator().manual_seed(0)
    anchors = torch.rand(3, 2, 2, generator=generator) * 4 + 0.5
    targets = torch.rand(20, 6, generator=generator)
    targets[:, 0] = torch.arange(20) // 5
    targets[:, 1] = torch.arange(20) % 3
    grids = [(8, 12), (4, 6), (2, 3)]
    together = assign_targets(targets, anchors, grids, 4.0)
    assert all(count > 0 for count in together.counts) and sum(together.counts) == len(together)
    levels = [torch.rand(4, 2, *grid, 7, generator=generator) for grid in grids]
    flat = torch.cat([level.flatten(1, 3) for level in levels], 1)
    torch.testing.assert_close(together.pick(levels), flat[together.image, together.place])
    begin = 0
    for number, (anchor, grid) in enumerate(zip(anchors, grids, strict=True)):
        alone, end = assign_targets(targets, anchor[None], [grid], 4.0), begin + together.counts[number]
        for name in ("image", "anchor", "row", "column", "target", "label", "boxes"):
            assert torch.equal(getattr(together, name)[begin:end], getattr(alone, name)), name
        assert together.level[begin:end].eq(number).all()
        begin = end


def test_no_targets_make_no_pairs():
    pairs = assign_targets(torch.zeros(0, 6), ANCHOR[None].expand(2, 1, 2), [(8, 8), (4, 4)], 4.0)
    assert len(pairs) == 0 and pairs.counts == (0, 0)
    assert pairs.pick([torch.rand(1, 1, 8, 8, 6), torch.rand(1, 1, 4, 4, 6)]).shape == (0, 6)
