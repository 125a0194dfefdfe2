"""The order of an epoch: complete, repeatable, fair to ranks and weights."""

from __future__ import annotations

import numpy as np
import pytest

import utils.datasets.sampling as sampling
from utils.datasets.sampling import TrainingOrder, batch_compositions, rect_groups, unlabelled_of_epoch

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
    assert batch.rows.shape == (20, sampling.IMAGES_PER_SAMPLE)
    assert set(batch.rows[:, 1:].ravel()) == set(range(20))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_an_epoch_in_the_order_of_a_single_process(monkeypatch, ranks):
    single = [batch.rows[:, 0].tolist() for batch in TrainingOrder(10, 2 * ranks, SHAPE, seed=0)]
    shares, lengths = [], []
    monkeypatch.setattr(sampling, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(sampling, "rank", lambda rank=rank: rank)
        order = TrainingOrder(10, 2, SHAPE, seed=0)
        shares.append([batch.rows[:, 0].tolist() for batch in order])
        lengths.append((len(order), len(list(order))))
    assert len(set(lengths)) == 1
    assert lengths[0][0] == lengths[0][1]
    together = [sorted(sum(step, [])) for step in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in single]


def test_a_rank_without_a_picture_for_the_last_batch_takes_one_of_the_first_again(monkeypatch):
    monkeypatch.setattr(sampling, "world_size", lambda: 2)
    monkeypatch.setattr(sampling, "rank", lambda: 1)
    order = TrainingOrder(9, 2, SHAPE, seed=0)
    batches = [batch.positions.tolist() for batch in order]
    assert len(order) == 3 and batches == [[1, 3], [5, 7], [0]]


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
    for epoch, columns in ((2, sampling.IMAGES_PER_SAMPLE), (3, 1)):
        order.epoch = closing.epoch = epoch
        assert {batch.rows.shape[1] for batch in closing} == {columns}
        assert own_numbers(closing) == own_numbers(order)


def test_when_teaching_is_over_labelled_pictures_take_the_places_of_the_others():
    unlabelled = np.arange(20) % 3 == 2
    for share in (None, 0.5):
        order = TrainingOrder(20, 4, SHAPE, 0, ~unlabelled, share)
        order.unlabelled_until = 2
        length = len(order)
        for epoch in range(4):
            order.epoch = epoch
            rows = np.concatenate([batch.rows for batch in order])
            assert len(list(order)) == length == len(order)
            assert unlabelled[rows].any() == (epoch < 2)


UNLABELLED = np.arange(20) % 3 == 2  # 6 of 20


def two_pools(batch_size: int = 4, share: float | None = None) -> TrainingOrder:
    return TrainingOrder(20, batch_size, SHAPE, 0, ~UNLABELLED, share)


def kinds_of(order: TrainingOrder) -> list[tuple[int, int]]:
    """Labelled and unlabelled images of each batch."""
    unlabelled = [int(UNLABELLED[batch.rows[:, 0]].sum()) for batch in order]
    return [(len(batch.rows) - count, count) for batch, count in zip(order, unlabelled, strict=True)]


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_partners_are_of_the_kind_of_the_sample_and_all_of_a_kind_are_drawn(share, weighted):
    order = two_pools(share=share)
    order.weights = np.where(UNLABELLED, 0.0, 1.0) if weighted else None
    seen = set()
    for order.epoch in range(5):
        for batch in order:
            kinds = UNLABELLED[batch.rows]
            assert (kinds == kinds[:, :1]).all()
            seen |= set(batch.rows[:, 1:].ravel().tolist())
    assert seen == set(range(20))


def test_without_a_share_every_picture_comes_once_whatever_its_kind():
    order = two_pools()
    for order.epoch in range(3):
        assert sorted(own_numbers(order)) == list(range(20))
        assert len(order) == len(list(order)) == 5
        assert len(set(kinds_of(order))) > 1  # shuffled among each other, not one kind after the other


@pytest.mark.parametrize("grouped", [False, True])
def test_no_batch_is_without_a_label_where_there_are_two_for_each(grouped):
    labelled = np.arange(400) < 100
    order = TrainingOrder(400, 8, SHAPE, 0, labelled)
    if grouped:
        order.group = lambda numbers: rect_groups(np.full((len(numbers), 2), 64), 8, 64, 32, pad=0.0)
    for order.epoch in range(5):
        assert all(1 <= labelled[batch.rows[:, 0]].sum() <= 4 for batch in order)


def test_without_unlabelled_pictures_nothing_changes():
    plain = list(TrainingOrder(10, 4, SHAPE, seed=3))
    for share in (None, 0.0):
        told = list(TrainingOrder(10, 4, SHAPE, 3, np.ones(10, np.bool_), share))
        for one, other in zip(plain, told, strict=True):
            np.testing.assert_array_equal(one.rows, other.rows)
            np.testing.assert_array_equal(one.positions, other.positions)


def test_a_share_of_zero_leaves_the_unlabelled_out():
    order = two_pools(share=0.0)
    assert sorted(own_numbers(order)) == np.flatnonzero(~UNLABELLED).tolist()
    assert not any(UNLABELLED[batch.rows].any() for batch in order)


def test_each_batch_holds_the_share_and_each_labelled_picture_comes_once():
    order = two_pools(share=0.5)
    for order.epoch in range(3):
        assert kinds_of(order) == [(2, 2)] * 7
        own = np.array(own_numbers(order))
        assert sorted(own[~UNLABELLED[own]]) == np.flatnonzero(~UNLABELLED).tolist()
        places = np.concatenate([batch.positions for batch in order])
        assert sorted(places) == list(range(28))  # each sample has random numbers of its own
    assert len(order) == 7


def test_both_kinds_are_mixed_within_a_batch():
    order = two_pools(batch_size=8, share=0.5)
    # The images of a run show the first images of a batch: those shall not all be labelled.
    assert any(UNLABELLED[batch.rows[:2, 0]].any() for batch in order)


@pytest.mark.parametrize(
    ("labelled", "batch_size", "share", "kinds"),
    [
        (10, 4, 0.5, [(2, 2)] * 5),
        (9, 4, 0.5, [(2, 2)] * 4 + [(1, 1)]),
        (10, 16, 0.25, [(10, 3)]),  # 12 and 4 in a whole batch
        (10, 4, 0.01, [(3, 1)] * 3 + [(1, 1)]),
        (2, 4, 0.95, [(1, 3)] * 2),
        (5, 2, 0.9, [(1, 1)] * 5),
    ],
)
def test_whole_numbers_of_both_kinds_make_a_batch(labelled, batch_size, share, kinds):
    assert batch_compositions(labelled, batch_size, share) == kinds


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_unlabelled_pictures_come_again_only_when_all_were_seen_over_epochs_too(share):
    order, drawn = two_pools(share=share), []
    for order.epoch in range(5):
        own = np.array(own_numbers(order))
        drawn += own[UNLABELLED[own]].tolist()
    per_epoch = order.unlabelled_per_epoch
    assert len(drawn) == 5 * per_epoch
    counts = np.bincount(drawn, minlength=20)[UNLABELLED]
    assert counts.max() - counts.min() <= 1
    for epoch in range(1, 6):
        so_far = np.bincount(drawn[: epoch * per_epoch], minlength=20)[UNLABELLED]
        assert so_far.max() - so_far.min() <= 1


def test_an_epoch_with_both_kinds_needs_no_epoch_before_it():
    going_on, fresh = two_pools(share=0.3), two_pools(share=0.3)
    for going_on.epoch in range(4):
        last = list(going_on)
    fresh.epoch = 3
    for one, other in zip(last, fresh, strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.positions, other.positions)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_ranks_share_the_steps_of_both_kinds_of_a_single_process(monkeypatch, ranks, share):
    """Also where a rank has one image for both kinds."""
    batch = 4 // ranks or 1

    def positions(order):
        return [batch.positions.tolist() for batch in order]

    single = positions(two_pools(batch * ranks, share))
    monkeypatch.setattr(sampling, "world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(sampling, "rank", lambda rank=rank: rank)
        order = two_pools(batch, share)
        shares.append(positions(order))
        assert len(order) == len(shares[-1]) == len(single)
    for whole, *parts in zip(single, *shares, strict=True):
        assert max(map(len, parts)) <= batch and min(map(len, parts)) > 0
        together = sorted(sum(parts, []))
        idle = ranks - len(whole)  # ranks for which the last step has nothing
        assert together == sorted([*whole, *[0] * max(idle, 0)])


def test_weights_act_among_the_labelled_and_leave_the_others_alone():
    order = two_pools(share=0.5)
    order.weights = np.zeros(20)
    order.weights[[0, 2]] = 1.0, 5.0  # the second is unlabelled: its weight counts for nothing
    own = np.array(own_numbers(order))
    assert set(own[~UNLABELLED[own]]) == {0}
    assert set(own[UNLABELLED[own]]) == set(np.flatnonzero(UNLABELLED))


@pytest.mark.parametrize(("share", "unlabelled"), [(None, 6), (0.0, 0), (0.5, 14), (0.125, 2)])
def test_grouped_batches_mix_the_kinds_and_the_share_is_of_the_epoch(share, unlabelled):
    order = two_pools(share=share)
    order.group = lambda numbers: rect_groups(np.full((len(numbers), 2), 64), 4, 64, 32, pad=0.0)
    for order.epoch in range(2):
        own = np.array(own_numbers(order))
        assert sorted(own[~UNLABELLED[own]]) == np.flatnonzero(~UNLABELLED).tolist()
        assert UNLABELLED[own].sum() == unlabelled == order.unlabelled_per_epoch
        assert len(order) == len(list(order)) == -(-(14 + unlabelled) // 4)
    if unlabelled > 2:
        assert any(known and unknown for known, unknown in kinds_of(order))


def test_a_share_of_an_epoch_is_at_least_one_picture():
    assert [unlabelled_of_epoch(10, share) for share in (0.01, 0.5, 0.75)] == [1, 10, 30]


def test_epochs_without_mosaics_keep_the_order_of_both_kinds():
    order, closing = two_pools(share=0.5), two_pools(share=0.5)
    closing.mosaic_until = 0
    assert {batch.rows.shape[1] for batch in closing} == {1}
    assert own_numbers(closing) == own_numbers(order)
