"""Letterboxing of images for inference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.batch import Letterbox
from utils.datasets.augment import fit_letterbox
from utils.datasets.images import Image
from utils.reporting.console import Console


def fitting_image_size(
    sides: Sequence[int], multiple: int, console: Console, name: str = "--imgsz"
) -> tuple[int, ...]:
    """Round sides in px up to multiples of the coarsest stride; a change is reported under `name`."""
    fitting = tuple(math.ceil(side / multiple) * multiple for side in sides)
    if fitting != tuple(sides):
        console.warn(
            f"{name} is not a multiple of the stride {multiple}: using {' '.join(map(str, fitting))}"
        )
    return fitting


def letterbox_image(
    image: Image, size_hw: tuple[int, int], stride: int, whole: bool = False
) -> tuple[Tensor, Letterbox]:
    """Scale an image to fit into a size and pad it to the next multiples of the stride.

    image: (H, W, 3) BGR. Returns (1, 3, H', W') uint8 RGB, with H' and W' as small as possible (or those of
    `size_hw` if `whole`), and the letterbox to map boxes back.
    """
    out, letterbox = letterbox_pixels(image, size_hw, stride, whole)
    return as_batch(out), letterbox


def letterbox_pixels(
    image: Image,
    size_hw: tuple[int, int],
    stride: int,
    whole: bool = False,
    place: NDArray[np.uint8] | None = None,
) -> tuple[Image, Letterbox]:
    """As `letterbox_image`, for pixels (H', W', 3) RGB.

    place: contiguous memory (n,), large enough, to put them into.
    """
    height, width = image.shape[:2]
    factor = min(size_hw[0] / height, size_hw[1] / width)
    new_hw = max(round(height * factor), 1), max(round(width * factor), 1)
    if new_hw != (height, width):
        method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        image = np.asarray(cv2.resize(image, (new_hw[1], new_hw[0]), interpolation=method), np.uint8)
    out_h, out_w = size_hw if whole else (math.ceil(side / stride) * stride for side in new_hw)
    pixels = np.empty(out_h * out_w * 3, np.uint8) if place is None else place[: out_h * out_w * 3]
    out = pixels.reshape(out_h, out_w, 3)
    return out, fit_letterbox(image, (height, width), out)


def as_batch(pixels: Image) -> Tensor:
    """Return pixels (H, W, 3) as a batch (1, 3, H, W) in the same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
