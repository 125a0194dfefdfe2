"""Construction of a network's layers from the rows of its YAML.

A row is `[from, repeats, block, arguments]`. `from` is the index of the layer that feeds this one (negative:
relative to this row), or a list of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from models import common, rare_blocks, transformer
from utils.config.suggestions import near_names, question
from utils.errors import UserError

CHANNEL_STEP = 8
# Far above any real network; they keep a damaged file from exhausting the memory.
MAX_ROWS, MAX_REPEATS, MAX_CHANNELS = 1000, 200, 16384
MAX_REPEATS_IN_ALL = 2000
MAX_GAIN = 16  # for Contract and Expand
MAX_STRIDE = 1024
# Outputs of a convolution per pixel of the image, and cells by which a network may pad its maps altogether.
MAX_VALUES_PER_PIXEL, MAX_PADDING = 1024, 64
MAX_PARAMETERS = 2**30  # 4 GiB; the largest shipped network has an eighth of that


@dataclass(frozen=True)
class Port:
    """The output of a layer: its channels, and its stride in image pixels per cell."""

    channels: int
    stride: float


@dataclass(frozen=True)
class Layers:
    """The layers of a network without its Detect head.

    sources: for each layer, and finally for the head, the indices of the layers that feed it; -1 is
    the image. ports: the output of each layer. detect: the ports that feed the head.
    """

    modules: list[nn.Module]
    sources: list[tuple[int, ...]]
    ports: list[Port]
    detect: list[Port]


Built = tuple[nn.Module, Port]


@dataclass(frozen=True)
class _Row:
    """A row with its inputs resolved and its repeats scaled. width: the network's `width_multiple`."""

    repeats: int
    arguments: list[Any]
    inputs: list[Port]
    width: float

    def out_channels(self) -> int:
        """Return the first argument as a channel count, scaled to the network's width."""
        count = self.arguments[0]
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"its channels must be a whole number above 0, not {count!r}")
        scaled = math.ceil(count * self.width / CHANNEL_STEP) * CHANNEL_STEP
        if scaled > MAX_CHANNELS:
            raise ValueError(f"{scaled} channels are more than {MAX_CHANNELS}")
        return scaled

    def argument(self, index: int, default: Any) -> Any:
        """Return an optional argument."""
        return self.arguments[index] if index < len(self.arguments) else default


UPSAMPLINGS = ("nearest", "nearest-exact", "bilinear", "bicubic")

Block = Callable[..., nn.Module]
Builder = Callable[[_Row], Built]


def _block(kind: Block, stride_at: int | None = None, stride: int = 1, transposed: bool = False) -> Builder:
    """Return a builder for a block with arguments (c1, c2, ...), whose repeats are chained.

    stride_at: index of the stride in the row's arguments; None if it is always `stride`. transposed: whether
    the stride upsamples.
    """

    def build(row: _Row) -> Built:
        c2, factor = row.out_channels(), stride if stride_at is None else _stride(row.argument(stride_at, 1))
        modules = []
        channels = row.inputs[0].channels
        for _ in range(row.repeats):
            modules.append(kind(channels, c2, *row.arguments[1:]))
            channels = c2
        source, factor = row.inputs[0].stride, factor**row.repeats
        port = Port(c2, source / factor if transposed else source * factor)
        return modules[0] if len(modules) == 1 else nn.Sequential(*modules), port

    return build


def _stride(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"its stride must be a whole number above 0, not {value!r}")
    return value


def _stack(kind: Block) -> Builder:
    """Return a builder for a block with arguments (c1, c2, n, ...), which repeats something internally."""

    def build(row: _Row) -> Built:
        source, c2 = row.inputs[0], row.out_channels()
        return kind(source.channels, c2, row.repeats, *row.arguments[1:]), Port(c2, source.stride)

    return build


def _concat(row: _Row) -> Built:
    strides = [source.stride for source in row.inputs]
    if len(set(strides)) > 1:
        raise ValueError(f"its inputs have different strides: {_listed(strides)}")
    return common.Concat(row.argument(0, 1)), Port(sum(source.channels for source in row.inputs), strides[0])


def _upsample(row: _Row) -> Built:
    size, scale, mode = (*row.arguments, "nearest")[:3]
    if size is not None or isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
        raise ValueError(f"it takes [None, a whole factor, mode], not {row.arguments!r}")
    if mode not in UPSAMPLINGS:
        raise ValueError(f"its mode is {mode!r}, known are {', '.join(UPSAMPLINGS)}")
    source = row.inputs[0]
    return nn.Upsample(None, scale, mode), Port(source.channels, source.stride / scale)


def _max_pool(row: _Row) -> Built:
    source, stride = row.inputs[0], _stride(row.argument(1, row.arguments[0]))
    return nn.MaxPool2d(*row.arguments), Port(source.channels, source.stride * stride)


def _contract(row: _Row) -> Built:
    gain, source = _gain(row), row.inputs[0]
    return rare_blocks.Contract(gain), Port(source.channels * gain**2, source.stride * gain)


