"""The data passed between loader, model, losses and training loop.

Shapes: B images, C channels, H W pixels or cells, A anchors per cell, K classes, M targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.streams import copied_on_side_stream

FILL = 114  # of 255: the grey around images in letterboxes and mosaics


@dataclass(frozen=True)
class Letterbox:
    """How an image was scaled and padded to the size of its batch.

    `original_hw` is the file's size in pixels, `scale` the factors (height, width) that were
    applied, `pad` the border (top, left) in pixels of the batch image.
    """

    original_hw: tuple[int, int]
    scale: tuple[float, float]
    pad: tuple[float, float]


@dataclass(frozen=True)
class Batch:
    """Images with their ground truth, which stays in CPU memory, where targets are assigned.

    images: (B, 3, H, W), RGB; uint8 0..255 from the loader, float 0..1 after `to_float`.
    targets: (M, 6) float32: image index in the batch, class, then centre x, centre y, width,
        height, normalised to the batch image.
    labelled: (B,) bool: False for an image without annotation (its ground truth is unknown, not empty).
    paths: the B files (the first of the four for a mosaic).
    letterboxes: B entries if the images were letterboxed (evaluation), else empty.
    lost: files that were readable at the start and no longer are, each with the reason; other images
        take their place.
    """

    images: Tensor
    targets: Tensor
    labelled: Tensor
    paths: tuple[str, ...] = ()
    letterboxes: tuple[Letterbox, ...] = ()
    lost: tuple[tuple[str, str], ...] = ()

    def to(self, device: torch.device) -> Batch:
        """Move the images to a device; from pinned memory to a GPU the copy overlaps with computation."""
        return replace(self, images=copied_on_side_stream(self.images, device))

    def pin_memory(self) -> Batch:
        """Move the images to pinned memory, from which copies to a GPU overlap with its computation."""
        return replace(self, images=self.images.pin_memory())

    def to_float(self, dtype: torch.dtype = torch.float32) -> Batch:
        """Scale the images to 0..1, in channels-last memory format."""
        if self.images.is_floating_point():
            return self
        images = self.images.to(dtype, memory_format=torch.channels_last).div_(255)
        return replace(self, images=images)


@dataclass(frozen=True)
class StudentOutput:
    """The result of a forward pass of the network in training.

    features: the inputs of the Detect layer, a (B, C_l, H_l, W_l) tensor per level.
    levels: its raw outputs, a (B, A, H_l, W_l, 5 + K) tensor per level: x, y, w, h, objectness,
        classes, all logits.
    """

    features: tuple[Tensor, ...]
    levels: tuple[Tensor, ...]


@dataclass(frozen=True)
class Progress:
    """The position of a step in the run; schedules are pure functions of it.

    step: batches since the start of the run (0-based); epoch: 0-based.
    """

    step: int
    epoch: int
    steps_per_epoch: int
    epochs: int

    def warmed(self, warmup_epochs: float, least: int = 100) -> float:
        """Return the completed fraction 0..1 of a warm-up (at least `least` steps), 1 if there is none."""
        if warmup_epochs <= 0:
            return 1.0
        return min(self.step / max(round(warmup_epochs * self.steps_per_epoch), least), 1.0)
