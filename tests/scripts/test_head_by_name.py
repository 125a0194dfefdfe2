"""A run whose start knows classes of the data by name."""

from pathlib import Path

import pytest
import torch

from models.checkpoint import save_checkpoint
from models.yolo import Model
from utils.config.cli import parse
from utils.config.options import TrainOptions
from utils.losses.recipe import plain_recipe
from utils.training.run import TrainingRun
from utils.training.stop import StopSignals

OWN = ["disc", "cat", "square"]  # the set has square and disc


@pytest.fixture
def begun(small_set, tmp_path):
    """The function that gives the network a run begins with, from weights of such names."""

    def begin(names, *words):
        torch.manual_seed(3)
        source = Model("models/yolov5n.yaml", nc=len(names))
        source.names = list(names)
        for layer in source.head.m:
            torch.nn.init.normal_(layer.bias)
        weights = tmp_path / "weights.pt"
        save_checkpoint(weights, model=source, epoch=0, best_fitness=None, meta={})
        given = ["--data", small_set, "--weights", weights, "--img", 64, "--batch", 2, "--device", "cpu"]
        options = parse(TrainOptions, [*map(str, given), "--workers", "0", "--dry-run", *words])
        return source, TrainingRun(options, plain_recipe, StopSignals()).model

    return begin


def biases(model):
    return [layer.bias.detach().view(model.head.na, -1) for layer in model.head.m]


def test_the_head_goes_on_with_what_it_knows(begun, capsys):
    source, model = begun(OWN, "--noautoanchor")
    assert "the head goes on with what the weights know by name: 2 of 2 classes" in capsys.readouterr().out
    for own, other in zip(biases(model), biases(source), strict=True):
        torch.testing.assert_close(own, other[:, [0, 1, 2, 3, 4, 7, 5]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("names", [["disc", "cat"], ["disc", "square"]])
def test_classes_of_the_same_number_do_not_go_over_by_their_places(names, begun):
    source, model = begun(names, "--noautoanchor")
    for own, other in zip(biases(model), biases(source), strict=True):
        torch.testing.assert_close(own[:, 6], other[:, 5], rtol=1e-3, atol=1e-3)
        is_taken = torch.isclose(own[:, 5], other[:, 6], atol=1e-3)
        assert is_taken.all() if "square" in names else not is_taken.any()


def test_without_it_a_head_of_another_shape_starts_anew(begun, capsys):
    source, model = begun(OWN, "--noautoanchor", "--no-head-by-name")
    assert "by name" not in capsys.readouterr().out
    for own, other in zip(biases(model), biases(source), strict=True):
        assert not torch.isclose(own, other[:, [0, 1, 2, 3, 4, 7, 5]], atol=1e-3).any()


@pytest.mark.parametrize("by", ["--cfg", "AutoAnchor"])
def test_a_head_of_other_anchors_starts_anew(by, begun, tmp_path, capsys):
    words = ["--noautoanchor"]
    if by == "--cfg":
        cfg = tmp_path / "other.yaml"
        text = Path("models/yolov5n.yaml").read_text(encoding="utf-8")
        assert "[10,13, " in text
        cfg.write_text(text.replace("[10,13, ", "[11,15, "), encoding="utf-8")
        words += ["--cfg", str(cfg)]
    else:
        hyp = tmp_path / "hyp.yaml"
        hyp.write_text("anchor_t: 1.05\n", encoding="utf-8")  # nothing fits so closely
        words = ["--hyp", str(hyp)]
    source, model = begun(OWN, *words)
    said = capsys.readouterr().out
    assert "the weights know 2 of 2 classes by name, for other anchors: the head starts anew" in said
    assert ("replaced by k-means anchors" in said) == (by == "AutoAnchor")
    for own, other in zip(biases(model), biases(source), strict=True):
        assert not torch.isclose(own, other[:, [0, 1, 2, 3, 4, 7, 5]], atol=1e-3).any()
