"""Augmentation settings, colour jitter, mixup, flips and the letterbox. All randomness comes from `rng`."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from utils.batch import FILL, Letterbox
from utils.datasets.geometry import Boxes, WarpSettings
from utils.datasets.images import Image

_MIXUP_BETA = 32.0
_HUES = 180
_MAX_HUE_FACTOR = 255 / (_HUES - 1)


@dataclass(frozen=True)
class AugmentSettings:
    """Augmentation strengths, named as in the hyperparameter file.

    hsv_h, hsv_s, hsv_v: each channel is multiplied by 1 + U(-1, 1) * gain.
    degrees, shear: angles from U(-x, x); translate: fraction of the size; scale: factor 1 + U(-x, x).
    perspective: U(-x, x), useful up to 0.001.
    flipud, fliplr, mosaic, mixup: probabilities.
    """

    hsv_h: float = 0.0
    hsv_s: float = 0.0
    hsv_v: float = 0.0
    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    perspective: float = 0.0
    flipud: float = 0.0
    fliplr: float = 0.0
    mosaic: float = 0.0
    mixup: float = 0.0

    @property
    def warp(self) -> WarpSettings:
        """The settings of the random warp."""
        return WarpSettings(self.degrees, self.translate, self.scale, self.shear, self.perspective)


def mix(
    first: tuple[Image, Boxes], second: tuple[Image, Boxes], rng: np.random.Generator
) -> tuple[Image, Boxes]:
    """Blend two samples of the same size with a ratio from Beta(32, 32), keeping the boxes of both.

    Source: Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018.
    """
    share = rng.beta(_MIXUP_BETA, _MIXUP_BETA)
    image = cv2.addWeighted(first[0], share, second[0], 1 - share, 0.0)
    return np.asarray(image, np.uint8), np.concatenate([first[1], second[1]])


def flip(image: Image, boxes: Boxes, settings: AugmentSettings, rng: np.random.Generator) -> Boxes:
    """Flip the image in place, vertically and horizontally, with the probabilities of the settings.

    Returns the boxes of the flipped image.
    """
    height, width = image.shape[:2]
    upside_down, sideways = rng.random(2) < (settings.flipud, settings.fliplr)
    for wanted, code, length, low, high in ((upside_down, 0, height, 2, 4), (sideways, 1, width, 1, 3)):
        if wanted:
            cv2.flip(image, code, dst=image)
            boxes = boxes.copy()
            boxes[:, [low, high]] = length - boxes[:, [high, low]]
    return boxes


def jitter_colour(image: Image, settings: AugmentSettings, rng: np.random.Generator, out: Image) -> None:
    """Write the image (BGR) with random hue, saturation and value to `out` (RGB, same shape).

    Overwrites `image`: working in its memory is cheaper than allocating.
    """
    gains = np.array([settings.hsv_h, settings.hsv_s, settings.hsv_v])
    factors = 1 + rng.uniform(-1, 1, 3) * gains
    if not gains.any():
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out)
        return
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV, dst=image)
    if factors[0] <= _MAX_HUE_FACTOR:
        # cv2.transform saturates at 255, and the conversion back wraps a hue above 180:
        # one vectorised pass instead of a lookup table for each channel.
        cv2.transform(hsv, np.diag(factors), dst=hsv)
    else:
        levels = np.arange(256)[:, None] * factors
        levels[:, 0] %= _HUES
        cv2.LUT(hsv, levels.clip(0, 255).astype(np.uint8)[None], dst=hsv)
    cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=out)


def fit_letterbox(image: Image, original_hw: tuple[int, int], out: Image) -> Letterbox:
    """Centre an image (BGR) in `out` (RGB) with a border of FILL, shrinking it if it does not fit.

    Args:
        image: already scaled.
        original_hw: size of the file in pixels, for mapping boxes back.
        out: (H, W, 3), overwritten.
    """
    height, width = image.shape[:2]
    factor = min(out.shape[0] / height, out.shape[1] / width, 1.0)
    if factor < 1:
        height, width = max(round(height * factor), 1), max(round(width * factor), 1)
        image = np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    top, left = (out.shape[0] - height) // 2, (out.shape[1] - width) // 2
    out[:top], out[top + height :] = FILL, FILL
    out[top : top + height, :left], out[top : top + height, left + width :] = FILL, FILL
    cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out[top : top + height, left : left + width])
    scale = (height / original_hw[0], width / original_hw[1])
    return Letterbox(original_hw, scale, (float(top), float(left)))
