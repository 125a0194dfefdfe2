"""Networks from YAML against the public ones: sizes, names, outputs."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from models.common import Conv
from models.config import FOLDER
from models.yolo import Model, ModelSummary
from utils.errors import UserError

REFERENCE = json.loads((Path(__file__).parent / "forward_reference.json").read_text())
# cfg: classes, parameters in training, parameters fused
SIZES = {
    "yolov5n.yaml": (80, 1_872_157, 1_867_405),
    "yolov5s.yaml": (80, 7_235_389, 7_225_885),
    "yolov5m.yaml": (80, 21_190_557, 21_172_173),
    "yolov5l.yaml": (80, 46_563_709, 46_533_693),
    "yolov5x.yaml": (80, 86_749_405, 86_705_005),
    "v5.0/yolov5s.yaml": (80, 7_276_605, 7_266_973),
    "v5.0/yolov5m.yaml": (80, 21_375_645, 21_356_877),
    "v5.0/yolov5l.yaml": (80, 47_056_765, 47_025_981),
    "v5.0/yolov5x.yaml": (80, 87_775_965, 87_730_285),
    "hub/yolov5n6.yaml": (80, 3_246_940, 3_239_884),
    "hub/yolov5s6.yaml": (80, 12_626_620, 12_612_508),
    "hub/yolov5m6.yaml": (80, 35_731_932, 35_704_908),
    "hub/yolov5l6.yaml": (80, 76_770_172, 76_726_332),
    "hub/yolov5x6.yaml": (80, 140_794_780, 140_730_220),
    "hub/yolov3.yaml": (80, 61_949_149, 61_922_845),
    "hub/yolov3-spp.yaml": (80, 62_998_749, 62_971_933),
    "hub/yolov3-tiny.yaml": (80, 8_852_366, 8_849_182),
}
GFLOPS = {
    "yolov5n.yaml": 4.5,
    "yolov5s.yaml": 16.5,
    "yolov5m.yaml": 49.0,
    "yolov5l.yaml": 109.1,
    "yolov5x.yaml": 205.7,
}
STRIDES = {
    "yolov5-p2": [4, 8, 16, 32], "yolov5-p34": [8, 16], "yolov5-p6": [8, 16, 32, 64],
    "yolov5-p7": [8, 16, 32, 64, 128], "yolov3-tiny": [16, 32],
}  # fmt: skip
SHIPPED = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))


def on_meta(cfg, **settings):
    """A network without memory: shapes are all that counts."""
    with torch.device("meta"):
        return Model(cfg, **settings)


def small(**changes):
    """A complete detector of four layers and two levels."""
    cfg = {
        "nc": 3, "depth_multiple": 1.0, "width_multiple": 1.0,
        "anchors": [[10, 12, 20, 24], [30, 36, 60, 50]],
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "C3", [16]]],
        "head": [[-1, 1, "Conv", [16, 3, 2]], [[-1], 1, "Concat", [1]], [[1, 3], 1, "Detect", []]],
    }  # fmt: skip
    return {**cfg, **changes}


def randomised(model):
    """Fills a network so that no part of it is the identity: statistics of norms too."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        elif name.endswith(("running_mean", "bn.bias")):
            value.normal_(0, 0.3, generator=generator)
    return model


