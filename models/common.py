"""The building blocks of networks.

Attribute names (`conv`, `bn`, `cv1`, `m`, ...) are those in the state dicts of public weight files and must
not change. Shapes: B images, C channels, H W cells; c1 and c2 are input and output channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

NORM_EPSILON = 1e-3
NORM_MOMENTUM = 0.03
MAX_KERNELS = 16  # of parallel branches; limits what a damaged or malicious YAML can ask for

Size = int | Sequence[int]


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm with the constants that all public weights were trained with."""
    return nn.BatchNorm2d(channels, eps=NORM_EPSILON, momentum=NORM_MOMENTUM)


def _pair(size: Size) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def kernel_sides(k: Iterable[int]) -> list[int]:
    """Return the kernel sides of parallel branches. Raises ValueError unless they are a few odd numbers."""
    sides = list(k) if isinstance(k, list | tuple) else []
    if not 0 < len(sides) <= MAX_KERNELS or not all(isinstance(side, int) and side % 2 for side in sides):
        raise ValueError(
            f"its kernel sizes must be a list of 1 to {MAX_KERNELS} odd numbers, not {str(k)[:80]}"
        )
    return sides


class Conv(nn.Module):
    """Convolution without bias, batch norm and activation: (B, c1, H, W) to (B, c2, H/s, W/s)."""

    def __init__(
        self, c1: int, c2: int, k: Size = 1, s: Size = 1, p: Size | None = None, g: int = 1, act: bool = True
    ) -> None:
        """Kernel `k`, stride `s`, padding `p` (None: k // 2, keeps the size at stride 1), groups `g`."""
        super().__init__()
        kernel = _pair(k)
        padding = (kernel[0] // 2, kernel[1] // 2) if p is None else _pair(p)
        self.conv = nn.Conv2d(c1, c2, kernel, _pair(s), padding, groups=g, bias=False)
        self.bn: nn.Module = batch_norm(c2)
        self.act: nn.Module = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated feature map."""
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y

    def fuse(self) -> None:
        """Fold the batch norm into the convolution; both must be in eval mode."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.bn)
            self.bn = nn.Identity()
            # Saves the memory of one feature map. In training it would cost one: the backward pass of SiLU
            # needs its input.
            if isinstance(self.act, nn.SiLU):
                self.act.inplace = True


class DWConv(Conv):
    """A Conv with gcd(c1, c2) groups: depthwise if c1 equals c2."""

    def __init__(self, c1: int, c2: int, k: Size = 1, s: Size = 1, act: bool = True) -> None:
        """Kernel `k`, stride `s`."""
        super().__init__(c1, c2, k, s, g=math.gcd(c1, c2), act=act)


class Focus(nn.Module):
    """Space to depth, then a Conv: (B, c1, H, W) to (B, c2, H/2, W/2)."""

    def __init__(self, c1: int, c2: int, k: Size = 1, s: Size = 1, p: Size | None = None, g: int = 1) -> None:
        """The arguments are those of Conv."""
        super().__init__()
        self.conv = Conv(4 * c1, c2, k, s, p, g)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the Conv to the four 2x2 phases, concatenated with the row offset varying first."""
        phases = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        y: Tensor = self.conv(torch.cat(phases, 1))
        return y


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 Conv, with a residual connection if `shortcut` is set and c1 equals c2."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        """`e` is the hidden width relative to c2; `g` are the groups of the second Conv."""
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(hidden, c2, 3, g=g)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, c2, H, W)."""
        y: Tensor = self.cv2(self.cv1(x))
        return x + y if self.add else y


def _bottlenecks(channels: int, n: int, shortcut: bool, g: int) -> nn.Sequential:
    return nn.Sequential(*(Bottleneck(channels, channels, shortcut, g, e=1.0) for _ in range(n)))


class C3(nn.Module):
    """A CSP block: bottlenecks on one branch, only a 1x1 Conv on the other, merged by another 1x1 Conv.

    Source: Wang et al., CSPNet (arXiv 1911.11929), with three convolutions.
    """

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5
    ) -> None:
        """`n` bottlenecks with `shortcut` and `g`; `e` is the width of each branch relative to c2."""
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(c1, hidden)
        self.cv3 = Conv(2 * hidden, c2)
        self.m: nn.Module = _bottlenecks(hidden, n, shortcut, g)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, c2, H, W)."""
        y: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return y


class BottleneckCSP(nn.Module):
    """The predecessor of C3: its branches end in bare convolutions and share one batch norm.

    Source: Wang et al., CSPNet (arXiv 1911.11929).
    """

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5
    ) -> None:
        """`n` bottlenecks with `shortcut` and `g`; `e` is the width of each branch relative to c2."""
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden)
        self.cv2 = nn.Conv2d(c1, hidden, 1, bias=False)
        self.cv3 = nn.Conv2d(hidden, hidden, 1, bias=False)
        self.cv4 = Conv(2 * hidden, c2)
        self.bn = batch_norm(2 * hidden)
        self.act: nn.Module = nn.SiLU()
        self.m = _bottlenecks(hidden, n, shortcut, g)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, c2, H, W)."""
        halves = torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), 1)
        y: Tensor = self.cv4(self.act(self.bn(halves)))
        return y


