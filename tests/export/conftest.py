"""A network of six layers, its exports, and images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models.checkpoint import build_model, read_checkpoint, save_checkpoint
from models.yolo import Model

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "nc": 3,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30], [40, 30, 60, 90]],
    "backbone": [[-1, 1, "Conv", [8, 6, 2, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "C3", [16]]],
    "head": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 2], 1, "Concat", [1]],
        [[5, 3], 1, "Detect", ["nc", "anchors"]],
    ],
}


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an untrained network that finds something of every class in many places."""
    torch.manual_seed(3)
    model = Model(TINY)
    model.names = ["nut & bolt", "it's", 'a "b"']
    model.eval()
    with torch.no_grad():
        features = model.forward_features(torch.rand(2, 3, 64, 64))
        for convolution, feature in zip(model.head.m, features, strict=True):
            convolution.bias.zero_()
            spread, means = torch.std_mean(convolution(feature), (0, 2, 3))
            convolution.weight.mul_((2 / spread).view(-1, 1, 1, 1))  # logits from -4 to 4
            convolution.bias.copy_(-2 * means / spread)
    path = tmp_path_factory.mktemp("tiny") / "tiny.pt"
    save_checkpoint(path, model=model, epoch=-1, best_fitness=None, meta={})
    return path


@pytest.fixture(scope="session")
def tiny(tiny_weights: Path) -> Model:
    """The same network, fused."""
    return build_model(read_checkpoint(tiny_weights)).fuse().requires_grad_(False)


@pytest.fixture(scope="session")
def pictures() -> list[np.ndarray]:
    """The two shipped images and a cut-out, BGR."""
    shipped = [cv2.imread(str(path)) for path in sorted((ROOT / "data/images").glob("*.jpg"))]
    return [*shipped, shipped[0][:200]]
