"""Which pictures make up each batch: decided in the main process, before any worker is asked.

A worker gets the complete order of a batch, so that what it makes does not hang on which
worker it is, how many there are, or what it made before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.distributed import rank, world_size

PICTURES_PER_SAMPLE = 8
_ORDER_STREAM = 0


@dataclass(frozen=True)
class BatchOrder:
    """What one batch is to be made of.

    rows: (B, 8) picture numbers: a sample's own, its three partners in a mosaic, and the four of
        the mosaic that may be mixed in. Without augmentation (B, 1).
    positions: (B,) places of the samples in the epoch; together with seed and epoch they
        determine every random choice.
    shape_hw: height and width of the batch in pixels.
    """

    epoch: int
    positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    shape_hw: tuple[int, int]


@dataclass(frozen=True)
class RectGroups:
    """Pictures in the order of their aspect, cut into batches of a common shape.

    order: (N,) places in the array that was grouped; shapes_hw: of each batch, pixels.
    """

    order: NDArray[np.int64]
    shapes_hw: list[tuple[int, int]]


def rect_groups(
    sizes_wh: NDArray[np.int64], batch_size: int, image_size: int, stride: int, pad: float
) -> RectGroups:
    """Batches whose shape fits their pictures with little padding.

    The longer side of a batch is `image_size`, the other the largest that a picture of the batch
    needs; both get `pad` strides on top and are rounded up to a multiple of `stride`.
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


class TrainingOrder:
    """The batches of one epoch after another, a pure function of seed and epoch.

    Under several ranks each takes every n-th sample (every n-th batch with `group`); all get the
    same number of batches, the first samples are repeated where the number does not divide.

    epoch: 0-based, to be set before an iteration.
    weights: (N,) how often a picture is drawn, with repetition; None: each exactly once.
    mosaic_until: the first epoch whose samples get no partners for a mosaic; None: all get them.
    group: puts picture numbers into batches of similar aspect; None: any picture with any other.
    """

    def __init__(self, pictures: int, batch_size: int, shape_hw: tuple[int, int], seed: int) -> None:
        self.epoch = 0
        self.weights: NDArray[np.float64] | None = None
        self.mosaic_until: int | None = None
        self.group: Callable[[NDArray[np.int64]], RectGroups] | None = None
        self._pictures, self._batch_size = pictures, batch_size
        self._shape_hw, self._seed = shape_hw, seed
        self._rank, self._ranks = rank(), world_size()

    def __len__(self) -> int:
        """The number of batches this rank gets in an epoch."""
        share = math.ceil(self._pictures / self._ranks)
        if self.group is not None:
            return math.ceil(math.ceil(self._pictures / self._batch_size) / self._ranks)
        return math.ceil(share / self._batch_size)

    def __iter__(self) -> Iterator[BatchOrder]:
        """The batches of the epoch that is set."""
        rng = np.random.default_rng((self._seed, self.epoch, _ORDER_STREAM))
        rows = self._draw_rows(rng)
        if self.group is not None:
            return self._grouped(rows[:, 0], self.group(rows[:, 0]), rng)
        return self._plain(rows)

    def _draw_rows(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """The own picture and the partners of each sample of the epoch (N, 8), (N, 1) without mosaics."""
        count, partners = self._pictures, PICTURES_PER_SAMPLE - 1
        if self.weights is None:
            own = rng.permutation(count)
            others = rng.integers(count, size=(count, partners))
        else:
            share = self.weights / self.weights.sum()
            own = rng.choice(count, count, p=share)
            others = rng.choice(count, (count, partners), p=share)
        if self.mosaic_until is not None and self.epoch >= self.mosaic_until:
            return np.asarray(own[:, None])
        return np.concatenate([own[:, None], others], 1)

    def _plain(self, rows: NDArray[np.int64]) -> Iterator[BatchOrder]:
        share = math.ceil(len(rows) / self._ranks)
        positions = np.arange(share * self._ranks).reshape(-1, self._ranks)[:, self._rank] % len(rows)
        for start in range(0, share, self._batch_size):
            chosen = positions[start : start + self._batch_size]
            yield BatchOrder(self.epoch, chosen, rows[chosen], self._shape_hw)

    def _grouped(
        self, own: NDArray[np.int64], groups: RectGroups, rng: np.random.Generator
    ) -> Iterator[BatchOrder]:
        """Pictures of one aspect stay together; the order of the batches is drawn anew each epoch."""
        turns = rng.permutation(len(groups.shapes_hw))
        turns = np.resize(turns, len(self) * self._ranks)[self._rank :: self._ranks]
        for turn in turns:
            start = turn * self._batch_size
            chosen = groups.order[start : start + self._batch_size]
            yield BatchOrder(self.epoch, chosen, own[chosen, None], groups.shapes_hw[turn])
