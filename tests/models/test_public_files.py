"""Public weight files: pickled objects that are read and never brought to life."""

import argparse
import collections
import datetime
import pathlib
import sys

import numpy as np
import pytest
import torch
from torch import nn

import models.common
import models.yolo
from models.archive import load_content, module_state
from models.checkpoint import build_model, read_checkpoint, save_checkpoint
from models.inert import Inert
from models.transfer import transfer_weights
from models.yolo import Model
from utils.errors import UserError

NAMES = ["ant", "bee", "cow", "dog"]
CHANGED_ANCHORS = 1.25  # exact in float16


def as_public(cfg, seed=0, names=NAMES, kind="Model", generation="v6"):
    """A pickled module as the original's training leaves it: half precision, plain attributes."""
    torch.manual_seed(seed)
    model = Model(cfg, nc=len(names))
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.2)
    head = model.head
    head.anchors *= CHANGED_ANCHORS
    del head._buffers["stride"]
    head._non_persistent_buffers_set.clear()
    strides = torch.tensor([8.0, 16.0, 32.0])
    if generation == "v5.0":
        head.register_buffer("anchor_grid", (head.anchors * strides.view(-1, 1, 1)).view(3, 1, 3, 1, 1, 2))
        for module in model.modules():
            if isinstance(module, models.common.Conv):
                module.conv._non_persistent_buffers_set = set()
                del module.conv.__dict__["_is_full_backward_hook"]
    head.__dict__.update(stride=strides, inplace=True, grid=[torch.zeros(1)] * 3)
    own = {"stride": strides, "names": names, "save": [4, 6, 10, 14, 17, 20, 23], "yaml_file": "x.yaml"}
    model.__dict__.update(own | {"hyp": {"lr0": 0.01}, "class_weights": torch.rand(4).double()})
    model.__class__ = getattr(models.yolo, kind)
    model.train(generation != "v5.0")
    return model.half()


@pytest.fixture
def pickled_names(monkeypatch):
    """Classes under the names that public files use and this project does not have."""
    for module, name, base in (
        ("models.yolo", "DetectionModel", Model),
        ("models.common", "AutoShape", nn.Module),
    ):
        made = type(name, (base,), {"__module__": module, "__qualname__": name})
        monkeypatch.setattr(sys.modules[module], name, made, raising=False)


def expected_state(public):
    return {
        name: (value.float() if value.is_floating_point() else value).cpu()
        for name, value in public.state_dict().items()
        if not name.endswith("anchor_grid")
    }


def assert_holds(model, public):
    wanted = expected_state(public)
    state = model.state_dict()
    assert list(state) == [name for name in wanted]
    for name, value in state.items():
        assert torch.equal(value, wanted[name]), name
    assert model.stride.tolist() == [8, 16, 32]
    px = torch.tensor(model.yaml["anchors"]).view(3, 3, 2)
    torch.testing.assert_close(px[0, 0], torch.tensor([10.0, 13.0]) * CHANGED_ANCHORS)


def test_a_v5_file_loads_and_its_average_goes_first(tmp_path):
    model = as_public("v5.0/yolov5n.yaml", seed=0, generation="v5.0")
    average = as_public("v5.0/yolov5n.yaml", seed=1, generation="v5.0")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    content = {
        "epoch": 17, "best_fitness": np.array([0.375]), "training_results": "a\nb", "model": model,
        "ema": average, "updates": 40, "optimizer": optimizer.state_dict(), "wandb_id": None,
    }  # fmt: skip
    torch.save(content, tmp_path / "v5.pt")
    saved = read_checkpoint(tmp_path / "v5.pt")
    assert (saved.source, saved.epoch, saved.best_fitness) == ("public", 17, 0.375)
    assert saved.meta == {"training_results": "a\nb", "updates": 40, "wandb_id": None}
    again = build_model(saved)
    assert_holds(again, average)
    assert again.names == NAMES
    content["ema"] = None
    torch.save(content, tmp_path / "v5.pt")
    assert_holds(build_model(read_checkpoint(tmp_path / "v5.pt")), model)


