"""Random numbers that are identical on every machine and with every version of NumPy.

NumPy guarantees the raw stream of a bit generator and its seeding, but not the methods of
`Generator`. So everything here is derived from the raw 64-bit words, using integers and the four
exact operations of IEEE arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T")
_MANTISSA = 2.0**-53


class Dice:
    """A random stream that depends only on its seeds."""

    def __init__(self, *seeds: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(seeds))

    def below(self, count: int) -> int:
        """Draw an integer from 0 to `count - 1`."""
        return (int(self._bits.random_raw()) >> 32) * count >> 32

    def between(self, low: int, high: int) -> int:
        """Draw an integer from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """Return True with a probability of `percent` percent."""
        return self.below(100) < percent

    def pick(self, options: Sequence[_T]) -> _T:
        """Draw one of the options."""
        return options[self.below(len(options))]

    def uniform(self, low: float, high: float) -> float:
        """Draw a number from [low, high)."""
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * _MANTISSA)

    def uniforms(self, low: float, high: float, *shape: int) -> NDArray[np.float64]:
        """Draw an array of numbers from [low, high)."""
        words = self._bits.random_raw(int(np.prod(shape))) >> np.uint64(11)
        fractions: NDArray[np.float64] = words.astype(np.float64) * _MANTISSA
        return (low + (high - low) * fractions).reshape(shape)

    def bell(self, *shape: int) -> NDArray[np.float64]:
        """Draw an array from a nearly normal distribution with mean 0 and standard deviation 1.

        The numbers are sums of four bytes, so none lies beyond 3.5 standard deviations.
        """
        words = self._bits.random_raw((int(np.prod(shape)) + 1) // 2).astype("<u8")
        octets = words.view(np.uint8).reshape(-1, 4).astype(np.int16)
        totals = octets[:, 0] + octets[:, 1] + octets[:, 2] + octets[:, 3]
        spread = 147.8  # of the sum of four uniform bytes: sqrt(4 * (256**2 - 1) / 12)
        return ((totals[: int(np.prod(shape))] - 510) / spread).reshape(shape)

    def direction(self) -> tuple[float, float]:
        """Draw the cosine and sine of an angle from the full circle.

        Computed from a ratio, because the last bit of `cos` and `sin` differs between machines. The
        ratio is uniform, so the angle is nearly uniform.
        """
        ratio = self.uniform(-1.0, 1.0)
        bottom = 1.0 + ratio * ratio
        cosine, sine = (1.0 - ratio * ratio) / bottom, 2.0 * ratio / bottom  # -90 to 90 degrees
        return (cosine, sine) if self.chance(50) else (-cosine, -sine)