def _expand(row: _Row) -> Built:
    gain, source = _gain(row), row.inputs[0]
    if source.channels % gain**2:
        raise ValueError(f"{source.channels} channels are not a multiple of {gain**2}")
    return rare_blocks.Expand(gain), Port(source.channels // gain**2, source.stride / gain)


def _gain(row: _Row) -> int:
    if row.repeats > 1:
        raise ValueError("it cannot be repeated: write a row for each")
    gain = row.argument(0, 2)
    if isinstance(gain, bool) or not isinstance(gain, int) or not 1 <= gain <= MAX_GAIN:
        raise ValueError(f"its gain must be a whole number from 1 to {MAX_GAIN}, not {gain!r}")
    return gain


def _batch_norm(row: _Row) -> Built:
    return common.batch_norm(row.inputs[0].channels), row.inputs[0]


def _zero_pad(row: _Row) -> Built:
    return nn.ZeroPad2d(tuple(row.arguments[0])), row.inputs[0]


BLOCKS: dict[str, Builder] = {
    "Conv": _block(common.Conv, stride_at=2),
    "DWConv": _block(common.DWConv, stride_at=2),
    "GhostConv": _block(common.GhostConv, stride_at=2),
    "CrossConv": _block(rare_blocks.CrossConv, stride_at=2),
    "MixConv2d": _block(rare_blocks.MixConv2d, stride_at=2),
    "DWConvTranspose2d": _block(rare_blocks.DWConvTranspose2d, stride_at=2, transposed=True),
    "GhostBottleneck": _block(common.GhostBottleneck, stride_at=2),
    "Focus": _block(common.Focus, stride=2),
    "Bottleneck": _block(common.Bottleneck),
    "SPP": _block(common.SPP),
    "SPPF": _block(common.SPPF),
    "C3SPP": _block(rare_blocks.C3SPP),
    "C3": _stack(common.C3),
    "C3x": _stack(rare_blocks.C3x),
    "C3TR": _stack(transformer.C3TR),
    "C3Ghost": _stack(common.C3Ghost),
    "BottleneckCSP": _stack(common.BottleneckCSP),
    "Concat": _concat,
    "Contract": _contract,
    "Expand": _expand,
    "nn.ConvTranspose2d": _block(nn.ConvTranspose2d, stride_at=2, transposed=True),
    "nn.Upsample": _upsample,
    "nn.MaxPool2d": _max_pool,
    "nn.ZeroPad2d": _zero_pad,
    "nn.BatchNorm2d": _batch_norm,
}

ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "LeakyReLU": nn.LeakyReLU,
    "Hardswish": nn.Hardswish,
    "Mish": nn.Mish,
    "GELU": nn.GELU,
    "ELU": nn.ELU,
    "Identity": nn.Identity,
}


