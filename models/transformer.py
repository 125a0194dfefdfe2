"""The transformer block of models such as yolov5s-transformer.

Attribute names are those in the state dicts of public weight files. Shapes: B images, C channels, H W cells;
c1 and c2 are input and output channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.common import C3, Conv

HEADS = 4


class TransformerLayer(nn.Module):
    """Self-attention and two linear layers, both with residual connections; no layer norms, no activation.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (arXiv 2010.11929), eq. 2 and 3, without norms.
    """

    def __init__(self, c: int, num_heads: int) -> None:
        """`c` channels. Raises ValueError if that is not a multiple of `num_heads`."""
        super().__init__()
        if c % num_heads:
            raise ValueError(f"{c} channels are not a multiple of {num_heads} attention heads")
        self.q = nn.Linear(c, c, bias=False)
        self.k = nn.Linear(c, c, bias=False)
        self.v = nn.Linear(c, c, bias=False)
        self.ma = nn.MultiheadAttention(c, num_heads)
        self.fc1 = nn.Linear(c, c, bias=False)
        self.fc2 = nn.Linear(c, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (H * W, B, C) to tokens of the same shape."""
        attended: Tensor = self.ma(self.q(x), self.k(x), self.v(x), need_weights=False)[0] + x
        mapped: Tensor = self.fc2(self.fc1(attended))
        return mapped + attended


class TransformerBlock(nn.Module):
    """Transformer layers over the cells of a feature map: (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, num_heads: int, num_layers: int) -> None:
        """A 1x1 Conv comes first if c1 and c2 differ; `linear` serves as the position embedding."""
        super().__init__()
        self.conv = Conv(c1, c2) if c1 != c2 else None
        self.linear = nn.Linear(c2, c2)
        self.tr = nn.Sequential(*(TransformerLayer(c2, num_heads) for _ in range(num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, c2, H, W)."""
        if self.conv is not None:
            x = self.conv(x)
        tokens = x.flatten(2).permute(2, 0, 1)
        y: Tensor = self.tr(tokens + self.linear(tokens))
        return y.permute(1, 2, 0).reshape(x.shape)


class C3TR(C3):
    """A C3 with a transformer in place of the bottlenecks."""

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5
    ) -> None:
        """`n` transformer layers, `e` as in C3; `shortcut` and `g` have no effect."""
        super().__init__(c1, c2, 0, shortcut, g, e)
        hidden = int(c2 * e)
        self.m = TransformerBlock(hidden, hidden, HEADS, n)
