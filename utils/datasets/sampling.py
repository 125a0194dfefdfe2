"""Selection of the images of each batch, in the main process.

A worker receives the complete specification of a batch, so that the result does not depend on which
worker it is, how many there are, or what it loaded before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from utils.distributed import rank, world_size

IMAGES_PER_SAMPLE = 8
_ORDER_STREAM = 0
_TURN_STREAM = 2  # stream 1 is used by the loader for augmentation


@dataclass(frozen=True)
class BatchOrder:
    """The specification of one batch.

    rows: (B, 8) image numbers: a sample's own, its three partners in a mosaic, and the four of the
        mosaic that may be mixed in. Without mosaics (B, 1).
    positions: (B,) positions of the samples in the epoch; together with seed and epoch they
        determine every random choice.
    shape_hw: height and width of the batch in pixels.
    """

    epoch: int
    positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    shape_hw: tuple[int, int]


@dataclass(frozen=True)
class RectGroups:
    """Images sorted by aspect ratio and split into batches of a common shape.

    order: (N,) indices into the array that was grouped; shapes_hw: of each batch, pixels.
    """

    order: NDArray[np.int64]
    shapes_hw: list[tuple[int, int]]


def rect_groups(
    sizes_wh: NDArray[np.int64], batch_size: int, image_size: int, stride: int, pad: float
) -> RectGroups:
    """Group images into batches whose shape fits them with little padding.

    The longer side of a batch is `image_size`, the other the largest that an image of the batch
    needs; both are increased by `pad` strides and rounded up to a multiple of `stride`.
    """
    aspects = sizes_wh[:, 1] / sizes_wh[:, 0]
    order = np.argsort(aspects, kind="stable")
    shapes = []
    for start in range(0, len(order), batch_size):
        group = aspects[order[start : start + batch_size]]
        height, width = min(group.max(), 1.0), min(1 / group.min(), 1.0)
        sides = np.ceil(np.array([height, width]) * image_size / stride + pad).astype(int) * stride
        shapes.append((int(sides[0]), int(sides[1])))
    return RectGroups(order, shapes)


def batch_compositions(labelled: int, batch_size: int, share: float) -> list[tuple[int, int]]:
    """Return the numbers of labelled and unlabelled images in each batch of an epoch.

    Every labelled image comes once. Whatever the rounding, every batch has both kinds; the last may
    be smaller, with about the same share.

    Args:
        labelled: labelled images in the epoch.
        batch_size: images per batch, at least two.
        share: fraction of a batch that is unlabelled, above 0 and below 1.
    """
    assert batch_size > 1 and 0 < share < 1
    unlabelled = min(max(round(share * batch_size), 1), batch_size - 1)
    full = batch_size - unlabelled
    kinds = [(full, unlabelled)] * (labelled // full)
    if rest := labelled % full:
        kinds.append((rest, max(round(rest * unlabelled / full), 1)))
    return kinds


def unlabelled_of_epoch(labelled: int, share: float) -> int:
    """Return the number of unlabelled images, at least one, that make up this share (below 1) of an epoch."""
    return max(round(labelled * share / (1 - share)), 1)


def images_of_rank(count: int, batch_size: int, number: int, ranks: int) -> int:
    """Return how many of an epoch's `count` images a rank takes, every `ranks`-th from `number` on.

    All ranks together take as many as a single process. Only a rank that would have no image for the last of
    its batches, of `batch_size`, repeats one.
    """
    most, own = math.ceil(count / ranks), math.ceil((count - number) / ranks)
    return own if math.ceil(own / batch_size) == math.ceil(most / batch_size) else most


def _interleaved(
    labelled: NDArray[np.int64], unlabelled: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Interleave the rows of both kinds, each in its order and spread evenly, with jitter, over the whole.

    A plain shuffle would occasionally give a batch without any labels, whose gradients are not
    comparable to the others'.
    """
    both = (labelled, unlabelled)
    places = [(np.arange(len(rows)) + rng.random(len(rows))) / len(rows) for rows in both]
    woven: NDArray[np.int64] = np.concatenate(both)[np.argsort(np.concatenate(places))]
    return woven