def build_layers(cfg: Mapping[str, Any], channels: int, where: object) -> Layers:
    """Build the layers that a config describes, for images with that many channels.

    Raises UserError, with `where` (the file) and the layer's index, if a layer cannot be built. Under
    `torch.device("meta")` this takes no memory, however large the layers are.
    """
    rows = [*_rows(cfg, "backbone", where), *_rows(cfg, "head", where)]
    if len(rows) > MAX_ROWS:
        raise UserError(f"it has {len(rows)} layers", where, f"a network may have {MAX_ROWS}")
    depth, width = (_multiple(cfg, f"{side}_multiple", where) for side in ("depth", "width"))
    image = Port(channels, 1)
    built, parameters, repeated, padding = Layers([], [], [], []), 0, 0, 0
    for index, row in enumerate(rows):
        name = row[2] if isinstance(row, list) and len(row) == 4 else row
        try:
            source, repeats, name, arguments = row
            sources = _sources(source, index)
            inputs = [built.ports[i] if i >= 0 else image for i in sources]
            built.sources.append(sources)
            if name == "Detect":
                if index != len(rows) - 1:
                    raise ValueError("Detect must be the last layer")
                built.detect.extend(inputs)
                return built
            ready = _Row(_repeats(repeats, depth), _plain_arguments(arguments), inputs, width)
            repeated += ready.repeats
            if repeated > MAX_REPEATS_IN_ALL:
                raise ValueError(f"all repeats together are more than {MAX_REPEATS_IN_ALL}")
            module, port = _builder(name)(ready)
            parameters += sum(parameter.numel() for parameter in module.parameters())
            check_parameters(parameters)
            padding += _padding(module)
            if padding > MAX_PADDING:
                raise ValueError(f"all padding together is more than {MAX_PADDING} cells")
            _check_maps(module, min(source.stride for source in inputs), port)
        except (TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
            fault = f"layer {index} ({name}) cannot be built: {error}"
            raise UserError(fault, where, "a layer is [from, repeats, block, arguments]") from error
        built.modules.append(module)
        built.ports.append(port)
    raise UserError("its last layer is not Detect", where, "end with [[layers], 1, Detect, [nc, anchors]]")


def check_parameters(count: int) -> None:
    """Raise ValueError if a network has more parameters than any real one."""
    if count > MAX_PARAMETERS:
        raise ValueError(f"the network has more than {MAX_PARAMETERS:,} parameters")


def _padding(module: nn.Module) -> int:
    """Return by how many cells a layer's maps grow beyond what its stride says."""
    grown = 0
    for part in module.modules():
        if isinstance(part, nn.ZeroPad2d):
            left, right, top, bottom = part.padding
            grown += max(left + right, top + bottom, 0)
        elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            grown += max(*(_growth(part, side) for side in (0, 1)), 0)
    return grown


def _growth(part: nn.Conv2d | nn.ConvTranspose2d, side: int) -> int:
    """Return the difference between a convolution's output and its input, without its stride, in cells."""
    reach = part.dilation[side] * (part.kernel_size[side] - 1)
    padding = 0 if isinstance(part.padding, str) else 2 * part.padding[side]
    if isinstance(part, nn.ConvTranspose2d):
        return reach - padding + part.output_padding[side] + 1 - part.stride[side]
    return padding - reach


def _check_maps(module: nn.Module, stride: float, port: Port) -> None:
    """Raise ValueError if a layer's maps would be coarser, or have more values, than any real network's.

    stride: of the layer's input.
    """
    if port.stride > MAX_STRIDE:
        raise ValueError(f"its stride of {port.stride:g} px is more than {MAX_STRIDE}")
    most = max((part.out_channels for part in module.modules() if isinstance(part, nn.Conv2d)), default=0)
    for channels, cell in ((most, stride), (port.channels, port.stride)):
        if channels > MAX_VALUES_PER_PIXEL * cell**2:
            raise ValueError(f"{channels} channels at a stride of {cell:g} px take too much memory")


# Config keys for an activation other than SiLU, and the blocks that they concern. As in YOLOv5, `activation`
# does not affect the one of BottleneckCSP, which was nn.LeakyReLU(0.1) up to v5.0.
ACTIVATION_KEYS: dict[str, type[nn.Module]] = {
    "activation": common.Conv,
    "csp_activation": common.BottleneckCSP,
}


def replace_activation(model: nn.Module, text: str, kind: type[nn.Module], where: object) -> None:
    """Replace SiLU in blocks of a kind by an activation such as `nn.LeakyReLU(0.1)`.

    Raises UserError, naming `where`, if it is invalid.
    """
    found = re.fullmatch(r"\s*(?:torch\.)?(?:nn\.)?(\w+)\s*(?:\(\s*([-+.\deE]*)\s*\))?\s*", text)
    if found is None or found[1] not in ACTIVATIONS:
        known = ", ".join(f"nn.{name}" for name in ACTIVATIONS)
        raise UserError(f"activation {text!r} is not known", where, f"choose from {known}")
    try:
        arguments = [float(found[2])] if found[2] else []
        for module in list(model.modules()):
            if isinstance(module, kind) and isinstance(module.act, nn.SiLU):
                module.act = ACTIVATIONS[found[1]](*arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"activation {text!r} cannot be built: {error}", where, "write it as in nn.LeakyReLU(0.1)"
        ) from error


def _rows(cfg: Mapping[str, Any], part: str, where: object) -> list[Any]:
    rows = cfg.get(part)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"it has no list of layers `{part}`", where, "see models/yolov5s.yaml for the form")
    return rows


def _multiple(cfg: Mapping[str, Any], key: str, where: object) -> float:
    value = cfg.get(key, 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 16:
        raise UserError(f"{key} is {value!r}", where, "it must be a number above 0, at most 16")
    return float(value)


def _sources(source: Any, index: int) -> tuple[int, ...]:
    """Return the absolute indices of the layers that feed a row; -1 is the image."""
    absolute = []
    for item in source if isinstance(source, list) else [source]:
        if isinstance(item, bool) or not isinstance(item, int):
            raise ValueError(f"`from` is {item!r}, not a layer index")
        place = item if item >= 0 else index + item
        # Only the first layer may take the image; for any other this is most likely a mistake.
        if place >= index or place < (-1 if index == 0 else 0):
            raise ValueError(f"`from` {item} names no earlier layer")
        absolute.append(place)
    if not absolute:
        raise ValueError("`from` is empty")
    return tuple(absolute)


def _repeats(repeats: Any, depth: float) -> int:
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"its repeats must be a whole number above 0, not {repeats!r}")
    scaled = max(round(repeats * depth), 1) if repeats > 1 else 1
    if scaled > MAX_REPEATS:
        raise ValueError(f"{scaled} repeats are more than {MAX_REPEATS}")
    return scaled


def _plain_arguments(arguments: Any) -> list[Any]:
    """Return a row's arguments, converting the strings None (text to YAML), True and False to values."""
    if not isinstance(arguments, list):
        raise ValueError(f"its arguments must be a list, not {arguments!r}")
    words = {"None": None, "True": True, "False": False}
    return [words.get(item, item) if isinstance(item, str) else item for item in arguments]


def _builder(name: Any) -> Builder:
    if name not in BLOCKS:
        known = f"known are {', '.join(BLOCKS)}, Detect; CONTRIBUTING.md says where to add one"
        hint = question(near_names(str(name), BLOCKS, 1), known)
        raise ValueError(f"no such block; {hint}")
    return BLOCKS[name]


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
