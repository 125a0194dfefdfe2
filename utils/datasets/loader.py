"""Batches for training and for evaluation.

Images stay uint8 and channels-last in memory, as decoded and as the network needs them, so a batch is
never transposed.
"""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.batch import Batch, Letterbox
from utils.datasets.augment import AugmentSettings, fit_letterbox, flip, jitter_colour, mix
from utils.datasets.geometry import Boxes, random_warp, warp_canvas
from utils.datasets.images import Image, UnreadableImageError, fitting_wh, read_for_evaluation
from utils.datasets.index import DatasetIndex
from utils.datasets.labels import Labels
from utils.datasets.mosaic import ImageInfo, mosaic_tiles, normalise_boxes, place_boxes, single_tile
from utils.datasets.sampling import BatchOrder, TrainingOrder, rect_groups
from utils.datasets.store import CacheKind, ImageStore, LostImageError
from utils.datasets.workers import is_worker_death, outlive_signals, usable_cpus, without_sigchld_handler
from utils.device import dead_worker
from utils.distributed import processes_here, rank, world_size
from utils.errors import UserError
from utils.reporting.console import warning

__all__ = [
    "AugmentSettings",
    "BatchLoader",
    "DetectionDataset",
    "TrainLoader",
    "eval_loader",
    "fit_letterbox",
    "train_loader",
]

_SAMPLE_STREAM, _SPARE_STREAM = 1, 2
_TILES = 4
_TRIES = 20  # with half of all images lost, one sample in a million fails

Lost = tuple[tuple[str, str], ...]  # files and why they cannot be read


@dataclass(frozen=True)
class Sample:
    """One image of a batch, without its pixels.

    number: of the image, for a mosaic that of the first. labels: (n, 5), normalised to the batch image.
    letterbox: its placement, None if it was augmented. lost: files that could not be read.
    """

    number: int
    labels: Labels
    letterbox: Letterbox | None = None
    lost: Lost = ()


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
        targets = [np.zeros((0, 6), np.float32)]
        for place, sample in enumerate(samples):
            column = np.full((len(sample.labels), 1), place, np.float32)
            targets.append(np.concatenate([column, sample.labels], 1))
        own = np.array([sample.number for sample in samples], np.int64)
        return Batch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
            targets=torch.from_numpy(np.concatenate(targets)),
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
        used = fit_letterbox(image, (int(height), int(width)), out)
        shown_wh = (round(used.scale[1] * width), round(used.scale[0] * height))
        boxes = place_boxes(self.index.labels[number], shown_wh, (int(used.pad[1]), int(used.pad[0])))
        return Sample(number, normalise_boxes(boxes, out.shape[1::-1]), used)


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
                image, boxes = self._augmented(row, out.shape[:2], rng)
                break
            except LostImageError as error:
                lost.append(error)
            spare_rng = np.random.default_rng((self.seed, order.epoch, position, _SPARE_STREAM, len(lost)))
            row[row == lost[-1].number] = self._spare(lost, spare_rng)
        boxes = flip(image, boxes, self.augment, rng)
        jitter_colour(image, self.augment, rng, out)
        labels = normalise_boxes(boxes, out.shape[1::-1])
        return Sample(int(row[0]), labels, lost=tuple((error.path, error.reason) for error in lost))

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

    def _augmented(
        self, row: NDArray[np.int64], out_hw: tuple[int, int], rng: np.random.Generator
    ) -> tuple[Image, Boxes]:
        if len(row) > 1 and rng.random() < self.augment.mosaic:
            sample = self._mosaic(row[:_TILES], out_hw, rng)
            if rng.random() < self.augment.mixup:
                sample = mix(sample, self._mosaic(row[_TILES:], out_hw, rng), rng)
            return sample
        out_wh = (out_hw[1], out_hw[0])
        warp = random_warp(self.augment.warp, out_wh, out_wh, rng)
        return warp_canvas([single_tile(self._picture(row[0]), out_wh)], warp, out_hw, self.store.load)

    def _mosaic(
        self, numbers: NDArray[np.int64], out_hw: tuple[int, int], rng: np.random.Generator
    ) -> tuple[Image, Boxes]:
        pictures = [self._picture(number) for number in rng.permutation(numbers)]
        tiles = mosaic_tiles(pictures, self.image_size, rng)
        canvas_wh = (2 * self.image_size, 2 * self.image_size)
        warp = random_warp(self.augment.warp, canvas_wh, (out_hw[1], out_hw[0]), rng)
        return warp_canvas(tiles, warp, out_hw, self.store.load)

    def _picture(self, number: np.int64) -> ImageInfo:
        width, height = self.store.wh[number]
        return ImageInfo(int(number), (int(width), int(height)), self.index.labels[int(number)])


