"""Ensembles of detectors (`--weights a.pt b.pt`).

Shapes: B images, L levels, N predictions (the sum of those of all members), K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from models.decode import sorted_by_image
from models.yolo import Model, ModelSummary


class Ensemble(nn.Module):
    """Pools the predictions of its members, on which NMS then runs jointly.

    Has the part of the interface of `Model` that inference uses, with the feature maps and levels of all
    members in one tuple, in the members' order. Members may differ in architecture, strides and anchors, but
    not in their classes.
    """

    def __init__(self, members: Sequence[Model]) -> None:
        """`members`: networks with the same classes in the same order.

        Raises:
            ValueError: if there are no members, or they differ in their number of classes.
        """
        super().__init__()
        if len({member.nc for member in members}) != 1:
            raise ValueError("members of an ensemble need the same number of classes")
        self.members = nn.ModuleList(members)
        self.nc, self.names = members[0].nc, list(members[0].names)
        self.size_multiple = math.lcm(*(member.size_multiple for member in members))

    def __iter__(self) -> Iterator[Model]:
        """Yield the members."""
        return iter(cast(Sequence[Model], self.members))

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps (B, C, H_l, W_l) of all members for images (B, 3, H, W), 0..1."""
        return tuple(feature for member in self for feature in member.forward_features(images))

    def forward_head(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the raw outputs (B, A, H_l, W_l, 5 + K) of all members."""
        return tuple(level for member, own in self._split(features) for level in member.forward_head(own))

    def decode_levels(self, levels: Sequence[Tensor]) -> Tensor:
        """Return predictions (B, N, 5 + K) float32: centre x, y, width, height in px, then scores 0..1."""
        return torch.cat([member.decode_levels(own) for member, own in self._split(levels)], 1)

    def decode_above(self, levels: Sequence[Tensor], least: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return image (C,), row (C,) and prediction (C, 5 + K) where objectness is above `least`, 0..1."""
        parts, start = [], 0
        for member, own in self._split(levels):
            image, row, predictions = member.decode_above(own, least)
            parts.append((image, row + start, predictions))
            start += sum(level[0, ..., 0].numel() for level in own)
        image, row, predictions = (torch.cat(part) for part in zip(*parts, strict=True))
        return sorted_by_image(image, row, predictions)

    def forward_augmented(self, images: Tensor) -> Tensor:
        """Return decoded predictions (B, N', 5 + K) of all members with test-time augmentation."""
        return torch.cat([member.forward_augmented(images) for member in self], 1)

    def keep_classes(self, numbers: Sequence[int], names: Sequence[str]) -> None:
        """Reduce every member to these classes, in this order and with these names."""
        for member in self:
            member.keep_classes(numbers, names)
        self.nc, self.names = len(numbers), list(names)

    def summary(self, image_size: int = 640) -> ModelSummary:
        """Sum the members' counts of modules, parameters and operations at a square image size in px."""
        sizes = [member.summary(image_size) for member in self]
        return ModelSummary(
            layers=sum(size.layers for size in sizes),
            parameters=sum(size.parameters for size in sizes),
            gradients=sum(size.gradients for size in sizes),
            gflops=sum(size.gflops for size in sizes),
            image_size=image_size,
        )

    def _split(self, maps: Sequence[Tensor]) -> Iterator[tuple[Model, Sequence[Tensor]]]:
        """Yield each member with its share of the maps."""
        start = 0
        for member in self:
            end = start + member.head.nl
            yield member, maps[start:end]
            start = end


Network = Model | Ensemble
