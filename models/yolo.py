"""The detector: a network built from a YAML file, and its head.

Shapes: B images, L levels, A anchors per cell, H W grid, K classes, N predictions (the sum of A * H * W
over the levels).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Concat, Conv
from models.config import Config, read_config
from models.decode import decode, decode_above, decode_best
from models.layers import ACTIVATION_KEYS, Port, build_layers, check_parameters, replace_activation
from models.modes import in_mode
from utils.batch import FILL
from utils.errors import UserError, reason_of
from utils.words import counted

WITH_WEIGHTS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.MultiheadAttention)
IMAGE_CHANNELS = 3
AUGMENTED_SCALES = ((1.0, False), (0.83, True), (0.67, False))  # scale, mirrored


class Detect(nn.Module):
    """The detection head: one 1x1 convolution per level.

    nc classes, no = 5 + nc outputs per anchor, nl levels, na anchors per cell. anchors: buffer
    (nl, na, 2) in grid units (pixels / stride). stride: (nl,) pixels per cell.
    """

    anchors: Tensor
    stride: Tensor

    def __init__(self, nc: int, anchors_px: Tensor, ports: Sequence[Port]) -> None:
        """`anchors_px`: (nl, na, 2); `ports`: the input of each level."""
        super().__init__()
        self.nc, self.no = nc, 5 + nc
        self.nl, self.na = anchors_px.shape[:2]
        self.m = nn.ModuleList(nn.Conv2d(port.channels, self.no * self.na, 1) for port in ports)
        stride = torch.tensor([float(port.stride) for port in ports], device=anchors_px.device)
        # A buffer, to move with the module; not persistent, since public files don't have it.
        self.register_buffer("stride", stride, persistent=False)
        self.register_buffer("anchors", anchors_px / stride.view(-1, 1, 1))
        self._start_biases()

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the raw outputs, a view (B, A, H, W, 5 + K) per level, of feature maps (B, C, H, W)."""
        levels = []
        for convolution, feature in zip(self.m, features, strict=True):
            y = convolution(feature)
            batch, _, height, width = y.shape
            levels.append(y.view(batch, self.na, self.no, height, width).permute(0, 1, 3, 4, 2))
        return tuple(levels)

    @torch.no_grad()
    def input_gradient(self, level: int, slope: Tensor) -> Tensor:
        """Return the gradient (B, C, H, W) of a level's input from that of its output (B, A, H, W, 5 + K)."""
        rows = slope.permute(0, 2, 3, 1, 4).flatten(3)
        weight = cast(Tensor, self.m[level].weight).flatten(1)
        return (rows @ weight.to(rows.dtype)).permute(0, 3, 1, 2)

    @torch.no_grad()
    def keep_classes(self, numbers: Sequence[int]) -> None:
        """Reduce the outputs to these classes, in this order. For inference only."""
        rows = (torch.arange(self.na)[:, None] * self.no + torch.tensor(rows_of_classes(numbers))).flatten()
        self.nc, self.no = len(numbers), 5 + len(numbers)
        for convolution in self.m:
            assert isinstance(convolution, nn.Conv2d)
            for name, values in list(convolution.named_parameters()):
                kept = nn.Parameter(values[rows.to(values.device)], requires_grad=False)
                setattr(convolution, name, kept)
            convolution.out_channels = len(rows)

    @torch.no_grad()
    def _start_biases(self) -> None:
        """Initialise the biases for about 8 objects per anchor in a 640 px image, and for rare classes.

        Source: Lin et al., Focal Loss (arXiv 1708.02002), section 3.3.
        """
        for convolution, stride in zip(self.m, self.stride.tolist(), strict=True):
            bias = cast(Tensor, convolution.bias).view(self.na, self.no)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += class_bias(self.nc)


def rows_of_classes(numbers: Iterable[int]) -> list[int]:
    """Return the indices, among an anchor's outputs, of box, objectness and these classes."""
    return [*range(5), *(5 + number for number in numbers)]


def default_names(nc: int) -> list[str]:
    """Return placeholder class names."""
    return [f"class{index}" for index in range(nc)]


def class_bias(nc: int) -> float:
    """Return the initial class logit: several classes start out rare, a single one certain."""
    return math.log(0.6 / (nc - 0.99999))


def _check_size(config: Config) -> None:
    """Build the layers on the meta device. Raises UserError if the network would be too large."""
    with torch.device("meta"):
        layers = build_layers(config.content, config.channels, config.where)
    anchors = config.anchors_px([port.stride for port in layers.detect]).shape[1]
    outputs = anchors * (5 + config.nc)
    try:
        check_parameters(sum(port.channels * outputs for port in layers.detect))
    except ValueError as error:
        raise UserError(
            f"Detect cannot be built: {error}", config.where, "fewer classes or anchors"
        ) from error


