"""What a new head takes over from one that knows some of its classes."""

import copy

import pytest
import torch

from models.checkpoint import read_checkpoint, save_checkpoint
from models.names import partners
from models.transfer import transfer_head, transfer_weights
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


def test_boxes_objectness_and_the_known_classes_go_over(tmp_path):
    source = network(["airplane", "bicycle", "tv"])
    target = network(["TV monitor", "unicorn", "bicycle", "aeroplane"], seed=1)
    before, checkpoint = copy.deepcopy(target), saved(tmp_path, source)
    transfer_weights(target, checkpoint)
    assert all(map(torch.equal, rows_of(target), rows_of(before)))
    assert transfer_head(target, checkpoint) == [0, 2, 3]
    for own, other, fresh in zip(rows_of(target), rows_of(source), rows_of(before), strict=True):
        wanted = other.half().float()
        assert torch.equal(own[:, [0, 1, 2, 3, 4, 5, 7, 8]], wanted[:, [0, 1, 2, 3, 4, 7, 6, 5]])
        assert torch.equal(own[:, 6], fresh[:, 6])


def test_a_head_of_all_classes_in_another_order_says_the_same(tmp_path):
    source, target = network(["a", "b", "c"]).eval(), network(["c", "a"], seed=1).eval()
    checkpoint = saved(tmp_path, source)
    transfer_weights(target, checkpoint)
    assert transfer_head(target, checkpoint) == [0, 1]
    images = torch.rand(1, 3, 64, 64)
    wanted = source(images)[0][..., [0, 1, 2, 3, 4, 7, 5]]
    torch.testing.assert_close(target(images)[0], wanted, rtol=1e-2, atol=0.1)  # saved as float16


@pytest.mark.parametrize(
    ("names", "cfg"),
    [
        (["x", "y"], "yolov5n.yaml"),  # nothing in common
        (["a", "b"], "yolov5s.yaml"),  # other widths
        (["a", "b"], "hub/yolov3-tiny.yaml"),  # other levels
        (["a", "b", "c"], "yolov5n.yaml"),  # copied already
    ],
)
def test_other_heads_stay_as_they_are(names, cfg, tmp_path):
    checkpoint = saved(tmp_path, network(["a", "b", "c"]))
    target = network(names, cfg, seed=1)
    before = rows_of(copy.deepcopy(target))
    assert transfer_head(target, checkpoint) == []
    assert all(map(torch.equal, rows_of(target), before))


def test_names_that_are_alike_are_partners():
    own = ["dog", "Dining Table", "couch", "sofa"]
    assert partners(own, ["diningtable", "sofa", "cat", "dog"]) == [1, 3, None, 0]
    assert partners(own[:3], ["sofa", "sofa"]) == [2, None]
