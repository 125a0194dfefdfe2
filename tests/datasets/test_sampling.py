"""The order of an epoch: complete, repeatable, fair to ranks and weights."""

from __future__ import annotations

import numpy as np
import pytest

import utils.datasets.sampling as sampling
from utils.datasets.sampling import TrainingOrder, rect_groups

SHAPE = (64, 64)


def own_numbers(order: TrainingOrder) -> list[int]:
    return [int(number) for batch in order for number in batch.rows[:, 0]]


def test_every_picture_comes_once_an_epoch_in_a_new_order():
    order = TrainingOrder(10, 4, SHAPE, seed=0)
    assert [len(batch.rows) for batch in order] == [4, 4, 2]
    assert len(order) == 3
    first = own_numbers(order)
    order.epoch = 1
    second = own_numbers(order)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    order.epoch = 0
    assert own_numbers(order) == first
    assert own_numbers(TrainingOrder(10, 4, SHAPE, seed=1)) != first


def test_partners_are_drawn_from_all_pictures():
    order = TrainingOrder(20, 20, SHAPE, seed=0)
    [batch] = order
    assert batch.rows.shape == (20, sampling.PICTURES_PER_SAMPLE)
    assert set(batch.rows[:, 1:].ravel()) == set(range(20))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_an_epoch_in_the_order_of_a_single_process(monkeypatch, ranks):
    single = own_numbers(TrainingOrder(10, 2, SHAPE, seed=0))
    shares, lengths = [], []
    monkeypatch.setattr(sampling, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(sampling, "rank", lambda rank=rank: rank)
        order = TrainingOrder(10, 2, SHAPE, seed=0)
        shares.append(own_numbers(order))
        lengths.append((len(order), len(list(order))))
    assert len(set(lengths)) == 1
    assert lengths[0][0] == lengths[0][1]
    woven = [number for step in zip(*shares, strict=True) for number in step]
    assert woven[:10] == single
    assert woven[10:] == single[: len(woven) - 10]


def test_weights_draw_pictures_in_proportion_and_partners_too():
    order = TrainingOrder(1000, 1000, SHAPE, seed=0)
    order.weights = np.r_[np.zeros(500), np.ones(250), np.full(250, 3.0)]
    [batch] = order
    for drawn in (batch.rows[:, 0], batch.rows[:, 1:].ravel()):
        assert drawn.min() >= 500
        assert abs((drawn >= 750).mean() - 0.75) < 0.07  # 1000 draws: deviation .014


def test_rect_batches_fit_their_pictures():
    sizes = np.array([[640, 480], [480, 640], [640, 480], [600, 600], [480, 640], [640, 320]])
    groups = rect_groups(sizes, 2, 640, 32, pad=0.5)
    assert groups.order.tolist() == [5, 0, 2, 3, 1, 4]
    # With half a stride of padding each side is rounded up to the next multiple.
    assert groups.shapes_hw == [(512, 672), (672, 672), (672, 512)]
    assert rect_groups(sizes, 2, 640, 32, pad=0.0).shapes_hw == [(480, 640), (640, 640), (640, 480)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_grouped_batches_keep_aspects_together_and_come_in_a_new_order_each_epoch(monkeypatch, ranks):
    sizes = np.array([[640, 480], [480, 640]] * 10)
    monkeypatch.setattr(sampling, "world_size", lambda: ranks)
    order = TrainingOrder(20, 4, SHAPE, seed=0)
    order.group = lambda numbers: rect_groups(sizes[numbers], 4, 128, 32, pad=0.0)
    turns = []
    for epoch in range(4):
        order.epoch = epoch
        batches = list(order)
        assert len(batches) == len(order) == {1: 5, 2: 3}[ranks]
        for batch in batches:
            portraits = set((batch.rows[:, 0] % 2).tolist())
            assert batch.shape_hw == {(0,): (96, 128), (1,): (128, 96), (0, 1): (128, 128)}[tuple(portraits)]
        turns.append(own_numbers(order))
        if ranks == 1:
            assert sorted(turns[-1]) == list(range(20))
    assert len({tuple(turn) for turn in turns}) == 4


def test_weights_hold_for_grouped_batches_as_well():
    order = TrainingOrder(20, 4, SHAPE, seed=0)
    order.weights = np.r_[np.zeros(15), np.ones(5)]
    order.group = lambda numbers: rect_groups(np.full((len(numbers), 2), 64), 4, 64, 32, pad=0.0)
    assert min(own_numbers(order)) >= 15


def test_epochs_without_mosaics_have_no_partners_and_the_same_order():
    order, closing = TrainingOrder(10, 4, SHAPE, seed=0), TrainingOrder(10, 4, SHAPE, seed=0)
    closing.mosaic_until = 3
    for epoch, columns in ((2, sampling.PICTURES_PER_SAMPLE), (3, 1)):
        order.epoch = closing.epoch = epoch
        assert {batch.rows.shape[1] for batch in closing} == {columns}
        assert own_numbers(closing) == own_numbers(order)