def test_a_v7_file_loads_with_everything_that_stands_in_it(tmp_path, pickled_names):
    names = dict(reversed(list(enumerate(NAMES))))
    model = as_public("yolov5n.yaml", names=names, kind="DetectionModel")
    options = {"weights": pathlib.PurePosixPath("a/b.pt"), "save_dir": pathlib.Path("runs/x"), "imgsz": 640}
    content = {
        "epoch": -1, "best_fitness": np.float64(0.5), "model": model, "ema": None, "updates": None,
        "opt": options, "git": {"remote": None, "branch": "main"}, "date": "2022-11-22T12:00:00",
        "when": datetime.datetime(2022, 11, 22), "device": torch.device("cpu"), "dtype": torch.float16,
        "space": argparse.Namespace(lr=0.1, files=[pathlib.PureWindowsPath("C:/x")]), "seen": {1, 2},
        "counts": collections.defaultdict(list, {"a": [1]}), "ordered": collections.OrderedDict(b=2),
        "size": torch.Size([1, 2]), "fixed": frozenset({3}), "whole": np.int64(7), "yes": np.bool_(True),
    }  # fmt: skip
    torch.save(content, tmp_path / "v7.pt")
    saved = read_checkpoint(tmp_path / "v7.pt")
    assert_holds(build_model(saved), model)
    assert saved.names == NAMES and saved.best_fitness == 0.5
    meta = saved.meta
    assert meta["opt"] == {"weights": "a/b.pt", "save_dir": "runs/x", "imgsz": 640}
    assert meta["git"] == {"remote": None, "branch": "main"} and meta["when"] is None
    assert meta["space"]["lr"] == 0.1 and meta["space"]["files"][0].endswith("x")
    assert (meta["seen"], meta["counts"], meta["ordered"]) == ([1, 2], {"a": [1]}, {"b": 2})
    assert (meta["size"], meta["fixed"], meta["whole"], meta["yes"]) == ([1, 2], [3], 7, True)
    assert (meta["device"], meta["dtype"]) == ("cpu", "torch.float16")


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol_that_torch_can_write_is_read(tmp_path, protocol):
    model = as_public("yolov5n.yaml")
    torch.save({"model": model, "epoch": 3}, tmp_path / "a.pt", pickle_protocol=protocol)
    assert_holds(build_model(read_checkpoint(tmp_path / "a.pt")), model)


def test_a_bare_module_and_wrapped_ones_load(tmp_path, pickled_names):
    model = as_public("yolov5n.yaml")
    parallel = nn.DataParallel(model)
    shaped = models.common.AutoShape()
    shaped.model = model
    for content in (model, {"model": parallel}, {"model": shaped, "ema": None}):
        torch.save(content, tmp_path / "a.pt")
        assert_holds(build_model(read_checkpoint(tmp_path / "a.pt")), model)


def test_a_fused_file_loads_and_can_be_trained_on(tmp_path):
    model = as_public("yolov5n.yaml").float()
    torch.save({"model": model}, tmp_path / "whole.pt")
    model.fuse()
    for module in model.modules():  # as the original leaves it: no norm at all
        if isinstance(module, models.common.Conv):
            del module.bn
    torch.save({"model": model}, tmp_path / "fused.pt")
    again = build_model(read_checkpoint(tmp_path / "fused.pt"))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = build_model(read_checkpoint(tmp_path / "whole.pt")).eval()(images)[0]
        torch.testing.assert_close(again.eval()(images)[0], wanted, rtol=1e-3, atol=1e-2)
    assert isinstance(again.model[0].bn, nn.BatchNorm2d)


def test_another_activation_is_taken_over(tmp_path):
    model = as_public("yolov5n.yaml")
    for module in model.modules():
        if isinstance(module, models.common.Conv):
            module.act = nn.LeakyReLU(0.1)
    torch.save({"model": model}, tmp_path / "leaky.pt")
    saved = read_checkpoint(tmp_path / "leaky.pt")
    assert saved.cfg["activation"] == "nn.LeakyReLU(0.1)"
    acts = {type(module.act) for module in build_model(saved).modules() if hasattr(module, "act")}
    assert acts == {nn.LeakyReLU}
    model.model[3].act = nn.Softplus()
    torch.save({"model": model}, tmp_path / "mixed.pt")
    with pytest.raises(UserError, match="its blocks have the activations LeakyReLU, Softplus"):
        read_checkpoint(tmp_path / "mixed.pt")


