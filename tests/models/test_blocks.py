"""Blocks by themselves: what they compute, worked out another way."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.common import SPP
from models.rare_blocks import C3SPP, C3x, Contract, CrossConv, DWConvTranspose2d, Expand, MixConv2d
from models.transformer import C3TR, TransformerBlock, TransformerLayer
from models.yolo import Model
from utils.errors import UserError


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def detector(*rows: list, neck: int = 16) -> dict:
    """A detector of one level whose backbone are these rows."""
    return {
        "nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": [[10, 12]],
        "backbone": [[-1, 1, "Conv", [16, 3, 2]], *rows],
        "head": [[-1, 1, "Conv", [neck, 1, 1]], [[-1], 1, "Detect", ["nc", "anchors"]]],
    }  # fmt: skip


def test_contract_takes_the_cells_of_a_square_phase_by_phase() -> None:
    x = torch.rand(2, 3, 4, 6)
    y = Contract(2)(x)
    assert y.shape == (2, 12, 2, 3)
    phases = [x[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
    assert torch.equal(y, torch.cat(phases, 1))


@pytest.mark.parametrize("gain", [1, 2, 3])
def test_expand_undoes_contract(gain: int) -> None:
    x = torch.rand(2, 5, 6, 12).to(memory_format=torch.channels_last)
    assert torch.equal(Expand(gain)(Contract(gain)(x)), x)


def test_a_cross_conv_is_a_row_and_a_column() -> None:
    block = CrossConv(8, 8, 3, 1, 2, 0.5, True).eval()
    assert block.cv1.conv.weight.shape == (4, 8, 1, 3) and block.cv2.conv.weight.shape == (8, 2, 3, 1)
    x = torch.rand(2, 8, 5, 7)
    torch.testing.assert_close(block(x), x + block.cv2(block.cv1(x)))
    strided = CrossConv(8, 8, 3, 2, shortcut=True)
    assert strided(x).shape == (2, 8, 3, 4) and not strided.add


def test_the_cross_stage_blocks_have_their_part_in_the_middle() -> None:
    x, (pooled, crossed, attending) = torch.rand(1, 8, 6, 4), (C3SPP(8, 12), C3x(8, 12, 2), C3TR(8, 16, 2))
    for block, kind in ((pooled, SPP), (crossed.m[1], CrossConv), (attending, TransformerBlock)):
        assert isinstance(block if kind is CrossConv else block.m, kind)
    for block, channels in ((pooled, 12), (crossed, 12), (attending, 16)):
        block.eval()
        halves = torch.cat((block.m(block.cv1(x)), block.cv2(x)), 1)
        assert block(x).shape == (1, channels, 6, 4)
        torch.testing.assert_close(block(x), block.cv3(halves))


@pytest.mark.parametrize(
    ("c2", "k", "equal", "counts"),
    [(8, (1, 3), True, [4, 4]), (64, (1, 3, 5), True, [22, 21, 21]), (64, (1, 3), False, [58, 6])],
)
def test_mixed_convolutions_share_the_channels(c2: int, k: tuple, equal: bool, counts: list) -> None:
    block = MixConv2d(16, c2, k, 2, equal).eval()
    assert [convolution.out_channels for convolution in block.m] == counts
    assert [convolution.groups for convolution in block.m] == [math.gcd(16, count) for count in counts]
    x = torch.rand(2, 16, 6, 8)
    y = block(x)
    assert y.shape == (2, c2, 3, 4)
    last = F.silu(
        F.conv2d(x, block.m[-1].weight, None, 2, k[-1] // 2, 1, block.m[-1].groups) / math.sqrt(1.001)
    )
    torch.testing.assert_close(y[:, -counts[-1] :], last)


def test_a_transformer_layer_attends_with_every_head() -> None:
    tokens, width, heads = torch.rand(6, 2, 8), 8, 4
    layer = TransformerLayer(width, heads)
    nn.init.normal_(layer.ma.in_proj_bias)
    weights, biases = layer.ma.in_proj_weight.chunk(3), layer.ma.in_proj_bias.chunk(3)
    parts = [F.linear(linear(tokens), weight, bias) for linear, weight, bias in zip(
        (layer.q, layer.k, layer.v), weights, biases, strict=True
    )]  # fmt: skip
    query, key, value = (part.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for part in parts)
    score = (query @ key.transpose(2, 3) / math.sqrt(width / heads)).softmax(-1)
    attended = layer.ma.out_proj((score @ value).permute(2, 0, 1, 3).flatten(2)) + tokens
    torch.testing.assert_close(layer(tokens), layer.fc2(layer.fc1(attended)) + attended)


def test_a_transformer_block_keeps_every_cell_in_its_place() -> None:
    block = TransformerBlock(6, 8, 4, 2).eval()
    for layer in block.tr:  # nothing but the skip connections is left
        for weight in (layer.ma.out_proj.weight, layer.fc2.weight):
            nn.init.zeros_(weight)
    x = torch.rand(2, 6, 3, 5)
    mapped = block.conv(x)
    wanted = mapped + torch.einsum("bchw,dc->bdhw", mapped, block.linear.weight)
    torch.testing.assert_close(block(x), wanted + block.linear.bias[:, None, None])
    assert TransformerBlock(8, 8, 4, 1).conv is None


def test_names_are_those_of_public_files() -> None:
    names = set(C3TR(8, 16, 2).state_dict())
    for layer in ("m.tr.0", "m.tr.1"):
        for part in ("q.weight", "ma.in_proj_weight", "ma.in_proj_bias", "ma.out_proj.bias", "fc2.weight"):
            assert f"{layer}.{part}" in names
    assert {"m.linear.weight", "m.linear.bias"} <= names and "m.tr.0.q.bias" not in names
    assert {"m.0.weight", "bn.weight"} <= set(MixConv2d(4, 4).state_dict())


def test_a_network_of_all_of_them_is_trained_fused_and_at_its_strides() -> None:
    rows = [
        [-1, 2, "CrossConv", [16, 3, 1]], [-1, 1, "MixConv2d", [32, [1, 3], 2]], [-1, 2, "C3x", [32]],
        [-1, 1, "C3SPP", [32, [3, 5]]], [-1, 1, "Contract", [2]], [-1, 1, "C3TR", [64]],
        [-1, 1, "Expand", [2]], [-1, 1, "DWConvTranspose2d", [16, 2, 2]],
        [-1, 1, "nn.ConvTranspose2d", [16, 4, 2, 1]],
    ]  # fmt: skip
    model = Model(detector(*rows))
    assert model.stride.tolist() == [1] and model.size_multiple == 8
    images = torch.rand(2, 3, 16, 24)
    (level,) = model(images)
    assert level.shape == (2, 1, 16, 24, 7)
    level.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        before = model.eval()(images)[0]
        torch.testing.assert_close(model.fuse()(images)[0], before, rtol=1e-4, atol=1e-4)


def test_a_transposed_depthwise_convolution_has_a_group_a_channel() -> None:
    block = DWConvTranspose2d(8, 4, 2, 2)
    assert block.groups == 4 and block(torch.rand(1, 8, 3, 5)).shape == (1, 4, 6, 10)


def test_operations_of_every_kind_of_layer_are_counted() -> None:
    bare, more = (Model(detector(*rows)) for rows in ([], [[-1, 1, "C3TR", [16]]]))
    # At half of the image's sides; 1x1 Convs 16 to 8 (twice) and 16 to 16, linear maps of 8 channels.
    weights = 2 * 16 * 8 + 16 * 16 + (1 + 3 + 2 + 4) * 8 * 8
    added = more.summary(64).gflops - bare.summary(64).gflops
    assert added == pytest.approx(2 * weights * 32**2 / 1e9, rel=1e-6)
    up = Model(detector([-1, 1, "nn.ConvTranspose2d", [16, 2, 2]], [-1, 1, "nn.MaxPool2d", [2, 2]]))
    assert up.summary(64).gflops - bare.summary(64).gflops == pytest.approx(
        2 * 16 * 16 * 4 * 32**2 / 1e9, rel=1e-6
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (["Contract", [0]], "gain must be a whole number from 1 to 16, not 0"),
        (["Contract", [True]], "gain must be"),
        (["Expand", [17]], "gain must be"),
        (["Expand", [3]], "16 channels are not a multiple of 9"),
        (["Contract", [2]], "cannot be repeated"),
        (["Conv", [16, 3, [2, 2]]], "stride must be a whole number"),
        (["MixConv2d", [16, [1] * 17]], "must be a list of 1 to 16 odd numbers"),
        (["SPP", [16, [5] * 17]], "must be a list of 1 to 16 odd numbers"),
        (["C3SPP", [16, 5]], "must be a list of 1 to 16 odd numbers, not 5"),
        (["MixConv2d", [16, [1, 4]]], "odd numbers"),
        (["MixConv2d", [8, [1, 3, 5], 1, False]], "8 channels are too few for 3 kernel sizes"),
        (["C3TR", [16, True, 1, 0.4]], "layer 1 .C3TR. cannot be built: 6 channels are not a multiple of 4"),
    ],
)
def test_arguments_that_fit_no_block_are_refused(row: list, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Model(detector([-1, 2 if words == "cannot be repeated" else 1, *row]))