def filled_by_name(model):
    """Fills a network as the reference values were: from the checksum of each entry's name."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point() or "anchor" in name:
            continue
        a = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(value.shape))
        a = a.astype(np.float32)
        if "running_var" in name:
            a = 1 + 0.2 * np.abs(a)
        elif name.endswith("bn.weight"):
            a = 1 + 0.1 * a
        else:
            a = a / math.sqrt(np.prod(a.shape[1:])) if a.ndim == 4 else 0.1 * a
        value.copy_(torch.from_numpy(np.asarray(a, np.float32)))
    return model.eval()


@pytest.mark.parametrize("cfg", REFERENCE)
def test_decoded_outputs_are_those_of_the_original(cfg):
    wanted = REFERENCE[cfg]
    model = filled_by_name(Model(cfg, nc=wanted["nc"]))
    assert sum(p.numel() for p in model.parameters()) == wanted["parameters"]
    shape = (wanted["batch"], 3, wanted["height"], wanted["width"])
    images = torch.from_numpy(np.random.RandomState(wanted["seed"]).random_sample(shape)).float()
    with torch.no_grad():
        decoded, levels = model(images)
    assert list(decoded.shape) == wanted["decoded_shape"]
    assert model.stride.tolist() == wanted["stride"]
    assert [tuple(level.shape) for level in levels] == [
        (wanted["batch"], 3, wanted["height"] // s, wanted["width"] // s, wanted["nc"] + 5)
        for s in (8, 16, 32)
    ]
    sample = decoded.flatten()[wanted["sample_index"]]
    torch.testing.assert_close(sample, torch.tensor(wanted["sample_value"]), rtol=1e-4, atol=1e-3)
    assert decoded.double().sum().item() == pytest.approx(wanted["decoded_sum"], rel=1e-6)


@pytest.mark.parametrize("cfg", SIZES)
def test_every_size_has_the_public_parameter_counts(cfg):
    classes, trained, fused = SIZES[cfg]
    model = on_meta(cfg)
    assert model.nc == classes
    assert sum(p.numel() for p in model.parameters()) == trained
    assert sum(p.numel() for p in model.fuse().parameters()) == fused


def test_the_class_count_changes_the_head_only():
    assert sum(p.numel() for p in on_meta("yolov5s.yaml", nc=20).parameters()) == 7_073_569
    assert sum(p.numel() for p in on_meta("v5.0/yolov5s.yaml", nc=20).parameters()) == 7_114_785


@pytest.mark.parametrize("cfg", GFLOPS)
def test_operations_are_those_published(cfg):
    # Published to one decimal, and counted with a few operations beside the convolutions' (under 0.5 %).
    assert on_meta(cfg).summary(640).gflops == pytest.approx(GFLOPS[cfg], rel=0.005, abs=0.05)


@pytest.mark.parametrize("cfg", SHIPPED)
def test_every_shipped_config_runs_at_the_strides_it_declares(cfg):
    model = on_meta(cfg, nc=7)
    height, width = model.size_multiple * 2, model.size_multiple
    with torch.device("meta"):
        features = model.forward_features(torch.zeros(2, 3, height, width))
        levels = model.forward_head(features)
    strides = [int(stride) for stride in model.stride.tolist()]
    assert strides == STRIDES.get(Path(cfg).stem, strides)
    for level, feature, stride in zip(levels, features, strides, strict=True):
        assert level.shape == (2, model.head.na, height // stride, width // stride, 12)
        assert feature.shape[2:] == level.shape[2:4]
    assert model.head.anchors.shape == (len(strides), model.head.na, 2)
    sizes = model.anchors_px.prod(2).mean(1)
    assert (sizes.diff() > 0).all(), "anchors must grow from level to level"


def test_state_dict_names_are_those_of_public_files():
    names = list(on_meta("yolov5n.yaml").state_dict())
    assert len(names) == 349
    for name in (
        "model.0.conv.weight", "model.0.bn.running_var", "model.2.cv3.conv.weight", "model.2.m.0.cv2.bn.bias",
        "model.9.cv2.conv.weight", "model.24.anchors", "model.24.m.2.bias",
    ):  # fmt: skip
        assert name in names
    old = list(on_meta("v5.0/yolov5s.yaml").state_dict())
    assert "model.0.conv.conv.weight" in old and "model.8.cv1.conv.weight" in old
    assert "model.1.cv1.conv.weight" not in old


def test_biases_start_at_rare_objects_and_rare_classes():
    torch.manual_seed(0)
    model = Model("yolov5n.yaml", nc=4)
    for convolution, stride in zip(model.head.m, (8, 16, 32), strict=True):
        bias = convolution.bias.detach().view(3, 9)
        default = 1 / math.sqrt(convolution.in_channels)  # the bound of torch's own start
        assert (bias[:, 4] - math.log(8 / (640 / stride) ** 2)).abs().max() <= default
        assert (bias[:, 5:] - math.log(0.6 / (4 - 0.99999))).abs().max() <= default
        assert bias[:, :4].abs().max() <= default


@pytest.mark.parametrize(
    "cfg", ["yolov5n.yaml", "v5.0/yolov5n.yaml", "hub/yolov3-tiny.yaml", "hub/yolov5s-ghost.yaml"]
)
def test_fused_networks_give_the_same(cfg):
    model = randomised(Model(cfg, nc=3)).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        features = model.forward_features(images)
        before = model(images)[0]
        assert model.fuse() is model
        after = model(images)[0]
    assert features[0].std() > 0
    # float32 sums in another order; boxes are up to hundreds of px
    torch.testing.assert_close(after, before, rtol=1e-3, atol=5e-3)
    assert not any(isinstance(m, Conv) and not isinstance(m.bn, nn.Identity) for m in model.modules())
    assert not any(module.training for module in model.modules())


def test_fusing_twice_changes_nothing_more():
    model = randomised(Model(small())).fuse()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.fuse()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_gives_raw_levels_and_evaluation_decodes_them():
    model = Model(small())
    images = torch.rand(1, 3, 32, 32)
    levels = model(images)
    assert [tuple(level.shape) for level in levels] == [(1, 2, 16, 16, 8), (1, 2, 8, 8, 8)]
    with torch.no_grad():
        decoded, raw = model.eval()(images)
    assert decoded.shape == (1, 2 * (16 * 16 + 8 * 8), 8)
    assert torch.equal(decoded, model.decode_levels(raw))


def test_every_parameter_gets_a_gradient():
    model = Model("yolov5n.yaml", nc=2)
    sum(level.square().mean() for level in model(torch.rand(1, 3, 64, 64))).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_memory_order_does_not_change_the_output():
    model = randomised(Model(small())).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)[0]
        order = torch.channels_last
        channels_last = model.to(memory_format=order)(images.to(memory_format=order))[0]
    torch.testing.assert_close(channels_last, plain, rtol=1e-4, atol=1e-4)


def test_the_summary_of_a_tiny_network_does_not_say_that_it_computes_nothing():
    assert "0.031 GFLOPs at 64 px" in str(ModelSummary(270, 459_121, 459_121, 0.0312, 64))
    assert " 16.5 GFLOPs" in str(ModelSummary(270, 7_000_000, 7_000_000, 16.49, 640))


def test_the_summary_counts_and_leaves_the_model_as_it_was():
    model = Model(small())
    model.model[0].requires_grad_(False)
    model.model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    summary = model.summary(320)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    frozen = sum(p.numel() for p in model.model[0].parameters())
    assert summary.parameters - summary.gradients == frozen == 3 * 8 * 9 + 16
    # by hand: multiplications an output cell, over cells a pixel, level by level
    c3 = 8 * 8 + 8 * 8 + 16 * 16 + (8 * 8 + 8 * 8 * 9)
    macs = (27 * 8 + c3 + 16 * 16) / 4 + (16 * 16 * 9 + 16 * 16) / 16
    assert summary.gflops == pytest.approx(2 * macs * 320**2 / 1e9)
    assert str(summary).startswith(f"{summary.layers} layers, {summary.parameters:,} parameters")


def test_augmented_predictions_lie_where_the_plain_ones_do():
    torch.manual_seed(0)
    model = randomised(Model("yolov5n.yaml", nc=2)).eval()
    with torch.no_grad():
        model.head.m[2].bias.view(3, 7)[:, :2] = 0  # centres in the middle of the cells
        model.head.m[2].weight.zero_()
        images = torch.rand(1, 3, 128, 160)
        plain = model(images)[0]
        together = model.forward_augmented(images)
    full = 3 * (16 * 20 + 8 * 10 + 4 * 5)
    assert plain.shape[1] == full
    # 128 x 160: .83 gives 106 x 132, padded to 128 x 160; .67 gives 85 x 107, padded to 96 x 128
    small_scale = 3 * (6 * 8 + 3 * 4)
    assert together.shape == (1, 3 * (16 * 20 + 8 * 10) + full + small_scale, 7)
    torch.testing.assert_close(together[:, : 3 * (16 * 20 + 8 * 10)], plain[:, : 3 * (16 * 20 + 8 * 10)])
    mirrored = together[0, 3 * (16 * 20 + 8 * 10) :][:full][-3 * 4 * 5 :].view(3, 4, 5, 7)
    wanted_x = 160 - (torch.arange(5) + 0.5) * 32 / 0.83
    torch.testing.assert_close(mirrored[0, 0, :, 0], wanted_x, rtol=0, atol=1e-3)
    wanted_y = (torch.arange(4) + 0.5) * 32 / 0.83
    torch.testing.assert_close(mirrored[1, :, 2, 1], wanted_y, rtol=0, atol=1e-3)


def test_an_activation_named_in_the_config_replaces_silu():
    model = Model(small(activation="nn.LeakyReLU(0.2)"))
    kinds = {type(module) for module in model.modules()}
    assert nn.SiLU not in kinds
    assert all(module.negative_slope == 0.2 for module in model.modules() if isinstance(module, nn.LeakyReLU))
    assert model.model[0].act.negative_slope == 0.2
    with pytest.raises(UserError, match=r"activation .*os\.system.* is not known"):
        Model(small(activation="os.system('true')"))
    for text in ("nn.LeakyReLU(-)", "nn.SiLU(0.1.2)"):
        with pytest.raises(UserError, match=r"activation .* cannot be built"):
            Model(small(activation=text))


def test_layers_that_do_not_fit_together_are_told_where_an_image_goes_through():
    pooled = [[-1, 1, "nn.MaxPool2d", [2, 2, 0]], [-1, 1, "nn.MaxPool2d", [3, 1, 0]]]
    model = Model(small(head=[*pooled, [[1, 3], 1, "Detect", ["nc", "anchors"]]]))
    with pytest.raises(UserError, match=r"the network: its layer 3, MaxPool2d, does not fit to the others"):
        model.summary(64)


def test_augmented_predictions_leave_out_a_level_whatever_the_order_and_keep_a_single_one():
    torch.manual_seed(0)
    images, heads = torch.rand(1, 3, 64, 64), ([1, 2], [2, 1], [1])
    counts = []
    for levels in heads:
        anchors = [[4 * level, 4 * level] for level in levels]
        head = [[-1, 1, "Conv", [16, 3, 2]], [levels, 1, "Detect", ["nc", "anchors"]]]
        with torch.no_grad():
            counts.append(Model(small(head=head, anchors=anchors)).eval().forward_augmented(images).shape[1])
    assert counts[0] == counts[1] and counts[2] > 0


def test_anchors_and_classes_that_are_passed_go_before_the_configs():
    model = Model(small(), nc=5, anchors=[[1, 2], [3, 4]])
    assert (model.nc, model.yaml["nc"], model.head.na) == (5, 5, 1)
    assert model.anchors_px.tolist() == [[[1, 2]], [[3, 4]]]
    assert model.names == [f"class{i}" for i in range(5)]
    counted = Model(small(), anchors=4)
    assert counted.head.anchors.shape == (2, 4, 2)
    assert len(torch.unique(counted.anchors_px.flatten(0, 1), dim=0)) == 8


def test_the_config_that_is_passed_stays_as_it_was():
    cfg = small()
    Model(cfg, nc=9, anchors=2)
    assert cfg == small()


def test_a_config_is_found_by_name_and_a_near_miss_is_pointed_at():
    assert on_meta("models/yolov5n.yaml").yaml == on_meta(FOLDER / "yolov5n.yaml").yaml
    assert on_meta("yolov3-tiny.yaml").head.nl == 2
    with pytest.raises(UserError, match=r"yolov5z\.yaml: no such network config; did you mean models/yolov5"):
        Model("yolov5z.yaml")


BROKEN = {
    "layer 1 (C3y) cannot be built: no such block; did you mean C3": small(
        backbone=[[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "C3y", [16]]]
    ),
    "layer 1 (C3) cannot be built: `from` 7": small(backbone=[[-1, 1, "Conv", [8]], [7, 1, "C3", [16]]]),
    "layer 0 (Conv) cannot be built: `from` -2": small(backbone=[[-2, 1, "Conv", [8]]]),
    "layer 0 (Conv) cannot be built: its channels": small(backbone=[[-1, 1, "Conv", ["8"]]]),
    "layer 0 (Conv) cannot be built: its repeats": small(backbone=[[-1, 0, "Conv", [8]]]),
    "layer 0 (Conv) cannot be built: its arguments must be a list": small(backbone=[[-1, 1, "Conv", 8]]),
    "layer 0 ([-1, 1, 'Conv'])": small(backbone=[[-1, 1, "Conv"]]),
    "layer 0 (Conv) cannot be built: 32768 channels": small(backbone=[[-1, 1, "Conv", [32768]]]),
    "layer 0 (Conv) cannot be built: its stride must be a whole number above 0, not 0": small(
        backbone=[[-1, 1, "Conv", [8, 3, 0]], [-1, 1, "C3", [16]]]
    ),
    "layer 2 (nn.MaxPool2d) cannot be built: its stride must be a whole number above 0, not 0.5": small(
        head=[[-1, 1, "nn.MaxPool2d", [2, 0.5]]]
    ),
    "layer 2 (nn.MaxPool2d) cannot be built: its stride must be a whole number above 0, not [2, 2]": small(
        head=[[-1, 1, "nn.MaxPool2d", [[2, 2]]]]
    ),
    "layer 2 (nn.MaxPool2d) cannot be built: its stride of 2048 px is more than 1024": small(
        head=[[-1, 1, "nn.MaxPool2d", [2, 1024]]]
    ),
    "layer 2 (nn.ZeroPad2d) cannot be built: all padding together is more than 64": small(
        head=[[-1, 1, "nn.ZeroPad2d", [[40, 40, 0, 0]]]]
    ),
    "layer 2 (Conv) cannot be built: all padding together is more than 64": small(
        head=[[-1, 1, "Conv", [8, 1, 1, 4000]]]
    ),
    "layer 2 (nn.ConvTranspose2d) cannot be built: all padding together is more than 64": small(
        head=[[-1, 1, "nn.ConvTranspose2d", [8, 200, 2]]]
    ),
    "layer 2 (Bottleneck) cannot be built: 16000 channels at a stride of 2 px": small(
        head=[[-1, 1, "Bottleneck", [16, True, 1, 1000]]]
    ),
    "layer 3 (nn.Upsample) cannot be built: 16 channels at a stride of 0.03125 px": small(
        head=[[-1, 1, "nn.Upsample", [None, 8]], [-1, 1, "nn.Upsample", [None, 8]]]
    ),
    "layer 2 (nn.Upsample) cannot be built: it takes [None, a whole factor, mode], not [None, 0]": small(
        head=[[-1, 1, "nn.Upsample", [None, 0]]]
    ),
    "layer 3 (Concat) cannot be built: its inputs have different strides: 4, 2": small(
        head=[[-1, 1, "Conv", [16, 3, 2]], [[-1, 1], 1, "Concat", [1]], [[1, 3], 1, "Detect", []]]
    ),
    "layer 2 (nn.Upsample) cannot be built: it takes": small(head=[[-1, 1, "nn.Upsample", [None, 1.5]]]),
    "layer 2 (nn.Upsample) cannot be built: its mode is 'foo'": small(
        head=[[-1, 1, "nn.Upsample", [None, 2, "foo"]]]
    ),
    "layer 2 (GhostBottleneck) cannot be built: from 16 to 32 channels": small(
        head=[[-1, 1, "GhostBottleneck", [32]]]
    ),
    "layer 2 (Detect) cannot be built: Detect must be the last": small(
        head=[[[1], 1, "Detect", []], [-1, 1, "Conv", [8]]]
    ),
    "its last layer is not Detect": small(head=[[-1, 1, "Conv", [8]]]),
    "it has anchors for 2 levels and Detect has 1": small(head=[[[1], 1, "Detect", ["nc", "anchors"]]]),
    "it has no list of layers `backbone`": small(backbone=None),
    "anchors are [[1, 2], [3]]": small(anchors=[[1, 2], [3]]),
    "anchors are None": small(anchors=None),
    "nc is many": small(nc="many"),
    "nc is 0": small(nc=0),
    "width_multiple is -1": small(width_multiple=-1),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_wrong_config_names_the_file_and_the_layer(message, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(BROKEN[message]))
    with pytest.raises(UserError) as caught:
        Model(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_file_that_is_no_config_is_refused(tmp_path):
    slips = "depth_mutiple: .33\nnc: 3\nactivaton: nn.ReLU\n"
    for text, message in (
        ("[1, 2]", "needs 'key: value' lines"),
        ("a: [", "is not valid YAML"),
        ("nc: 2\nwidth_multiple: 1\nnc: 3\n", "nc"),
        ("nc: 2\non: true\n0x10: 2\n<<: {foo: 3}\n", "unknown key 'foo'.*unknown key 'True'"),
        (slips, "line 1: unknown key 'depth_mutiple', did you mean 'depth_multiple'.*; line 3: .*activation"),
    ):
        (tmp_path / "odd.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            Model(tmp_path / "odd.yaml")


def test_augmented_predictions_have_the_cells_of_the_original_where_a_scaled_side_is_truncated():
    """96 x .67 is 64.32: the image has 64 px then, and the original pads it to 96."""
    model = Model("yolov5n.yaml", nc=2).eval()
    with torch.no_grad():
        found = model.forward_augmented(torch.rand(1, 3, 96, 128))
    full, small_scale = (3 * (rows * columns * (16 + 4 + 1)) for rows, columns in ((3, 4), (3, 3)))
    assert found.shape[1] == full - 3 * 12 + full + small_scale - 3 * 9 * 16
