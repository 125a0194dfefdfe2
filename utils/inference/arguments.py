"""Validation and conversion of the arguments of the Python API: images, devices, sizes and NMS settings."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from utils.boxes import NmsRules
from utils.config.addresses import is_address, without_password
from utils.datasets.images import Image, UnreadableImageError, decode_image, read_image
from utils.device import select_device
from utils.errors import UsageError, UserError
from utils.inference.frames import Frame, file_name
from utils.inference.remote import fetch

Device = str | int | torch.device | None

_MOST_CHANNELS = 4
_TAKEN = "give a path, an address, the bytes of a file, a PIL image or an array (H, W, 3) of uint8 in RGB"
_BATCH = "give (B, 3, H, W) in RGB, 0..1, or single images as arrays"
_SCALE_IT = "scale it to 0..255 and give it as an array of uint8"


def device_of(device: Device) -> torch.device:
    """Return the device for a name, a GPU index or a torch.device; None means the same as "".

    Raises:
        UserError: if there is no such device.
    """
    name = device
    if isinstance(device, torch.device):
        name = "cpu" if device.type == "cpu" else str(device)
    if name is not None and not isinstance(name, str):
        name = str(_whole(name, "device", "give cpu, the number of a GPU, or a torch.device"))
    try:
        return select_device(name or "")
    except UsageError as error:
        raise UserError(error.what, "device", "give cpu or the number of a GPU") from error


def sides_of(size: Any) -> tuple[int, int]:
    """Return height and width in px from a number or a list of one or two. Raises UserError otherwise."""
    fix = "give the side in pixels, or (height, width)"
    given = list(size) if isinstance(size, Iterable) and not _is_scalar(size) else [size]
    sides = [_whole(side, "size", fix) for side in given]
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise UserError(f"{size!r} is not a size", "size", fix)
    return sides[0], sides[-1]


def rules_of(
    conf: Any, iou: Any, classes: Any, max_det: Any, agnostic: bool, multi_label: bool, class_count: int
) -> NmsRules:
    """Return the NMS parameters. Raises UserError if a value is out of range.

    classes: a class index, several, or None for all of `class_count`.
    """
    most = _whole(max_det, "max_det", "give a number from 1 on")
    if most < 1:
        raise UserError(f"{max_det!r} keeps nothing", "max_det", "give a number from 1 on")
    kept = None
    if classes is not None:
        several = isinstance(classes, Iterable) and not _is_scalar(classes)
        fix = f"give numbers from 0 to {class_count - 1}, or None for all"
        kept = [_whole(label, "classes", fix) for label in (classes if several else [classes])]
        for label in kept:
            if not 0 <= label < class_count:
                raise UserError(f"there is no class {label}", "classes", fix)
    return NmsRules(
        conf_thres=_part(conf, "conf"),
        iou_thres=_part(iou, "iou"),
        classes=kept,
        agnostic=bool(agnostic),
        multi_label=bool(multi_label),
        max_det=most,
    )


def frame_of(picture: Any, number: int) -> Frame:
    """Return an image of any supported type as a named BGR frame. Raises UserError if it is invalid."""
    name = f"image{number}.jpg"
    try:
        if isinstance(picture, str | os.PathLike):
            path = os.fspath(picture)
            if is_address(path):
                address = without_password(path)
                return Frame(decode_image(fetch(path)), file_name(address) or name)
            return Frame(read_image(os.path.expanduser(path)), path)
        if isinstance(picture, bytes | bytearray | memoryview):
            return Frame(decode_image(bytes(picture)), name)
    except UnreadableImageError as error:
        shown = (
            without_password(str(picture)) if isinstance(picture, str | os.PathLike) else f"image {number}"
        )
        raise UserError(f"cannot be read ({error})", shown, "check the path or the address") from error
    if hasattr(picture, "convert") and hasattr(picture, "getexif"):
        named = getattr(picture, "filename", "") or name
        return Frame(_from_array(_from_pil(picture, number), number), str(named))
    return Frame(_from_array(picture, number), name)


def _from_pil(picture: Any, number: int) -> Image:
    """Convert a PIL image to upright (H, W, 3) or (H, W) uint8. PIL would clip values above 255 to white."""
    from PIL import ImageOps

    try:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode[0] not in "IF":
            return np.asarray(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot be read ({error})", f"image {number}", _TAKEN) from error
    values = np.asarray(upright)
    # Older versions of PIL open 16-bit files as 32-bit integers (I). Keep the upper byte, as with files.
    deep = upright.mode.startswith("I;16") or (upright.mode == "I" and 255 < values.max() < 2**16)
    if deep and values.min() >= 0:
        return (values // 256).astype(np.uint8)
    raise UserError(f"is a PIL image of mode {upright.mode}", f"image {number}", _SCALE_IT)


def _from_array(array: Any, number: int) -> Image:
    """Convert an RGB or greyscale array to a BGR image. Raises UserError if it is none."""
    if not isinstance(array, np.ndarray):
        raise UserError(f"is a {type(array).__name__}", f"image {number}", _TAKEN)
    if array.dtype.kind not in "iuf" or array.ndim not in (2, 3) or not array.size:
        raise UserError(f"is an array {array.shape} of {array.dtype}", f"image {number}", _TAKEN)
    array = _as_uint8(array, number)
    if array.ndim == 2:
        array = array[..., None]
    elif array.shape[2] > _MOST_CHANNELS and array.shape[0] <= _MOST_CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.shape[2] not in (1, 3, 4):
        raise UserError(f"is an array {array.shape}", f"image {number}", _TAKEN)
    if array.shape[2] == 1:
        array = array.repeat(3, 2)
    return np.ascontiguousarray(array[..., 2::-1])


def _as_uint8(array: Any, number: int) -> Any:
    """Return an array of numbers 0..255 as uint8. Raises UserError if they are, or may be, on another scale.

    Floats of at most 1 may: an image is hardly that dark.
    """
    if array.dtype == np.uint8:
        return array
    least, most = array.min(), array.max()
    is_part = array.dtype.kind == "f" and 0 < most <= 1
    if 0 <= least and most <= 255 and not is_part:  # NaN fails both comparisons
        return np.rint(array).astype(np.uint8)
    what = f"is an array of {array.dtype} with values from {least:.6g} to {most:.6g}"
    raise UserError(what, f"image {number}", _SCALE_IT)


def batch_of(images: torch.Tensor, multiple: int, size_hw: tuple[int, int] | None) -> torch.Tensor:
    """Return a batch (B, 3, H, W) as float32. Raises UserError if it is none that a network takes.

    multiple: the sides must be multiples of it. size_hw: the most that a network of fixed shape takes.
    """
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3 or not images.numel():
        raise UserError(f"is a tensor {shape}", "ims", _BATCH)
    if not images.is_floating_point():
        raise UserError(f"is a tensor of {images.dtype}", "ims", "give 0..1: images.float() / 255")
    sides = shape[2:]
    if size_hw is None and any(side % multiple for side in sides):
        fix = f"give sides that are multiples of the stride {multiple}, or single images as arrays"
        raise UserError(f"is a tensor {shape}", "ims", fix)
    if size_hw is not None and any(side > most for side, most in zip(sides, size_hw, strict=True)):
        fix = f"the file takes images of {size_hw[1]}x{size_hw[0]} px alone"
        raise UserError(f"is a tensor {shape}", "ims", fix)
    return images.float()


def _is_scalar(value: Any) -> bool:
    """Return whether an iterable is a single value: text, or a zero-dimensional array or tensor."""
    return isinstance(value, str | bytes) or getattr(value, "ndim", None) == 0


def _whole(value: Any, name: str, fix: str) -> int:
    """Convert a whole number of any type to int, including NumPy integers and 320.0."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return int(value)
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError("true or false is not a number")
        return operator.index(value)
    except TypeError as error:
        raise UserError(f"{value!r} is not a whole number", name, fix) from error


def _part(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:
        raise UserError(f"{value!r} is not between 0 and 1", name, "give a part, as in 0.25")
    return number