def test_blocks_with_an_activation_of_their_own_keep_it(tmp_path):
    cfg = {
        "nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": [[10, 12]],
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "BottleneckCSP", [8]], [-1, 1, "MixConv2d", [8]]],
        "head": [[[-1], 1, "Detect", ["nc", "anchors"]]],
    }  # fmt: skip
    model = Model({**cfg, "activation": "nn.ReLU()"})
    model.model[1].act = nn.LeakyReLU(0.1)  # as up to v5.0
    torch.save({"model": model}, tmp_path / "csp.pt")
    again = build_model(read_checkpoint(tmp_path / "csp.pt"))
    assert isinstance(again.model[0].act, nn.ReLU) and isinstance(again.model[2].act, nn.SiLU)
    assert isinstance(again.model[1].act, nn.LeakyReLU) and again.model[1].act.negative_slope == 0.1
    assert again.yaml["csp_activation"] == "nn.LeakyReLU(0.1)"
    model.model[2].act = nn.LeakyReLU(0.1)
    torch.save({"model": model}, tmp_path / "mix.pt")
    with pytest.raises(UserError, match=r"its MixConv2d has the activation nn\.LeakyReLU\(0\.1\)"):
        read_checkpoint(tmp_path / "mix.pt")


def test_a_network_of_unknown_blocks_names_the_layer(tmp_path):
    model = as_public("yolov5n.yaml")
    model.yaml["backbone"][4] = [-1, 1, "SwinBlock", [256]]
    torch.save({"model": model}, tmp_path / "fork.pt")
    saved = read_checkpoint(tmp_path / "fork.pt")
    with pytest.raises(UserError, match=r"fork\.pt: layer 4 \(SwinBlock\) cannot be built: no such block"):
        build_model(saved)


def test_names_that_do_not_fit_the_head_are_left_out(tmp_path):
    model = as_public("yolov5n.yaml")
    model.names = ["only", "two"]
    torch.save({"model": model}, tmp_path / "a.pt")
    assert build_model(read_checkpoint(tmp_path / "a.pt")).names == [f"class{i}" for i in range(4)]


def test_shared_weights_and_views_are_read_where_they_lie(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    module = nn.Module()
    module.weight = nn.Parameter(whole[1:3, 2:5])
    module.turned = nn.Parameter(whole.t())
    module.same = module.weight
    module.empty = nn.Parameter(torch.zeros(0, 3))
    module.register_buffer("passing", torch.ones(2), persistent=False)
    module.register_buffer("flags", torch.tensor([True, False]))
    module.register_buffer("rough", torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
    torch.save({"model": module}, tmp_path / "views.pt")
    state = module_state(load_content(tmp_path / "views.pt")["model"])
    assert sorted(state) == ["empty", "flags", "rough", "same", "turned", "weight"]
    for name in state:
        assert torch.equal(state[name], module.state_dict()[name]), name
    assert state["weight"].data_ptr() == state["same"].data_ptr()


def test_objects_become_records_and_nothing_else(tmp_path):
    torch.save({"model": as_public("yolov5n.yaml")}, tmp_path / "a.pt")
    record = load_content(tmp_path / "a.pt")["model"]
    assert type(record) is Inert and record.kind == "models.yolo.Model"
    assert not hasattr(record, "forward") and not callable(record)


def test_the_public_yolov5n_is_read_built_saved_and_transferred(public_yolov5n, tmp_path):
    saved = read_checkpoint(public_yolov5n)
    assert saved.source == "public" and saved.epoch == -1
    assert (len(saved.names), saved.names[0], saved.names[-1]) == (80, "person", "toothbrush")
    assert saved.cfg["nc"] == 80 and saved.cfg["width_multiple"] == 0.25
    model = build_model(saved).eval()
    assert sum(p.numel() for p in model.parameters()) == 1_872_157
    assert model.anchors_px[2].tolist() == [[116, 90], [156, 198], [373, 326]]
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = model(images)[0]
    assert decoded.isfinite().all() and decoded[..., 4].max() < 0.5  # noise holds no object
    save_checkpoint(tmp_path / "own.pt", model=model, epoch=-1, best_fitness=None, meta={})
    with torch.no_grad():  # it was in half precision: nothing is lost
        assert torch.equal(build_model(read_checkpoint(tmp_path / "own.pt")).eval()(images)[0], decoded)
    assert transfer_weights(Model("yolov5n.yaml", nc=3), saved) == (343, 349)
