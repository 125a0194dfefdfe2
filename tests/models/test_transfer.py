"""What a new head takes over from one that knows some of its classes."""

import copy

import pytest
import torch

from models.checkpoint import read_checkpoint, save_checkpoint
from models.names import partners
from models.transfer import has_anchors_of, known_by_name, transfer_head, transfer_weights
from models.yolo import Model


def network(names, cfg="yolov5n.yaml", seed=0):
    torch.manual_seed(seed)
    model = Model(cfg, nc=len(names))
    model.names = list(names)
    return model


def saved(tmp_path, model):
    path = tmp_path / "weights.pt"
    save_checkpoint(path, model=model, epoch=0, best_fitness=None, meta={})
    return read_checkpoint(path)


def rows_of(model):
    """(A, 5 + K, C) of each level, weights and biases together."""
    head = model.head
    return [
        torch.cat((layer.weight.flatten(1), layer.bias[:, None]), 1).view(head.na, head.no, -1).detach()
        for layer in head.m
    ]


def taken_over(target, checkpoint):
    transfer_weights(target, checkpoint, exclude_head=True)
    assert transfer_head(target, checkpoint)


BOXES = [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("own", "wanted", "rows", "others", "fresh"),
    [
        (
            ["airplane", "bicycle", "tv"],
            ["TV monitor", "x", "bicycle", "aeroplane"],
            [5, 7, 8],
            [7, 6, 5],
            [6],
        ),
        (["a", "b"], ["b", "a"], [5, 6], [6, 5], []),
        (["a", "b"], ["b", "c"], [5], [6], [6]),  # as many classes, and not by their places
        (["a", "b"], ["c", "b"], [6], [6], [5]),
        (["a", "b"], ["b"], [], [], [5]),  # a single class begins certain
        (["a"], ["a", "b"], [], [], [5, 6]),
    ],
)
def test_boxes_objectness_and_the_known_classes_go_over(own, wanted, rows, others, fresh, tmp_path):
    source, target = network(own), network(wanted, seed=1)
    before, checkpoint = copy.deepcopy(target), saved(tmp_path, source)
    taken_over(target, checkpoint)
    for new, old, first in zip(rows_of(target), rows_of(source), rows_of(before), strict=True):
        assert torch.equal(new[:, BOXES + rows], old.half().float()[:, BOXES + others])
        assert torch.equal(new[:, fresh], first[:, fresh])
    for name, value in target.state_dict().items():
        if ".m." not in name or not name.startswith("model.24"):
            assert torch.equal(value, checkpoint.state[name]), name


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (["x", "y"], {}),
        (["a", "b", "c"], {}),  # the same
        (["a", "b"], {0: 0, 1: 1}),
        (["a", "b", "d"], {0: 0, 1: 1}),
        (["c", "b", "a"], {0: 2, 1: 1, 2: 0}),
    ],
)
def test_what_is_known_by_name(names, known, tmp_path):
    assert known_by_name(network(names), saved(tmp_path, network(["a", "b", "c"]))) == known


@pytest.mark.parametrize("cfg", ["yolov5s.yaml", "hub/yolov3-tiny.yaml"])
def test_heads_of_other_shapes_stay_as_they_are(cfg, tmp_path):
    checkpoint = saved(tmp_path, network(["a", "b", "c"]))
    target = network(["a", "b"], cfg, seed=1)
    before = rows_of(copy.deepcopy(target))
    assert not transfer_head(target, checkpoint)
    assert all(map(torch.equal, rows_of(target), before))


def test_anchors_are_compared(tmp_path):
    source = network(["a", "b"])
    checkpoint, same = saved(tmp_path, source), network(["b"])
    other, fewer = network(["b"]), Model("yolov5n.yaml", nc=1, anchors=2)
    with torch.no_grad():
        other.head.anchors[0, 0] *= 1.1
    assert [has_anchors_of(model, checkpoint) for model in (same, other, fewer)] == [True, False, False]


def test_names_that_are_alike_are_partners():
    own = ["dog", "Dining Table", "couch", "sofa"]
    assert partners(own, ["diningtable", "sofa", "cat", "dog"]) == [1, 3, None, 0]
    assert partners(own[:3], ["sofa", "sofa"]) == [2, None]
