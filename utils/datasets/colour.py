"""Random changes of hue, saturation and value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.batch import FILL
from utils.datasets.images import Image

_HUES = 180
_MAX_HUE_FACTOR = 255 / (_HUES - 1)


@dataclass(frozen=True)
class ColourJitter:
    """Factors of hue, saturation and value, the same for all parts of a sample; None changes no colour."""

    factors: tuple[float, float, float] | None = None

    @property
    def fill(self) -> int:
        """The level of FILL, a grey, after painting: it has neither hue nor saturation."""
        return FILL if self.factors is None else min(round(FILL * self.factors[2]), 255)

    @cached_property
    def _matrix(self) -> NDArray[np.float64]:
        assert self.factors is not None
        return np.diag(self.factors)

    def paint(self, image: Image) -> None:
        """Change the colours of an image (BGR, contiguous) in its memory; it is RGB then."""
        # As a single row: OpenCV converts what a row has beyond whole vectors at a tenth of the speed.
        pixels = image.reshape(1, -1, 3)
        assert np.shares_memory(pixels, image)
        if self.factors is None:
            cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
            return
        cv2.cvtColor(pixels, cv2.COLOR_BGR2HSV, dst=pixels)
        if self.factors[0] <= _MAX_HUE_FACTOR:
            # cv2.transform saturates at 255, and the conversion back wraps a hue above 180:
            # one vectorised pass instead of a lookup table for each channel.
            cv2.transform(pixels, self._matrix, dst=pixels)
        else:
            levels = np.arange(256)[:, None] * self.factors
            levels[:, 0] %= _HUES
            cv2.LUT(pixels, levels.round().clip(0, 255).astype(np.uint8)[None], dst=pixels)
        cv2.cvtColor(pixels, cv2.COLOR_HSV2RGB, dst=pixels)


def random_jitter(gains: tuple[float, float, float], rng: np.random.Generator) -> ColourJitter:
    """Draw factors 1 + U(-1, 1) * gain of hue, saturation and value."""
    factors = 1 + rng.uniform(-1, 1, 3) * gains
    return ColourJitter((float(factors[0]), float(factors[1]), float(factors[2])) if any(gains) else None)
