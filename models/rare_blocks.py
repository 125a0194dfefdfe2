"""Blocks that no network in this folder uses, but other published network YAMLs do.

Attribute names are those in the state dicts of public weight files. Shapes: B images, C channels, H W cells;
c1 and c2 are input and output channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.common import C3, SPP, Conv, batch_norm, kernel_sides


class C3SPP(C3):
    """A C3 with spatial pyramid pooling in place of the bottlenecks."""

    def __init__(
        self,
        c1: int,
        c2: int,
        k: Iterable[int] = (5, 9, 13),
        n: int = 1,
        shortcut: bool = True,
        g: int = 1,
        e: float = 0.5,
    ) -> None:
        """`k` are the odd kernel sizes of the pools, `e` as in C3; `n`, `shortcut` and `g` have no effect."""
        super().__init__(c1, c2, 0, shortcut, g, e)
        hidden = int(c2 * e)
        self.m = SPP(hidden, hidden, k)


class CrossConv(nn.Module):
    """A 1 x k and a k x 1 Conv, with a residual connection if `shortcut` is set and the shapes agree."""

    def __init__(
        self, c1: int, c2: int, k: int = 3, s: int = 1, g: int = 1, e: float = 1.0, shortcut: bool = False
    ) -> None:
        """Kernel size `k`, stride `s`, groups `g` of the second Conv; `e`: hidden width relative to c2."""
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, (1, k), (1, s))
        self.cv2 = Conv(hidden, c2, (k, 1), (s, 1), g=g)
        self.add = shortcut and c1 == c2 and s == 1

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, c2, H/s, W/s)."""
        y: Tensor = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C3x(C3):
    """A C3 of CrossConvs with 3 x 3 kernels."""

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5
    ) -> None:
        """The arguments are those of C3."""
        super().__init__(c1, c2, 0, shortcut, g, e)
        hidden = int(c2 * e)
        self.m = nn.Sequential(*(CrossConv(hidden, hidden, 3, 1, g, 1.0, shortcut) for _ in range(n)))


class MixConv2d(nn.Module):
    """Parallel convolutions of several kernel sizes, concatenated; then batch norm and activation.

    Source: Tan and Le, MixConv (arXiv 1907.09595), section 3.1.
    """

    def __init__(
        self, c1: int, c2: int, k: Sequence[int] = (1, 3), s: int = 1, equal_ch: bool = True
    ) -> None:
        """Kernel sizes `k`, stride `s`.

        equal_ch: whether the c2 output channels are divided equally; otherwise each convolution gets about
        the same number of weights per input channel.
        """
        super().__init__()
        sides = kernel_sides(k)
        counts = _equal_parts(c2, len(sides)) if equal_ch else _inverse_parts(c2, [side**2 for side in sides])
        if min(counts) < 1:
            raise ValueError(f"{c2} channels are too few for {len(sides)} kernel sizes")
        self.m = nn.ModuleList(
            nn.Conv2d(c1, count, side, s, side // 2, groups=math.gcd(c1, count), bias=False)
            for side, count in zip(sides, counts, strict=True)
        )
        self.bn = batch_norm(c2)
        self.act: nn.Module = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, c2, H/s, W/s)."""
        y: Tensor = self.act(self.bn(torch.cat([convolution(x) for convolution in self.m], 1)))
        return y


def _equal_parts(count: int, parts: int) -> list[int]:
    """Divide `count` channels into equal parts, distributing the remainder as in public weight files."""
    places = [int(channel * (parts - 1e-6) / max(count - 1, 1)) for channel in range(count)]
    return [places.count(part) for part in range(parts)]


def _inverse_parts(count: int, sizes: Sequence[int]) -> list[int]:
    """Divide `count` channels into parts inversely proportional to `sizes`."""
    total = sum(1 / size for size in sizes)
    parts = [round(count / size / total) for size in sizes]
    return [*parts[:-1], count - sum(parts[:-1])]


class DWConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution with gcd(c1, c2) groups."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p1: int = 0, p2: int = 0) -> None:
        """Kernel `k`, stride `s`, padding `p1`, output padding `p2`."""
        super().__init__(c1, c2, k, s, p1, p2, groups=math.gcd(c1, c2))


class Contract(nn.Module):
    """Space to depth: (B, C, H, W) to (B, C * gain^2, H / gain, W / gain)."""

    def __init__(self, gain: int = 2) -> None:
        """`gain` is the side of the square blocks of cells that become channels."""
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """Like `pixel_unshuffle`, but with the channels of one position within the block adjacent."""
        y = F.pixel_unshuffle(x, self.gain)
        phases = y.reshape(y.shape[0], -1, self.gain**2, *y.shape[2:])
        return phases.transpose(1, 2).flatten(1, 2)


class Expand(nn.Module):
    """Depth to space, the inverse of Contract: (B, C, H, W) to (B, C / gain^2, H * gain, W * gain)."""

    def __init__(self, gain: int = 2) -> None:
        """`gain` is the side of the square blocks of cells made of channels."""
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """Like `pixel_shuffle`, but with the channels of one position within the block adjacent."""
        phases = x.reshape(x.shape[0], self.gain**2, -1, *x.shape[2:]).transpose(1, 2)
        return F.pixel_shuffle(phases.flatten(1, 2), self.gain)
