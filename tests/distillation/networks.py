"""Small networks whose outputs depend on what they see."""

import copy
import functools

import torch

from models.yolo import Model

NAMES = ["cell", "dot", "ring"]


def network(seed=0, names=NAMES, cfg="models/yolov5n.yaml"):
    """A network in evaluation mode with random weights, and batch norms that fit them.

    With the statistics of a new network its signals fade from layer to layer, and all images have the same
    output to the fifth digit: what a teacher sees would make no difference.
    """
    model = copy.deepcopy(_adapted(seed, len(names), cfg))
    model.names = list(names)
    return model


@functools.cache
def _adapted(seed, classes, cfg):
    torch.manual_seed(seed)
    model = Model(cfg, nc=classes)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    usual = norms[0].momentum
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train().forward_features(torch.rand(2, model.channels, 128, 128))
    for norm in norms:
        norm.momentum = usual
    return model.eval()