@dataclass(frozen=True)
class ModelSummary:
    """A network's size: modules, parameters, trainable parameters, GFLOPs (2 x MACs)."""

    layers: int
    parameters: int
    gradients: int
    gflops: float
    image_size: int

    def __str__(self) -> str:
        """Return a one-line summary."""
        return (
            f"{self.layers} layers, {self.parameters:,} parameters, {self.gradients:,} trained, {self.cost}"
        )

    @property
    def cost(self) -> str:
        """The compute cost per image, in words."""
        return f"{self.gflops:{'.1f' if self.gflops >= 1 else '.2g'}} GFLOPs at {self.image_size} px"


class Model(nn.Module):
    """A detector built from a config.

    yaml: the config as a dict. model: its layers, the last of them the head. names: of the classes.
    size_multiple: height and width of images must be multiples of it, in px; larger than the head's
    largest stride if some layer has a coarser grid than any level.
    """

    def __init__(
        self,
        cfg: dict[str, Any] | Path | str,
        channels: int | None = None,
        nc: int | None = None,
        anchors: int | Sequence[Any] | None = None,
    ) -> None:
        """Build the network in `cfg` (a dict or YAML file).

        `channels` of the images, `nc` and `anchors` override the config; `anchors` is a list of pixel
        sizes per level, or the number of anchors per cell. Raises UserError if the config cannot be built.
        """
        super().__init__()
        config = read_config(cfg, nc=nc, channels=channels, anchors=anchors)
        _check_size(config)
        layers = build_layers(config.content, config.channels, config.where)
        self.yaml: dict[str, Any] = config.content
        self.nc, self.channels = config.nc, config.channels
        self.names = default_names(self.nc)
        self.size_multiple = math.ceil(max(port.stride for port in layers.ports))
        self._sources = layers.sources
        self._kept = {i for index, sources in enumerate(layers.sources) for i in sources if i != index - 1}
        head = Detect(self.nc, config.anchors_px([port.stride for port in layers.detect]), layers.detect)
        self.model = nn.Sequential(*layers.modules, head)
        for key, kind in ACTIVATION_KEYS.items():
            if key in self.yaml:
                replace_activation(self.model, str(self.yaml[key]), kind, config.where)

    @property
    def head(self) -> Detect:
        """The last layer."""
        return cast(Detect, self.model[-1])

    @property
    def stride(self) -> Tensor:
        """(L,) pixels per cell of each level."""
        return self.head.stride

    @property
    def anchors_px(self) -> Tensor:
        """(L, A, 2) widths and heights in px."""
        return self.head.anchors * self.stride.view(-1, 1, 1)

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the head's inputs for images (B, channels, H, W), 0..1: one map (B, C, H_l, W_l) per level.

        H and W must be multiples of `size_multiple`.
        """
        outputs: dict[int, Tensor] = {}
        x = images
        last = len(self.model) - 2
        for index, layer in enumerate(islice(self.model, last + 1)):
            sources = self._sources[index]
            inputs = [x if i == index - 1 else outputs[i] for i in sources]
            x = layer(inputs if isinstance(layer, Concat) else inputs[0])
            if index in self._kept:
                outputs[index] = x
        return tuple(x if i == last else outputs[i] for i in self._sources[-1])

    def forward_head(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return raw outputs (B, A, H_l, W_l, 5 + K) per level: x, y, w, h, objectness, classes."""
        return cast(tuple[Tensor, ...], self.head(features))

    def decode_levels(self, levels: Sequence[Tensor]) -> Tensor:
        """Return predictions (B, N, 5 + K) float32: centre x, y, width, height in px, then scores 0..1."""
        return decode(levels, self.anchors_px, self.stride)

    def decode_above(self, levels: Sequence[Tensor], least: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return image (C,), row (C,) and prediction (C, 5 + K) where objectness is above `least`, 0..1."""
        return decode_above(levels, self.anchors_px, self.stride, least)

    def decode_best(self, levels: Sequence[Tensor], most: int) -> Tensor:
        """Return each image's `most` best (B, n, 7): box, confidence, class, row; see `models.decode`."""
        return decode_best(levels, self.anchors_px, self.stride, most)

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | tuple[Tensor, tuple[Tensor, ...]]:
        """Return the raw levels in training mode, (decoded, raw levels) in evaluation mode."""
        levels = self.forward_head(self.forward_features(images))
        return levels if self.training else (self.decode_levels(levels), levels)

    def forward_augmented(self, images: Tensor) -> Tensor:
        """Return decoded predictions (B, N', 5 + K) of test-time augmentation: three scales, one mirrored.

        The full scale omits the coarsest level and the smallest scale the finest, since another scale
        covers those object sizes better. Boxes are in px of `images`.
        """
        height, width = images.shape[2:]
        finest, coarsest = int(self.stride.argmin()), int(self.stride.argmax())
        parts = []
        for scale, mirrored in AUGMENTED_SCALES:
            scaled = _shrunk(images.flip(3) if mirrored else images, scale, self.size_multiple)
            levels = self.forward_head(self.forward_features(scaled))
            left_out = coarsest if scale == 1 else finest if scale < 0.8 else None
            chosen = [level for level in range(len(levels)) if level != left_out or len(levels) == 1]
            decoded = decode([levels[i] for i in chosen], self.anchors_px[chosen], self.stride[chosen])
            decoded[..., :4] /= scale
            if mirrored:
                decoded[..., 0] = width - decoded[..., 0]
            parts.append(decoded)
        return torch.cat(parts, 1)

    def keep_classes(self, numbers: Sequence[int], names: Sequence[str]) -> None:
        """Reduce the model to these classes, in this order and with these names.

        Irreversible, and for inference only. Objectness still covers all classes that it was trained on.
        """
        self.head.keep_classes(numbers)
        self.nc, self.names = len(numbers), list(names)

    def check_takes_colour(
        self, place: object, fix: str = "images have three: use a network for them"
    ) -> None:
        """Raise UserError with `place` and `fix` unless images of three channels are its input."""
        if self.channels != IMAGE_CHANNELS:
            raise UserError(f"takes images of {counted(self.channels, 'channel')}", place, fix)

    def fuse(self) -> Model:
        """Fold batch norms into convolutions, irreversibly; sets the model to evaluation mode."""
        self.eval()
        for module in self.modules():
            if isinstance(module, Conv):
                module.fuse()
        return self.eval()  # once more: the modules that replace the norms are created in training mode

    def summary(self, image_size: int = 640) -> ModelSummary:
        """Count modules, parameters and operations at a square image size in px.

        Raises UserError if the forward pass fails because the layers don't fit together.
        """
        parameters = list(self.parameters())
        return ModelSummary(
            # Fusing a batch norm leaves an identity behind, which computes nothing.
            layers=sum(not isinstance(module, nn.Identity) for module in self.modules()),
            parameters=sum(p.numel() for p in parameters),
            gradients=sum(p.numel() for p in parameters if p.requires_grad),
            gflops=2 * self._count_macs() * image_size**2 / 1e9,
            image_size=image_size,
        )

    def _count_macs(self) -> float:
        """Return the MACs of all layers with weights per image pixel.

        Attention counts with its projections only: comparing the tokens grows with their square.
        """
        side = self.size_multiple
        macs = 0

        def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal macs
            # Each weight is used once per output position; in a transposed convolution, per input position.
            used = output if isinstance(layer, nn.Conv2d) else inputs[0]
            channels = used.shape[1] if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) else used.shape[-1]
            macs += used.numel() // channels * sum(p.numel() for p in layer.parameters() if p.dim() > 1)

        begun: list[nn.Module] = []
        hooks = [m.register_forward_hook(count) for m in self.modules() if isinstance(m, WITH_WEIGHTS)]
        hooks += [m.register_forward_pre_hook(lambda layer, _: begun.append(layer)) for m in self.model]
        try:
            # In training mode batch norms would update their running statistics.
            with in_mode(self, training=False), torch.no_grad():
                image = torch.zeros(1, self.channels, side, side).to(next(self.head.parameters()))
                self.forward_head(self.forward_features(image))
        except RuntimeError as error:
            number = len(begun) - 1
            place = f"its layer {number}, {type(self.model[number]).__name__}," if begun else "a layer"
            fix = "check its arguments, and those of the layers it takes, in the network YAML"
            what = f"{place} does not fit to the others: {reason_of(error)}"
            raise UserError(what, "the network", fix) from error
        finally:
            for hook in hooks:
                hook.remove()
        return macs / side**2


def _shrunk(images: Tensor, scale: float, multiple: int) -> Tensor:
    """Scale images and pad them with grey at the bottom and right to a multiple of `multiple` px.

    As in the original YOLOv5 the scaled sides are truncated and the padded ones rounded up: where that makes
    a difference, there is one more row of cells.
    """
    if scale == 1:
        return images
    height, width = (int(side * scale) for side in images.shape[2:])
    below, right = (math.ceil(side * scale / multiple) * multiple for side in images.shape[2:])
    resized = F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
    return F.pad(resized, (0, right - width, 0, below - height), value=FILL / 255)
