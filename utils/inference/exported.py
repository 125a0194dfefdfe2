"""Exported networks of any format behind a common interface.

Shapes: B images, N predictions per image, K classes, D rows of detections.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.yolo import default_names, rows_of_classes
from utils.batch import FILL
from utils.errors import UserError, reason_of
from utils.inference.facts import ExportFacts
from utils.words import counted

_DETECTION = 6  # values per detection: box, confidence, class
_MOST_LETTERS = 300
_PROBE_STRIDES = 2  # side of the trial image if sides are dynamic: small, but more than one cell


def has_own_names(names: Sequence[str]) -> bool:
    """Return whether a network's class names were given to it, and are not placeholders."""
    return bool(names) and list(names) != default_names(len(names))


def check_names(names: Sequence[str], source: object, class_count: int, weights: object) -> None:
    """Raise UserError if `source` does not have as many names as the weights have classes."""
    if len(names) != class_count:
        known = counted(class_count, "class")
        raise UserError(f"has {counted(len(names), 'class name')}, {weights} knows {known}", source)


def first_words(error: BaseException) -> str:
    """Return `reason_of` an error, truncated: the message of a runtime may fill pages."""
    return reason_of(error)[:_MOST_LETTERS]


def last_words(error: BaseException) -> str:
    """Return the last line of an error message, for libraries that start with their own source location."""
    return (str(error).strip().splitlines() or [reason_of(error)])[-1].strip()[:_MOST_LETTERS]


class ExportedNetwork(ABC):
    """A network in an exported file, ready to run.

    kind: the format's name. names: of the classes. nc: the number of classes. size_multiple: image sides must
    be multiples of it, in px. device: of the inputs of `run`.
    """

    kind: str

    def __init__(self, path: Path, facts: ExportFacts, device: torch.device) -> None:
        self.path, self.facts, self.device = path, facts, device
        self.names, self.nc = list(facts.names), len(facts.names)
        self._kept: Sequence[int] | None = None
        self._columns = None if facts.nms is None else _DETECTION  # values per output row, if known
        self.size_multiple = facts.stride

    @abstractmethod
    def run(self, images: Tensor) -> Tensor:
        """Return the first output for images (B, 3, H, W), float32 0..1, on `device`, of a valid shape."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return predictions (B, N, 5 + K), or detections (B, D, 6) if the file includes NMS, in float32.

        images: (B, 3, H, W), float 0..1. Any B: for a fixed batch size they are split and the last part is
        filled up. Images smaller than a fixed size are padded at the right and bottom, which moves no box.
        """
        images = self._padded(images.to(self.device, torch.float32))
        count = self.facts.shape[0]
        if count is None:
            return self._among_kept(self._checked(self.run(images), len(images)))
        outputs = []
        for part in torch.split(images, count):
            missing = count - len(part)
            filled = F.pad(part, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else part
            outputs.append(self._checked(self.run(filled), count)[: len(part)])
        return self._among_kept(torch.cat(outputs))

    def keep_classes(self, numbers: Sequence[int], names: Sequence[str]) -> None:
        """Keep only these classes, in this order and under these names, irreversibly."""
        self._kept, self.names, self.nc = list(numbers), list(names), len(numbers)

    def _among_kept(self, output: Tensor) -> Tensor:
        """Reduce the output to the kept classes. NMS inside the file has still run on all of them."""
        if self._kept is None:
            return self._of_known_classes(output)
        if self.facts.nms is None:
            return output[..., rows_of_classes(self._kept)]
        is_of = output[..., 5, None].long() == torch.tensor(self._kept, device=output.device)
        confidence = output[..., 4] * is_of.any(-1)  # rows with confidence 0 are padding
        numbers = is_of.int().argmax(-1).to(output.dtype)
        return torch.cat((output[..., :4], torch.stack((confidence, numbers), -1)), -1)

    def _of_known_classes(self, output: Tensor) -> Tensor:
        """Return the output unchanged. Raises UserError if NMS inside yields a class without a name."""
        if self.facts.nms is not None and self.nc:
            labels = output[..., 5]
            is_known = (labels > -1) & (labels < self.nc)  # NaN fails both comparisons
            wrong = labels[~is_known & (output[..., 4] > 0)]  # rows with confidence 0 are padding
            if len(wrong):
                what = f"gives class {float(wrong[0]):g} and has names for 0 to {self.nc - 1}"
                raise UserError(what, self.path, "export it again with export.py")
        return output

    def probe(self) -> None:
        """Run it once to check its output and find the class count. Raises UserError if either is invalid."""
        height, width = self.facts.size_hw or (self.size_multiple * _PROBE_STRIDES,) * 2
        output = self(torch.full((self.facts.shape[0] or 1, 3, height, width), FILL / 255))
        if self.facts.nms is not None:
            return
        found = output.shape[2] - 5
        if self.nc and self.nc != found:
            what = f"has {self.nc} class names and gives scores of {found} classes"
            raise UserError(what, self.path, "export it again")
        self.nc, self._columns = found, output.shape[2]

    def set_names(self, names: Sequence[str] = (), source: object = "--data") -> None:
        """Set the class names unless the file has its own.

        Raises UserError if they do not fit, or if there are none at all.
        """
        if names and not has_own_names(self.names):
            if self.nc:
                check_names(names, source, self.nc, self.path)
            self.names, self.nc = list(names), len(names)
        if not self.names:
            raise UserError(
                "has no class names inside",
                self.path,
                "give a dataset YAML that has them (--data), or export it again with export.py",
            )

    def set_input_size(self, size_hw: tuple[int, int]) -> None:
        """Set the input shape to single images of this size, the safe choice if the file states none."""
        self.facts = replace(self.facts, shape=(1, *size_hw), knows_shape=True)

    def in_words(self) -> str:
        """Describe format, input shape and NMS in a few words."""
        batch, height, width = self.facts.shape
        size = "any size" if height is None else f"{width}x{height} px"
        batches = "any batch" if batch is None else f"batches of {batch}"
        inside = (
            f", NMS inside (confidence {self.facts.nms.conf_thres:g}, IoU {self.facts.nms.iou_thres:g})"
            if self.facts.nms
            else ""
        )
        return f"{self.kind}, {size}, {batches}{inside}"

    def _padded(self, images: Tensor) -> Tensor:
        if self.facts.size_hw is None:
            return images
        below, right = (want - have for want, have in zip(self.facts.size_hw, images.shape[2:], strict=True))
        assert below >= 0 and right >= 0, "larger than what the file takes"
        return F.pad(images, (0, right, 0, below), value=FILL / 255) if below or right else images

    def _checked(self, output: Tensor, count: int) -> Tensor:
        """Return the output as float32. Raises UserError if its shape is wrong."""
        if (
            output.ndim != 3
            or len(output) != count
            or output.shape[2] < _DETECTION
            or self._columns not in (None, output.shape[2])
        ):
            inside = self.facts.nms is not None
            what = "(batch, detections, 6)" if inside else "(batch, predictions, 5 + classes)"
            raise UserError(
                f"gives {tuple(output.shape)} and not {what}", self.path, "export it with export.py"
            )
        return output.float()