class BatchLoader(DataLoader[Any]):
    """A DataLoader of batches that re-raises a worker's UserError and warns about lost images.

    known_lost: files that can no longer be read; each is reported once.
    """

    known_lost: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # the base promises a class of its own
        """Yield the batches in order.

        Raises:
            UserError: if an image can no longer be read, or a worker process has died.
        """
        with warnings.catch_warnings():
            # Python warns about forking a multi-threaded process. These workers decode and resize with
            # OpenCV's threads off and compute nothing with torch, so they never wait for a lock held by
            # a thread that does not exist in them.
            warnings.filterwarnings("ignore", ".*fork.* may lead to deadlocks", DeprecationWarning)
            with without_sigchld_handler():
                batches = super().__iter__()
        for batch in self._received(batches):
            if isinstance(batch, UserError):
                # A copy: through its traceback the received one would keep itself and this loader alive,
                # whose workers would then end only after a timeout.
                raise UserError(batch.what, batch.where, batch.fix)
            self._tell(batch.lost)
            yield batch

    def _received(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except (EOFError, OSError, RuntimeError) as error:
            if not self.num_workers or not is_worker_death(error):
                raise
            raise dead_worker(error) from error

    def _tell(self, lost: Lost) -> None:
        for path, reason in lost:
            if path not in self.known_lost:
                self.known_lost |= {path}
                # Printed by every rank that meets one, unlike console output.
                count = f"{len(self.known_lost)} lost so far"
                warning(f"{path}: cannot be read any longer ({reason}), others take its place; {count}")


class TrainLoader:
    """Training batches; call `set_epoch` before each epoch.

    Order and augmentation are a pure function of (seed, epoch, position in the epoch), independent of
    the number of workers.
    """

    def __init__(self, dataset: AugmentedDataset, order: TrainingOrder, workers: int) -> None:
        self.dataset, self._order = dataset, order
        self._batches = _batch_loader(dataset, order, workers)

    @property
    def notes(self) -> list[str]:
        """Sentences for the console about what was cached and what was not."""
        return self.dataset.store.notes

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the current epoch."""
        return iter(self._batches)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Set the epoch, 0-based, of the next iteration, which leaves out its first `skip` batches."""
        self._order.epoch, self._order.skip = epoch, skip

    def set_image_weights(self, class_weights: NDArray[np.float64] | Tensor) -> None:
        """Sample images with replacement, in proportion to the sum of their labels' class weights (K,).

        If no label has a weight, each image comes once, as without weights. The sampling of unlabelled
        images does not change.
        """
        weights = np.asarray(class_weights, np.float64)
        of_images = self.dataset.index.image_weights(weights)
        self._order.weights = of_images if of_images.any() else None


def train_loader(  # noqa: PLR0913 - one parameter per option
    index: DatasetIndex,
    *,
    image_size: int,
    batch_size: int,
    augment: AugmentSettings,
    workers: int,
    seed: int,
    stride: int = 32,
    rect: bool = False,
    cache: CacheKind | None = None,
    mosaic_until: int | None = None,
    unlabelled_until: int | None = None,
    image_weights: NDArray[np.float64] | None = None,
    unlabelled_share: float | None = None,
) -> TrainLoader:
    """Return the loader of a training split.

    Args:
        index: images and labels.
        image_size: side of the square batches, pixels; with `rect` the longer side.
        batch_size: images per batch of this rank.
        augment: augmentation strengths.
        workers: worker processes; 0 loads in this process.
        seed: seed of all randomness.
        stride: multiple that the sides of a `rect` batch are rounded up to.
        rect: batches of images of similar aspect ratio, with little padding and no mosaic.
        cache: keep scaled images in memory or in the user's cache folder.
        mosaic_until: the first epoch without mosaics; None uses them in all.
        unlabelled_until: the first epoch without unlabelled images, see `TrainingOrder`.
        image_weights: class weights (K,) to sample images by, see `TrainLoader.set_image_weights`.
        unlabelled_share: fraction of each batch that is unlabelled, see `TrainingOrder`.
    """
    store = ImageStore(index, image_size)
    if cache == "ram":
        store.keep_in_memory()
    elif cache == "disk":
        store.keep_on_disk()
    shape_hw = (image_size, image_size)
    order = TrainingOrder(len(index), batch_size, shape_hw, seed, index.labelled, unlabelled_share)
    order.mosaic_until, order.unlabelled_until = mosaic_until, unlabelled_until
    if rect:
        order.group = lambda numbers: rect_groups(
            index.sizes_wh[numbers], batch_size, image_size, stride, pad=0.0
        )
    loader = TrainLoader(AugmentedDataset(index, store, augment, seed), order, workers)
    if image_weights is not None:
        loader.set_image_weights(image_weights)
    return loader


def eval_loader(
    index: DatasetIndex,
    *,
    image_size: int | tuple[int, int],
    batch_size: int,
    workers: int,
    stride: int = 32,
    rect: bool = True,
    pad: float = 0.5,
) -> BatchLoader:
    """Return letterboxed batches of a split, each image once, deterministically.

    With `rect` images are ordered by aspect ratio, else they come in index order in squares of
    `image_size` rounded up to a multiple of `stride`. A pair (height, width) sets the shape of all batches,
    overriding `rect` and `stride`. With several ranks each gets every n-th batch.
    """
    if isinstance(image_size, tuple):
        order, shapes = np.arange(len(index)), [image_size] * -(-len(index) // batch_size)
        image_size = max(image_size)
    elif rect:
        groups = rect_groups(index.sizes_wh, batch_size, image_size, stride, pad)
        order, shapes = groups.order, groups.shapes_hw
    else:
        side = -(-image_size // stride) * stride
        order = np.arange(len(index))
        shapes = [(side, side)] * -(-len(index) // batch_size)
    orders = []
    for number, shape_hw in enumerate(shapes):
        positions = np.arange(number * batch_size, min((number + 1) * batch_size, len(index)))
        orders.append(BatchOrder(0, positions, order[positions, None], shape_hw))
    return _batch_loader(DetectionDataset(index, image_size), orders[rank() :: world_size()], workers)


def _batch_loader(
    dataset: DetectionDataset, orders: Sequence[BatchOrder] | TrainingOrder, workers: int
) -> BatchLoader:
    # The ranks on a machine share its cores.
    count = max(min(workers, max(usable_cpus() // processes_here(), 1), len(orders)), 0)
    return BatchLoader(
        dataset,
        sampler=orders,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=count,
        persistent_workers=count > 0,
        worker_init_fn=outlive_signals if count else None,
        # A DataLoader draws a base seed, which these workers do not use. A separate generator keeps that
        # from advancing torch's global state, which would depend on how often a run was interrupted.
        generator=torch.Generator(),
        # Only if the run uses a GPU: on a CPU run pinning would initialise CUDA needlessly.
        pin_memory=torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]
        # Forked workers share the index and the caches; outside of Linux forking is unsafe.
        multiprocessing_context=multiprocessing.get_context("fork")
        if count and sys.platform == "linux"
        else None,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