class TrainingOrder:
    """The batches of an epoch, a pure function of seed and epoch.

    Each of n ranks takes every n-th sample, so that a step of all ranks has the same images as the
    larger batch of a single process; their last batches may differ in size. With `group` each takes
    every n-th batch, with a share of unlabelled images every n-th sample of either kind. All ranks get
    the same number of batches; the first ones are repeated if necessary.

    Labelled and unlabelled images are separate pools: a sample's mosaic partners come from its own
    pool, as a mixed mosaic would have boxes for only part of its area.

    epoch: 0-based, set before iterating.
    skip: number of batches to skip at the start of the epoch, seen before the run was interrupted.
    weights: (N,) sampling weights of the images, of which those of labelled ones are used, with
        replacement; None: each labelled image exactly once.
    mosaic_until: the first epoch whose samples get no mosaic partners; None: all get them.
    unlabelled_until: the first epoch in which unlabelled images have no loss and labelled ones replace
        them; None: never.
    group: groups image numbers into batches of similar aspect ratio; None: batches are not grouped.
    """

    def __init__(
        self,
        image_count: int,
        batch_size: int,
        shape_hw: tuple[int, int],
        seed: int,
        labelled: NDArray[np.bool_] | None = None,
        share: float | None = None,
    ) -> None:
        """Set what holds for all epochs.

        Args:
            image_count: number of images, N.
            batch_size: images per batch of this rank.
            shape_hw: height and width of the batches in pixels, unless `group` sets them.
            seed: seed of all randomness.
            labelled: (N,) bool, which images are labelled; None: all.
            share: fraction of each batch that is unlabelled (of each epoch, with `group`), below 1;
                None: every image comes once per epoch, both kinds spread evenly over its batches.
        """
        self.epoch = self.skip = 0
        self.weights: NDArray[np.float64] | None = None
        self.mosaic_until: int | None = None
        self.unlabelled_until: int | None = None
        self.group: Callable[[NDArray[np.int64]], RectGroups] | None = None
        known = np.ones(image_count, np.bool_) if labelled is None else labelled
        self._labelled, self._unlabelled = np.flatnonzero(known), np.flatnonzero(~known)
        assert len(self._labelled) and (not share or len(self._unlabelled))
        self._share = share
        self._batch_size, self._shape_hw, self._seed = batch_size, shape_hw, seed
        self._rank, self._ranks = rank(), world_size()

    def __len__(self) -> int:
        """The number of batches of this rank per epoch."""
        if self._is_mixed:
            return len(self._kinds())
        image_count = len(self._labelled) + self.unlabelled_per_epoch
        if self.group is not None:
            return math.ceil(math.ceil(image_count / self._batch_size) / self._ranks)
        return math.ceil(math.ceil(image_count / self._ranks) / self._batch_size)

    def __iter__(self) -> Iterator[BatchOrder]:
        """The batches of the current epoch, after the skipped ones."""
        return islice(self._whole_epoch(), self.skip, None)

    def _whole_epoch(self) -> Iterator[BatchOrder]:
        rng = np.random.default_rng((self._seed, self.epoch, _ORDER_STREAM))
        rows = self._labelled_rows(rng)
        if self._is_mixed:
            return self._mixed(rows, self._unlabelled_rows(rng), rng)
        if self.unlabelled_per_epoch:
            rows = _interleaved(rows, self._unlabelled_rows(rng), rng)
        if self.group is not None:
            return self._grouped(rows[:, 0], self.group(rows[:, 0]), rng)
        return self._plain(rows)

    @property
    def unlabelled_per_epoch(self) -> int:
        """The number of unlabelled samples per epoch, over all ranks."""
        if self._share is None:
            return len(self._unlabelled)
        if self._share == 0:
            return 0
        if self.group is not None:
            return unlabelled_of_epoch(len(self._labelled), self._share)
        return sum(unlabelled for _, unlabelled in self._kinds())

    @property
    def _is_mixed(self) -> bool:
        """Whether each batch has the unlabelled share; batches grouped by aspect ratio cannot."""
        return bool(self._share) and self.group is None

    def _kinds(self) -> list[tuple[int, int]]:
        """Return the numbers of labelled and unlabelled images of each step, over all ranks."""
        assert self._share
        return batch_compositions(len(self._labelled), self._batch_size * self._ranks, self._share)

    def _labelled_rows(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw the image and the mosaic partners of each labelled sample: (n, 8), (n, 1) without mosaics."""
        count, partners = len(self._labelled), IMAGES_PER_SAMPLE - 1
        if self.weights is None:
            own = rng.permutation(count)
            others = rng.integers(count, size=(count, partners))
        else:
            share = self.weights[self._labelled] / self.weights[self._labelled].sum()
            own = rng.choice(count, count, p=share)
            others = rng.choice(count, (count, partners), p=share)
        return self._rows(self._labelled, own, others)

    def _unlabelled_rows(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw the same for the unlabelled samples, so that all are seen before any is repeated.

        Continues where the previous epoch ended: pass after pass through the pool, each pass in an
        order of its own, which depends only on its number and the seed.
        """
        is_over = self.unlabelled_until is not None and self.epoch >= self.unlabelled_until
        numbers = self._labelled if is_over else self._unlabelled
        count, pool = self.unlabelled_per_epoch, len(numbers)
        first = self.epoch * count
        turns = range(first // pool, math.ceil((first + count) / pool))
        orders = [np.random.default_rng((self._seed, turn, _TURN_STREAM)).permutation(pool) for turn in turns]
        own = np.concatenate(orders)[first % pool :][:count]
        others = rng.integers(pool, size=(count, IMAGES_PER_SAMPLE - 1))
        return self._rows(numbers, own, others)

    def _rows(
        self, pool: NDArray[np.int64], own: NDArray[np.int64], others: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        if self.mosaic_until is not None and self.epoch >= self.mosaic_until:
            own_alone: NDArray[np.int64] = pool[own[:, None]]
            return own_alone
        rows: NDArray[np.int64] = pool[np.concatenate([own[:, None], others], 1)]
        return rows

    def _plain(self, rows: NDArray[np.int64]) -> Iterator[BatchOrder]:
        own = images_of_rank(len(rows), self._batch_size, self._rank, self._ranks)
        positions = (np.arange(own) * self._ranks + self._rank) % len(rows)
        for start in range(0, len(positions), self._batch_size):
            chosen = positions[start : start + self._batch_size]
            yield BatchOrder(self.epoch, chosen, rows[chosen], self._shape_hw)

    def _mixed(
        self, labelled: NDArray[np.int64], unlabelled: NDArray[np.int64], rng: np.random.Generator
    ) -> Iterator[BatchOrder]:
        """Yield batches with the right number of each kind per step, of which a rank takes every n-th sample.

        This spreads the kinds evenly over the ranks, however few images each gets. A rank that would have
        no sample for the last step repeats the epoch's first one.
        """
        rows = np.concatenate([labelled, unlabelled])
        known, unknown = np.arange(len(labelled)), len(labelled) + np.arange(len(unlabelled))
        for of_known, of_unknown in self._kinds():
            whole = np.concatenate([known[:of_known], unknown[:of_unknown]])
            own = whole[self._rank :: self._ranks]
            chosen = rng.permutation(own if len(own) else np.zeros(1, np.int64))
            known, unknown = known[of_known:], unknown[of_unknown:]
            yield BatchOrder(self.epoch, chosen, rows[chosen], self._shape_hw)

    def _grouped(
        self, own: NDArray[np.int64], groups: RectGroups, rng: np.random.Generator
    ) -> Iterator[BatchOrder]:
        """Yield batches of images of similar aspect ratio, in an order drawn anew each epoch."""
        turns = rng.permutation(len(groups.shapes_hw))
        turns = np.resize(turns, len(self) * self._ranks)[self._rank :: self._ranks]
        for turn in turns:
            start = turn * self._batch_size
            chosen = groups.order[start : start + self._batch_size]
            yield BatchOrder(self.epoch, chosen, own[chosen, None], groups.shapes_hw[turn])
