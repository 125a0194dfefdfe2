"""The detector: a network built from a YAML file, and its head.

Shapes: B images, L levels, A anchors a cell, H W grid, K classes, N predictions (the sum of A * H * W
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
from models.decode import decode, decode_above
from models.layers import Port, build_layers, check_parameters, replace_activation
from utils.batch import FILL
from utils.errors import UserError, reason_of

AUGMENTED_SCALES = ((1.0, False), (0.83, True), (0.67, False))  # scale, mirrored


class Detect(nn.Module):
    """The head: one 1x1 convolution a level.

    nc classes, no = 5 + nc outputs an anchor, nl levels, na anchors a cell. anchors: buffer
    (nl, na, 2) in grid units (pixels / stride). stride: (nl,) pixels of a cell.
    """

    anchors: Tensor
    stride: Tensor

    def __init__(self, nc: int, anchors_px: Tensor, ports: Sequence[Port]) -> None:
        """`anchors_px`: (nl, na, 2); `ports`: what feeds each level."""
        super().__init__()
        self.nc, self.no = nc, 5 + nc
        self.nl, self.na = anchors_px.shape[:2]
        self.m = nn.ModuleList(nn.Conv2d(port.channels, self.no * self.na, 1) for port in ports)
        stride = torch.tensor([float(port.stride) for port in ports], device=anchors_px.device)
        # Not in the state dict (public files do not have it there), but it moves with the module.
        self.register_buffer("stride", stride, persistent=False)
        self.register_buffer("anchors", anchors_px / stride.view(-1, 1, 1))
        self._start_biases()

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Raw outputs, a view (B, A, H, W, 5 + K) a level, from maps (B, C, H, W)."""
        levels = []
        for convolution, feature in zip(self.m, features, strict=True):
            y = convolution(feature)
            batch, _, height, width = y.shape
            levels.append(y.view(batch, self.na, self.no, height, width).permute(0, 1, 3, 4, 2))
        return tuple(levels)

    @torch.no_grad()
    def input_gradient(self, level: int, slope: Tensor) -> Tensor:
        """The gradient (B, C, H, W) of a level's map from that of its raw output, (B, A, H, W, 5 + K)."""
        rows = slope.permute(0, 2, 3, 1, 4).flatten(3)
        weight = cast(Tensor, self.m[level].weight).flatten(1)
        return (rows @ weight.to(rows.dtype)).permute(0, 3, 1, 2)

    @torch.no_grad()
    def keep_classes(self, numbers: Sequence[int]) -> None:
        """Makes the outputs those of these classes alone, in this order. For inference alone."""
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
        """Starts at about 8 objects in an image of 640 px, and rare classes.

        Source: Lin et al., Focal Loss (arXiv 1708.02002), section 3.3.
        """
        for convolution, stride in zip(self.m, self.stride.tolist(), strict=True):
            bias = cast(Tensor, convolution.bias).view(self.na, self.no)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += class_bias(self.nc)


def rows_of_classes(numbers: Iterable[int]) -> list[int]:
    """Which of an anchor's outputs are its box, its objectness and these classes."""
    return [*range(5), *(5 + number for number in numbers)]


def default_names(nc: int) -> list[str]:
    """What classes are called that nobody has named."""
    return [f"class{index}" for index in range(nc)]


def class_bias(nc: int) -> float:
    """What the class logits begin at: all of nc classes are rare, a single one is certain."""
    return math.log(0.6 / (nc - 0.99999))


def _check_size(config: Config) -> None:
    """Lays the network out without its memory. Raises UserError where that would be too much."""
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
    """A network's size: modules, parameters, those of them that are trained, GFLOPs (2 x MACs)."""

    layers: int
    parameters: int
    gradients: int
    gflops: float
    image_size: int

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.layers} layers, {self.parameters:,} parameters, {self.gradients:,} trained, {self.cost}"
        )

    @property
    def cost(self) -> str:
        """What a picture costs, in words."""
        return f"{self.gflops:{'.1f' if self.gflops >= 1 else '.2g'}} GFLOPs at {self.image_size} px"


