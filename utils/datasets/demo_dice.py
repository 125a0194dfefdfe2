"""Random choices that come out the same on every machine and with every NumPy.

NumPy keeps the raw stream of a bit generator and its seeding unchanged for good, but not what
`Generator` makes of them. So everything is derived from the raw 64-bit words here, with
integers and with the four exact operations of IEEE arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T")
_MANTISSA = 2.0**-53


class Dice:
    """A stream of choices that depends on its seeds alone."""

    def __init__(self, *seeds: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(seeds))

    def below(self, count: int) -> int:
        """An integer from 0 to `count - 1`."""
        return (int(self._bits.random_raw()) >> 32) * count >> 32

    def between(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in `percent` of a hundred cases."""
        return self.below(100) < percent

    def pick(self, options: Sequence[_T]) -> _T:
        """One of the options."""
        return options[self.below(len(options))]

    def uniform(self, low: float, high: float) -> float:
        """A number from `low` up to, but not including, `high`."""
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * _MANTISSA)

    def uniforms(self, low: float, high: float, *shape: int) -> NDArray[np.float64]:
        """Numbers as of `uniform` in an array of the given shape."""
        words = self._bits.random_raw(int(np.prod(shape))) >> np.uint64(11)
        fractions: NDArray[np.float64] = words.astype(np.float64) * _MANTISSA
        return (low + (high - low) * fractions).reshape(shape)

    def bell(self, *shape: int) -> NDArray[np.float64]:
        """Numbers with mean 0, spread 1 and a nearly normal distribution: sums of four bytes.

        Nothing lies beyond 3.5 spreads.
        """
        words = self._bits.random_raw((int(np.prod(shape)) + 1) // 2).astype("<u8")
        octets = words.view(np.uint8).reshape(-1, 4).astype(np.int16)
        totals = octets[:, 0] + octets[:, 1] + octets[:, 2] + octets[:, 3]
        spread = 147.8  # of the sum of four uniform bytes: sqrt(4 * (256**2 - 1) / 12)
        return ((totals[: int(np.prod(shape))] - 510) / spread).reshape(shape)

    def direction(self) -> tuple[float, float]:
        """Cosine and sine of an angle, anywhere on the circle.

        Made from a ratio, because `cos` and `sin` differ in their last bit between machines. The
        ratio runs evenly, so the angle nearly does.
        """
        ratio = self.uniform(-1.0, 1.0)
        bottom = 1.0 + ratio * ratio
        cosine, sine = (1.0 - ratio * ratio) / bottom, 2.0 * ratio / bottom  # -90 to 90 degrees
        return (cosine, sine) if self.chance(50) else (-cosine, -sine)
