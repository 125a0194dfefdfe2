"""Training samples, one process: `python -m benchmarks.loader --data data/bccd.yaml`.

The yardstick is reading four images of the same set with OpenCV and resizing them, which is what a mosaic
needs at least where it comes from files. How much else costs relative to that depends on the processor, so
the conventional way to make a sample is timed as well: a canvas of twice the size, one warp of all of it, a
table for each colour channel, a transposed copy. Counted is time on the processor, so that other processes
have no part.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.conventional import ConventionalLoader
from benchmarks.measure import load, medians, ms, parser, table
from utils.config.dataset import load_dataset_config
from utils.config.hyperparameters import Hyperparameters
from utils.datasets.images import scaled_wh
from utils.datasets.index import DatasetIndex, build_index
from utils.datasets.loader import AugmentSettings, TrainLoader, train_loader

SAMPLES = 16  # per timed round


def yardstick(index: DatasetIndex, size: int) -> Callable[[], None]:
    """Return a function that reads and resizes four images for each sample."""
    numbers = itertools.cycle(np.random.default_rng(0).permutation(len(index)).tolist())

    def run() -> None:
        for number in itertools.islice(numbers, 4 * SAMPLES):
            image = cv2.imread(index.paths[number])
            assert image is not None
            cv2.resize(image, scaled_wh(image.shape[1], image.shape[0], size))

    return run


def samples(loader: TrainLoader) -> Callable[[], object]:
    """Return a function that makes the next batch of mosaics, across epochs."""

    def forever() -> Iterator[object]:
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            # The last batch of an epoch may be smaller.
            yield from itertools.islice(loader, len(loader) - 1)

    batches = forever()
    return lambda: next(batches)


def main() -> None:
    options = parser(__doc__, rounds=30, device=False)
    options.add_argument("--data", default="data/bccd.yaml", type=Path)
    options.add_argument("--split", default="train")
    options.add_argument("--img", type=int, nargs="+", default=[320, 640])
    given = options.parse_args()
    index = build_index(load_dataset_config(given.data), given.split)
    hyp, sizes = Hyperparameters(), [int(value) for value in index.sizes_wh.mean(0)]
    counted = f"{given.rounds} x {SAMPLES} samples"
    print(f"{len(index)} images of {sizes[0]} x {sizes[1]} px on average, {counted}, {load()}")
    augment = AugmentSettings.of(hyp)
    rows = []
    for size in given.img:
        work: dict[str, Callable[[], object]] = {"yardstick": yardstick(index, size)}
        for cache in (None, "ram"):
            loader = train_loader(
                index, image_size=size, batch_size=SAMPLES, augment=augment, workers=0, seed=0, cache=cache
            )
            kind = "memory" if cache else "files"
            work[kind] = samples(loader)
            store = loader.dataset.store
            images = [store.load(number) for number in range(len(index))] if cache else None
            work[f"conventional {kind}"] = ConventionalLoader(index, size, augment, images, SAMPLES)
        times = medians(work, given.rounds, torch.device("cpu"), clock=time.thread_time)
        for name in ("files", "memory"):
            row = [f"{size} px, from {name}", ms(times[name] / SAMPLES)]
            for other in ("yardstick", f"conventional {name}"):
                row += [ms(times[other] / SAMPLES), f"{times[name] / times[other]:.2f}"]
            rows.append(row)
    head = ["a mosaic sample", "median", "yardstick", "ratio", "conventional", "ratio to that"]
    table(head, rows)


if __name__ == "__main__":
    main()