class SPP(nn.Module):
    """Spatial pyramid pooling: max pools of several sizes beside the map itself, between two 1x1 Convs.

    Source: He et al., Spatial Pyramid Pooling (arXiv 1406.4729), here at stride 1.
    """

    def __init__(self, c1: int, c2: int, k: Iterable[int] = (5, 9, 13)) -> None:
        """`k` are the kernel sizes of the pools, all odd."""
        super().__init__()
        sides = kernel_sides(k)
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(hidden * (len(sides) + 1), c2)
        self.m = nn.ModuleList(nn.MaxPool2d(side, 1, side // 2) for side in sides)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, c2, H, W)."""
        x = self.cv1(x)
        y: Tensor = self.cv2(torch.cat((x, *(pool(x) for pool in self.m)), 1))
        return y


class SPPF(nn.Module):
    """A fast SPP: one pool applied three times, which for kernel size 5 equals sizes 5, 9 and 13."""

    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        """`k` is the kernel size of the pool, odd."""
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(hidden * 4, c2)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, c2, H, W)."""
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.m(maps[-1]))
        y: Tensor = self.cv2(torch.cat(maps, 1))
        return y


class Concat(nn.Module):
    """Concatenates feature maps along a dimension."""

    def __init__(self, dimension: int = 1) -> None:
        """`dimension` 1 is that of the channels."""
        super().__init__()
        self.d = dimension

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the concatenated map."""
        return torch.cat(tuple(maps), self.d)


class GhostConv(nn.Module):
    """A Conv to half of the channels, from which a cheap depthwise Conv computes the other half.

    Source: Han et al., GhostNet (arXiv 1911.11907).
    """

    def __init__(self, c1: int, c2: int, k: Size = 1, s: Size = 1, g: int = 1, act: bool = True) -> None:
        """Kernel `k`, stride `s` and groups `g` of the first Conv."""
        super().__init__()
        half = c2 // 2
        self.cv1 = Conv(c1, half, k, s, g=g, act=act)
        self.cv2 = Conv(half, half, 5, g=half, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, c2, H/s, W/s)."""
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)


class GhostBottleneck(nn.Module):
    """Two GhostConvs with a residual connection; at stride 2 with a depthwise Conv between them.

    Source: Han et al., GhostNet (arXiv 1911.11907), figure 3.
    """

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1) -> None:
        """Kernel `k` and stride `s` of the depthwise Convs; the stride is 1, if c1 equals c2, or 2.

        Raises ValueError otherwise.
        """
        super().__init__()
        hidden = c2 // 2
        strided = s == 2
        if not strided and (s != 1 or c1 != c2):
            raise ValueError(f"from {c1} to {c2} channels its stride must be {1 if c1 == c2 else 2}, not {s}")
        self.conv = nn.Sequential(
            GhostConv(c1, hidden),
            DWConv(hidden, hidden, k, s, act=False) if strided else nn.Identity(),
            GhostConv(hidden, c2, act=False),
        )
        self.shortcut = (
            nn.Sequential(DWConv(c1, c1, k, s, act=False), Conv(c1, c2, act=False))
            if strided
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, c2, H/s, W/s)."""
        y: Tensor = self.conv(x) + self.shortcut(x)
        return y


class C3Ghost(C3):
    """A C3 with GhostBottlenecks."""

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5
    ) -> None:
        """As for C3, without effect of `shortcut` and `g`: ghost bottlenecks are residual and ungrouped."""
        super().__init__(c1, c2, 0, shortcut, g, e)
        hidden = int(c2 * e)
        self.m = nn.Sequential(*(GhostBottleneck(hidden, hidden) for _ in range(n)))
