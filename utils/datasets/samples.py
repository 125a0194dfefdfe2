"""Assembly of whole batches: letterboxed for evaluation, augmented for training.

Images stay uint8 and channels-last in memory, as decoded and as the network needs them, so a batch is
never transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from utils.batch import Batch, Letterbox
from utils.datasets.augment import AugmentSettings, fit_letterbox, mixup_share, random_flips
from utils.datasets.colour import ColourJitter, random_jitter
from utils.datasets.geometry import Tile, Warp, random_warp, warp_canvas
from utils.datasets.images import Image, UnreadableImageError, fitting_wh, read_for_evaluation
from utils.datasets.index import DatasetIndex
from utils.datasets.mosaic import mosaic_tiles, single_tile
from utils.datasets.sampling import BatchOrder
from utils.datasets.store import ImageStore, LostImageError
from utils.datasets.targets import PlacedTile, Targets, letterbox_targets, tile_targets
from utils.errors import UserError

_SAMPLE_STREAM, _SPARE_STREAM = 1, 2
_TILES = 4
_TRIES = 20  # with half of all images lost, one sample in a million fails

Lost = tuple[tuple[str, str], ...]  # files and why they cannot be read


@dataclass(frozen=True)
class Sample:
    """One image of a batch, without its pixels.

    number: of the image, for a mosaic that of the first. letterbox: its placement, None if it was
    augmented. tiles: those visible, if it was. lost: files that could not be read.
    """

    number: int
    letterbox: Letterbox | None = None
    tiles: tuple[PlacedTile, ...] = ()
    lost: Lost = ()


@dataclass(frozen=True)
class Scene:
    """What an augmented image shows, before anything is loaded: tiles on a canvas and its warp."""

    tiles: list[Tile]
    canvas_wh: tuple[int, int]
    warp: Warp


class DetectionDataset(Dataset[Batch | UserError]):
    """Assembles whole batches: images (B, 3, H, W) uint8 RGB with their targets.

    If an image can no longer be read, the error is returned, not raised: the DataLoader would pass an
    exception on as the text of its traceback.
    """

    def __init__(self, index: DatasetIndex, image_size: int) -> None:
        self.index, self.image_size = index, image_size

    def __getitem__(self, order: BatchOrder) -> Batch | UserError:
        """The batch of an order, or the error if an image cannot be read."""
        count, (height, width) = len(order.rows), order.shape_hw
        # Unlike torch, NumPy requests huge pages, which halves the time of the first write.
        images = np.empty((count, height, width, 3), np.uint8)
        try:
            samples = [self.make_sample(order, place, images[place]) for place in range(count)]
        except UserError as error:
            return error
        own = np.array([sample.number for sample in samples], np.int64)
        return Batch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
            targets=torch.from_numpy(self.targets(samples, order.shape_hw)),
            labelled=torch.from_numpy(self.index.labelled[own]),
            paths=tuple(self.index.paths[number] for number in own),
            letterboxes=tuple(sample.letterbox for sample in samples if sample.letterbox is not None),
            lost=tuple(lost for sample in samples for lost in sample.lost),
        )

    def make_sample(self, order: BatchOrder, place: int, out: Image) -> Sample:
        """Write one letterboxed image (RGB) to `out`."""
        number = int(order.rows[place, 0])
        path, (width, height) = self.index.paths[number], self.index.sizes_wh[number]
        new_wh = fitting_wh(int(width), int(height), self.image_size, order.shape_hw)
        try:
            image = read_for_evaluation(path, new_wh)
        except UnreadableImageError as error:
            # No replacement: metrics over fewer images would not be comparable.
            raise LostImageError(number, path, str(error)) from error
        return Sample(number, fit_letterbox(image, (int(height), int(width)), out))

    def targets(self, samples: Sequence[Sample], out_hw: tuple[int, int]) -> Targets:
        """Return the targets (M, 6) of a batch."""
        numbers = [sample.number for sample in samples]
        boxes = [sample.letterbox for sample in samples if sample.letterbox is not None]
        return letterbox_targets([self.index.labels[number] for number in numbers], boxes, out_hw)


class AugmentedDataset(DetectionDataset):
    """Assembles augmented batches for training, from mosaics or single images."""

    def __init__(self, index: DatasetIndex, store: ImageStore, augment: AugmentSettings, seed: int) -> None:
        super().__init__(index, store.image_size)
        self.store, self.augment, self.seed = store, augment, seed

    def make_sample(self, order: BatchOrder, place: int, out: Image) -> Sample:
        """Write one augmented image (RGB) to `out`, replacing source images that cannot be read.

        Raises:
            UserError: if several replacements cannot be read either.
        """
        position, row = int(order.positions[place]), order.rows[place].copy()
        lost: list[LostImageError] = []
        while True:
            rng = np.random.default_rng((self.seed, order.epoch, position, _SAMPLE_STREAM))
            try:
                tiles = self._draw(row, place, out, rng)
                break
            except LostImageError as error:
                lost.append(error)
            spare_rng = np.random.default_rng((self.seed, order.epoch, position, _SPARE_STREAM, len(lost)))
            row[row == lost[-1].number] = self._spare(lost, spare_rng)
        return Sample(int(row[0]), None, tiles, tuple((error.path, error.reason) for error in lost))

    def targets(self, samples: Sequence[Sample], out_hw: tuple[int, int]) -> Targets:
        """Return the targets (M, 6) of a batch."""
        return tile_targets([tile for sample in samples for tile in sample.tiles], self.index.labels, out_hw)

    def _spare(self, lost: Sequence[LostImageError], rng: np.random.Generator) -> int:
        """Draw a replacement for the last lost image, labelled if that was, from those not lost."""
        latest, labelled = lost[-1], self.index.labelled
        gone = [error.number for error in lost]
        pool = np.setdiff1d(np.flatnonzero(labelled == labelled[latest.number]), gone)
        if not len(pool) or len(lost) >= _TRIES:
            raise UserError(
                f"cannot be read any longer ({latest.reason}), and neither can any of {len(lost)} tried",
                latest.path,
                "see whether the disk is still there, then go on with --resume",
            )
        return int(rng.choice(pool))

    def _draw(
        self, row: NDArray[np.int64], place: int, out: Image, rng: np.random.Generator
    ) -> tuple[PlacedTile, ...]:
        """Write an image with everything random to `out`; returns its tiles.

        Everything is drawn before anything is loaded, so that each tile is handled only once.
        """
        out_hw, second, share = (out.shape[0], out.shape[1]), None, 1.0
        if len(row) > 1 and rng.random() < self.augment.mosaic:
            first = self._mosaic(row[:_TILES], out_hw, rng)
            if rng.random() < self.augment.mixup:
                second, share = self._mosaic(row[_TILES:], out_hw, rng), mixup_share(rng)
        else:
            first = self._single(row[0], out_hw, rng)
        flips, colour = random_flips(self.augment, rng), random_jitter(self.augment.hsv, rng)
        if second is None:
            return self._paint(first, flips, colour, place, out)
        other = np.empty_like(out)
        tiles = self._paint(first, flips, None, place, out)
        tiles += self._paint(second, flips, None, place, other)
        # Not before mixing, which would give other colours.
        cv2.addWeighted(out, share, other, 1 - share, 0.0, dst=out)
        colour.paint(out)
        return tiles

    def _paint(  # noqa: PLR0913 - a step of _draw
        self, scene: Scene, flips: tuple[bool, bool], colour: ColourJitter | None, place: int, out: Image
    ) -> tuple[PlacedTile, ...]:
        warp = replace(scene.warp, flips=flips)
        shown = warp_canvas(scene.tiles, warp, out, self.store.load, colour)
        return tuple(PlacedTile(place, tile, scene.canvas_wh, matrix, warp.scale) for tile, matrix in shown)

    def _single(self, number: np.int64, out_hw: tuple[int, int], rng: np.random.Generator) -> Scene:
        out_wh = (out_hw[1], out_hw[0])
        warp = random_warp(self.augment.warp, out_wh, out_wh, rng)
        width, height = self.store.wh[number].tolist()
        return Scene([single_tile(int(number), (width, height), out_wh)], out_wh, warp)

    def _mosaic(self, numbers: NDArray[np.int64], out_hw: tuple[int, int], rng: np.random.Generator) -> Scene:
        chosen = rng.permutation(numbers)
        sizes = [(width, height) for width, height in self.store.wh[chosen].tolist()]
        tiles = mosaic_tiles(chosen.tolist(), sizes, self.image_size, rng)
        canvas_wh = (2 * self.image_size, 2 * self.image_size)
        return Scene(tiles, canvas_wh, random_warp(self.augment.warp, canvas_wh, (out_hw[1], out_hw[0]), rng))
