"""The conventional way to make training samples, for comparison: `benchmarks.loader` times it."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from utils.batch import FILL
from utils.datasets.augment import AugmentSettings
from utils.datasets.geometry import random_warp
from utils.datasets.images import Image, scaled_wh
from utils.datasets.index import DatasetIndex
from utils.datasets.mosaic import mosaic_tiles


class ConventionalLoader:
    """Makes batches of mosaics on a canvas of twice the image size, all of which is warped; no boxes."""

    def __init__(
        self,
        index: DatasetIndex,
        image_size: int,
        augment: AugmentSettings,
        images: list[Image] | None,
        batch_size: int,
    ) -> None:
        """`images` are scaled, in the order of the index; None: they are read from files."""
        self.index, self.size, self.augment, self.images = index, image_size, augment, images
        self.batch_size, self.rng = batch_size, np.random.default_rng(0)

    def __call__(self) -> torch.Tensor:
        """Make the next batch (B, 3, H, W), RGB."""
        return torch.stack([self._sample() for _ in range(self.batch_size)])

    def _sample(self) -> torch.Tensor:
        wh, side = (self.size, self.size), 2 * self.size
        warp = random_warp(self.augment.warp, (side, side), wh, self.rng)
        warped = cv2.warpAffine(self._canvas(side), warp.matrix[:2], wh, borderValue=(FILL,) * 3)
        image = np.asarray(warped, np.uint8)
        self._recolour(image)
        if self.rng.random() < self.augment.fliplr:
            image = np.fliplr(image)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)[::-1]))

    def _canvas(self, side: int) -> Image:
        canvas = np.full((side, side, 3), FILL, np.uint8)
        numbers = self.rng.integers(len(self.index), size=4).tolist()
        images = [self._load(number) for number in numbers]
        sizes = [(image.shape[1], image.shape[0]) for image in images]
        for image, tile in zip(images, mosaic_tiles(numbers, sizes, self.size, self.rng), strict=True):
            (left, top), (x1, y1, x2, y2) = tile.origin_xy, tile.span_xyxy
            canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
        return canvas

    def _load(self, number: int) -> Image:
        if self.images is not None:
            return self.images[number]
        image = np.asarray(cv2.imread(self.index.paths[number]), np.uint8)
        wh = scaled_wh(image.shape[1], image.shape[0], self.size)
        return image if image.shape[1::-1] == wh else np.asarray(cv2.resize(image, wh), np.uint8)

    def _recolour(self, image: Image) -> None:
        hue, *others = 1 + self.rng.uniform(-1, 1, 3) * self.augment.hsv
        levels = np.arange(256)
        tables = [levels * hue % 180, *((levels * factor).clip(0, 255) for factor in others)]
        channels = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))
        changed = [
            cv2.LUT(channel, table.astype(np.uint8)) for channel, table in zip(channels, tables, strict=True)
        ]
        cv2.cvtColor(cv2.merge(changed), cv2.COLOR_HSV2BGR, dst=image)
