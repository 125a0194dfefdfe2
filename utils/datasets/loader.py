"""The data loaders of training and of evaluation, and their worker processes."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from utils.batch import Batch
from utils.datasets.augment import AugmentSettings
from utils.datasets.index import DatasetIndex
from utils.datasets.samples import AugmentedDataset, DetectionDataset, Lost
from utils.datasets.sampling import BatchOrder, TrainingOrder, rect_groups
from utils.datasets.store import CacheKind, ImageStore
from utils.datasets.workers import is_worker_death, outlive_signals, usable_cpus, without_sigchld_handler
from utils.device import dead_worker
from utils.distributed import processes_here, rank, world_size
from utils.errors import UserError
from utils.reporting.console import warning

__all__ = ["AugmentSettings", "BatchLoader", "TrainLoader", "eval_loader", "train_loader"]

_EVALUATION_PAD = 0.5  # strides by which shapes exceed the images; published scores have this border


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
    return TrainLoader(AugmentedDataset(index, store, augment, seed), order, workers)


def eval_loader(
    index: DatasetIndex,
    *,
    image_size: int | tuple[int, int],
    batch_size: int,
    workers: int,
    stride: int = 32,
    rect: bool = True,
    group_size: int | None = None,
) -> BatchLoader:
    """Return letterboxed batches of a split, each image once, deterministically.

    With `rect` images are ordered by aspect ratio, else they come in index order in squares of
    `image_size` rounded up to a multiple of `stride`. A pair (height, width) sets the shape of all batches,
    overriding `rect` and `stride`. With several ranks each gets every n-th batch. group_size: the number of
    images that share a shape, and so have the same scores in batches of any size; None: those of a batch.
    """
    together = group_size or batch_size
    count = -(-len(index) // together)
    if isinstance(image_size, tuple):
        order, shapes = np.arange(len(index)), [image_size] * count
        image_size = max(image_size)
    elif rect:
        groups = rect_groups(index.sizes_wh, together, image_size, stride, _EVALUATION_PAD)
        order, shapes = groups.order, groups.shapes_hw
    else:
        side = -(-image_size // stride) * stride
        order, shapes = np.arange(len(index)), [(side, side)] * count
    orders = []
    for number, shape_hw in enumerate(shapes):
        stop = min((number + 1) * together, len(index))
        for first in range(number * together, stop, batch_size):
            positions = np.arange(first, min(first + batch_size, stop))
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
