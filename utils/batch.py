"""The values that travel between loader, model, losses and loop.

Shapes: B images, C channels, H W pixels or cells, A anchors a cell, K classes, M targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.streams import copied_on_side_stream

FILL = 114  # of 255: the grey around images in letterboxes and mosaics


@dataclass(frozen=True)
class Letterbox:
    """How an image was scaled and padded into its place in a batch.

    `original_hw` is the file's size in pixels, `scale` the factors (height, width) that were
    applied, `pad` the left-out border (top, left) in pixels of the batch image.
    """

    original_hw: tuple[int, int]
    scale: tuple[float, float]
    pad: tuple[float, float]


@dataclass(frozen=True)
class Batch:
    """Images with their ground truth, which stays in main memory: what is where is decided there.

    images: (B, 3, H, W), RGB; uint8 0..255 from the loader, float 0..1 after `to_float`.
    targets: (M, 6) float32: image index in the batch, class, then centre x, centre y, width,
        height, normalised to the batch image.
    labelled: (B,) bool: False where nobody labelled the image (its ground truth is unknown,
        not empty).
    paths: the B files (the first of the four for a mosaic).
    letterboxes: B entries when the images were letterboxed (evaluation), empty otherwise.
    lost: files that could be read at the start and no longer, each with the reason; others are in
        their place.
    """

    images: Tensor
    targets: Tensor
    labelled: Tensor
    paths: tuple[str, ...] = ()
    letterboxes: tuple[Letterbox, ...] = ()
    lost: tuple[tuple[str, str], ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The batch with its images on another device; the copy overlaps with computation where it can."""
        return replace(self, images=copied_on_side_stream(self.images, device))

    def pin_memory(self) -> Batch:
        """The batch with its images in page-locked memory, whose copies to a GPU overlap with its work."""
        return replace(self, images=self.images.pin_memory())

    def to_float(self, dtype: torch.dtype = torch.float32) -> Batch:
        """The batch with images scaled to 0..1, in channels-last memory order."""
        if self.images.is_floating_point():
            return self
        images = self.images.to(dtype, memory_format=torch.channels_last).div_(255)
        return replace(self, images=images)


@dataclass(frozen=True)
class StudentOutput:
    """One forward pass of the network in training.

    features: the inputs of the Detect layer, a (B, C_l, H_l, W_l) tensor a level.
    levels: its raw outputs, a (B, A, H_l, W_l, 5 + K) tensor a level: x, y, w, h, objectness,
        classes, all logits.
    """

    features: tuple[Tensor, ...]
    levels: tuple[Tensor, ...]


@dataclass(frozen=True)
class Progress:
    """Where in the run a step stands; schedules are pure functions of it.

    step: batches since the start of the run (0-based); epoch: 0-based.
    """

    step: int
    epoch: int
    steps_per_epoch: int
    epochs: int

    def warmed(self, warmup_epochs: float, least: int = 100) -> float:
        """How much of a warm-up of so many epochs (at `least` so many steps) is done, 0..1; 1 without one."""
        if warmup_epochs <= 0:
            return 1.0
        return min(self.step / max(round(warmup_epochs * self.steps_per_epoch), least), 1.0)
