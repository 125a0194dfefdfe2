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

from benchmarks.measure import load, medians, ms, parser, table
from utils.batch import FILL
from utils.config.dataset import load_dataset_config
from utils.config.hyperparameters import Hyperparameters
from utils.datasets.geometry import random_warp
from utils.datasets.images import Image, scaled_wh
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


def conventional(
    index: DatasetIndex, size: int, augment: AugmentSettings, images: list[Image] | None
) -> Callable[[], None]:
    """Return a function that makes mosaics the conventional way, without their boxes.

    images: scaled, of all numbers; None: read from files.
    """
    rng = np.random.default_rng(0)

    def load(number: int) -> Image:
        if images is not None:
            return images[number]
        image = np.asarray(cv2.imread(index.paths[number]), np.uint8)
        wh = scaled_wh(image.shape[1], image.shape[0], size)
        return image if image.shape[1::-1] == wh else np.asarray(cv2.resize(image, wh), np.uint8)

    def canvas() -> Image:
        whole = np.full((2 * size, 2 * size, 3), FILL, np.uint8)
        numbers, (x, y) = rng.integers(len(index), size=4), rng.uniform(size / 2, 1.5 * size, 2).astype(int)
        for place, image in enumerate(load(int(number)) for number in numbers):
            height, width = image.shape[:2]
            across, down = (
                min(width, 2 * size - x if place % 2 else x),
                min(height, 2 * size - y if place > 1 else y),
            )
            rows = (
                (slice(y, y + down), slice(0, down))
                if place > 1
                else (slice(y - down, y), slice(-down, None))
            )
            columns = (
                (slice(x, x + across), slice(0, across))
                if place % 2
                else (slice(x - across, x), slice(-across, None))
            )
            whole[rows[0], columns[0]] = image[rows[1], columns[1]]
        return whole

    def recolour(image: Image) -> None:
        factors = 1 + rng.uniform(-1, 1, 3) * augment.hsv
        levels = np.arange(256)
        tables = [levels * factors[0] % 180, *((levels * factor).clip(0, 255) for factor in factors[1:])]
        channels = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))
        parts = [
            cv2.LUT(channel, table.astype(np.uint8)) for channel, table in zip(channels, tables, strict=True)
        ]
        cv2.cvtColor(cv2.merge(parts), cv2.COLOR_HSV2BGR, dst=image)

    def run() -> None:
        batch = []
        for _ in range(SAMPLES):
            warp = random_warp(augment.warp, (2 * size, 2 * size), (size, size), rng)
            image = np.asarray(
                cv2.warpAffine(canvas(), warp.matrix[:2], (size, size), borderValue=(FILL,) * 3), np.uint8
            )
            recolour(image)
            if rng.random() < augment.fliplr:
                image = np.fliplr(image)
            batch.append(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)[::-1])))
        torch.stack(batch)

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
    augment = AugmentSettings(**{name: getattr(hyp, name) for name in AugmentSettings.__dataclass_fields__})
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
            images = [np.array(store.load(number)) for number in range(len(index))] if cache else None
            work[f"conventional {kind}"] = conventional(index, size, augment, images)
        times = medians(work, given.rounds, torch.device("cpu"), clock=time.thread_time)
        for name in ("files", "memory"):
            each = (ms(times[kind] / SAMPLES) for kind in (name, "yardstick", f"conventional {name}"))
            shares = (times[name] / times[kind] for kind in ("yardstick", f"conventional {name}"))
            mine, yard, usual = each
            of_yardstick, of_usual = (f"{share:.2f}" for share in shares)
            rows.append([f"{size} px, from {name}", mine, yard, of_yardstick, usual, of_usual])
    head = ["a mosaic sample", "median", "yardstick", "ratio", "conventional", "ratio to that"]
    table(head, rows)


if __name__ == "__main__":
    main()