class Model(nn.Module):
    """A detector built from a config.

    yaml: the config as a dict. model: its layers, the last of them the head. names: of the classes.
    size_multiple: what height and width of images must be a multiple of, in px; more than the
    largest stride of the head where the layers go coarser than any level.
    """

    def __init__(
        self,
        cfg: dict[str, Any] | Path | str,
        channels: int | None = None,
        nc: int | None = None,
        anchors: int | Sequence[Any] | None = None,
    ) -> None:
        """Reads `cfg` (a dict, or a YAML file).

        `channels` of the images, `nc` and `anchors` go before the config's; `anchors` is a list of
        pixel sizes a level, or how many anchors a cell is to have. Raises UserError for a config
        that cannot be built.
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
        if "activation" in self.yaml:
            replace_activation(self.model, str(self.yaml["activation"]), config.where)

    @property
    def head(self) -> Detect:
        """The last layer."""
        return cast(Detect, self.model[-1])

    @property
    def stride(self) -> Tensor:
        """(L,) pixels of a cell, level by level."""
        return self.head.stride

    @property
    def anchors_px(self) -> Tensor:
        """(L, A, 2) widths and heights."""
        return self.head.anchors * self.stride.view(-1, 1, 1)

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the head sees of images (B, channels, H, W), 0..1: a map (B, C, H_l, W_l) a level.

        H and W are multiples of `size_multiple`.
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
        """Raw outputs (B, A, H_l, W_l, 5 + K) a level: x, y, w, h, objectness, classes."""
        return cast(tuple[Tensor, ...], self.head(features))

    def decode_levels(self, levels: Sequence[Tensor]) -> Tensor:
        """(B, N, 5 + K) float32: centre x, y, width, height in px, then scores 0..1."""
        return decode(levels, self.anchors_px, self.stride)

    def decode_above(self, levels: Sequence[Tensor], least: float) -> tuple[Tensor, Tensor, Tensor]:
        """Image (C,), row (C,) and prediction (C, 5 + K) of those with more objectness than `least`, 0..1."""
        return decode_above(levels, self.anchors_px, self.stride, least)

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | tuple[Tensor, tuple[Tensor, ...]]:
        """Training: the raw levels. Evaluation: (decoded, raw levels)."""
        levels = self.forward_head(self.forward_features(images))
        return levels if self.training else (self.decode_levels(levels), levels)

    def forward_augmented(self, images: Tensor) -> Tensor:
        """Decoded predictions (B, N', 5 + K) of three scales together, one of them mirrored.

        The full scale leaves out the coarsest level and the smallest scale the finest: what these
        see best, another scale sees better. Boxes are in px of `images`.
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
        """Leaves these of its classes, in this order and under these names. For good, and for inference.

        Objectness stays as it is: that of an object of any class it was trained on.
        """
        self.head.keep_classes(numbers)
        self.nc, self.names = len(numbers), list(names)

    def fuse(self) -> Model:
        """Folds batch norms into convolutions, for good; the model is in evaluation mode then."""
        self.eval()
        for module in self.modules():
            if isinstance(module, Conv):
                module.fuse()
        return self.eval()  # what took the norms' places is new, and new modules are in training mode

    def summary(self, image_size: int = 640) -> ModelSummary:
        """Counts of modules, parameters and operations at a square image size in px.

        Raises UserError where no image goes through its layers.
        """
        parameters = list(self.parameters())
        return ModelSummary(
            # A fused batch norm leaves an identity behind, which computes nothing.
            layers=sum(not isinstance(module, nn.Identity) for module in self.modules()),
            parameters=sum(p.numel() for p in parameters),
            gradients=sum(p.numel() for p in parameters if p.requires_grad),
            gflops=2 * self._count_macs() * image_size**2 / 1e9,
            image_size=image_size,
        )

    def _count_macs(self) -> float:
        """Multiplications of all convolutions for one pixel of an image."""
        side = self.size_multiple
        macs = 0

        def count(layer: nn.Conv2d, _inputs: object, output: Tensor) -> None:
            nonlocal macs
            macs += output.shape[2] * output.shape[3] * layer.weight.numel()

        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        hooks = [layer.register_forward_hook(count) for layer in convolutions]
        modes = {module: module.training for module in self.modules()}
        try:
            self.eval()  # a batch norm in training mode would count the image in
            with torch.no_grad():
                image = torch.zeros(1, self.channels, side, side).to(convolutions[0].weight)
                self.forward_head(self.forward_features(image))
        except RuntimeError as error:
            fix = "check the arguments of its layers in the network YAML"
            raise UserError(
                f"its layers do not fit together: {reason_of(error)}", "the network", fix
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in modes.items():
                module.training = mode
        return macs / side**2


def _shrunk(images: Tensor, scale: float, multiple: int) -> Tensor:
    """Images at a scale, padded with grey at the bottom and right to a multiple of px."""
    if scale == 1:
        return images
    height, width = (int(side * scale) for side in images.shape[2:])
    resized = F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
    return F.pad(resized, (0, -width % multiple, 0, -height % multiple), value=FILL / 255)
