"""Augmentation settings, mixup, flips and the letterbox. All randomness comes from `rng`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import cv2
import numpy as np

from utils.batch import FILL, Letterbox
from utils.config.hyperparameters import Hyperparameters
from utils.datasets.geometry import WarpSettings
from utils.datasets.images import Image

_MIXUP_BETA = 32.0


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

    @classmethod
    def of(cls, hyp: Hyperparameters) -> AugmentSettings:
        """Return the strengths that a hyperparameter file gives."""
        return cls(**{field.name: getattr(hyp, field.name) for field in fields(cls)})

    @property
    def hsv(self) -> tuple[float, float, float]:
        """The gains of hue, saturation and value."""
        return self.hsv_h, self.hsv_s, self.hsv_v

    @property
    def warp(self) -> WarpSettings:
        """The settings of the random warp."""
        return WarpSettings(self.degrees, self.translate, self.scale, self.shear, self.perspective)


def mixup_share(rng: np.random.Generator) -> float:
    """Draw the first image's share of a mixture, from Beta(32, 32).

    Source: Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018.
    """
    return rng.beta(_MIXUP_BETA, _MIXUP_BETA)


def random_flips(settings: AugmentSettings, rng: np.random.Generator) -> tuple[bool, bool]:
    """Draw whether to flip vertically and horizontally, with the probabilities of the settings."""
    upside_down, sideways = rng.random(2)
    return bool(upside_down < settings.flipud), bool(sideways < settings.fliplr)


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
