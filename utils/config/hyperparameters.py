"""The hyperparameters of a training run, under their public names."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config.addresses import refuse_address
from utils.config.schema import load_yaml, settings_from
from utils.config.settings import (
    SettingsError,
    above,
    at_least,
    between,
    option,
    out_of_range,
    to_plain,
)
from utils.config.suggestions import near_files, near_names, question
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
_CHANCE = between(0, 1)
# The folders by which shipped files are known, here and in YOLOv5.
_SHIPPED_AS = (Path(), Path("data"), Path("data/hyps"))
# Public files that are not shipped: the substitute, and how close it is.
_STAND_INS = {
    "hyp.scratch-low.yaml": ("hyp.scratch.yaml", "which has its values"),
    "hyp.scratch-med.yaml": ("hyp.scratch-high.yaml", "which has its values"),
    "hyp.VOC.yaml": ("hyp.finetune.yaml", "evolved on the same data, with other values"),
}


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """The hyperparameters of a training run. The defaults are those for training from scratch.

    Two public names have no effect here: `iou_t`, which no current YOLOv5 uses either, and
    `copy_paste`, which needs outlines while labels are boxes.
    """

    lr0: float = option(0.01, "learning rate after the warm-up", limits=above(0))
    lrf: float = option(0.01, "part of it that is left at the end", limits=at_least(0))
    momentum: float = option(0.937, "of SGD; beta1 of Adam", limits=between(0, 0.9999))
    weight_decay: float = option(0.0005, "at the nominal batch", limits=at_least(0))
    nbs: int = option(64, "nominal batch: gradients of smaller ones add up to it", limits=at_least(1))
    ema_decay: float = option(
        0.9999, "what the average of the weights keeps at an update", limits=between(0, 1)
    )
    ema_tau: float = option(2000.0, "updates until two thirds of that decay are reached", limits=above(0))
    warmup_epochs: float = option(3.0, "length of the warm-up", limits=at_least(0), unit="epochs")
    warmup_momentum: float = option(0.8, "momentum at its start", limits=between(0, 0.9999))
    warmup_bias_lr: float = option(0.1, "learning rate of the biases at its start", limits=at_least(0))
    box: float = option(0.05, "gain of the box loss", limits=at_least(0))
    cls: float = option(0.5, "gain of the class loss", limits=at_least(0))
    cls_pw: float = option(1.0, "weight of positive class targets", limits=above(0))
    obj: float = option(1.0, "gain of the objectness loss", limits=at_least(0))
    obj_pw: float = option(1.0, "weight of positive objectness targets", limits=above(0))
    iou_t: float = option(0.2, "kept for files that name it", limits=between(0, 1))
    anchor_t: float = option(4.0, "largest factor between the sides of a box and its anchor", limits=above(1))
    anchors: int | None = option(None, "anchors a cell, when not those of the network", limits=between(0, 20))
    fl_gamma: float = option(0.0, "exponent of the focal loss; 0 is plain cross-entropy", limits=at_least(0))
    label_smoothing: float = option(0.0, "eps of the class targets", limits=between(0, 1))
    hsv_h: float = option(0.015, "change of hue, a part", limits=between(0, 1))
    hsv_s: float = option(0.7, "change of saturation, a part", limits=between(0, 1))
    hsv_v: float = option(0.4, "change of brightness, a part", limits=between(0, 1))
    degrees: float = option(0.0, "rotation to either side", limits=between(0, 180), unit="degrees")
    translate: float = option(0.1, "shift to either side, a part of the side", limits=between(0, 1))
    scale: float = option(0.5, "change of size to either side, a part", limits=between(0, 0.99))
    shear: float = option(0.0, "slant to either side", limits=between(0, 80), unit="degrees")
    perspective: float = option(0.0, "tilt to either side", limits=between(0, 0.001))
    flipud: float = option(0.0, "chance of a flip upside down", limits=_CHANCE)
    fliplr: float = option(0.5, "chance of a flip left to right", limits=_CHANCE)
    mosaic: float = option(1.0, "chance of a mosaic of four images", limits=_CHANCE)
    mixup: float = option(0.0, "chance that a mosaic is mixed with a second", limits=_CHANCE)
    copy_paste: float = option(0.0, "has no effect: it needs outlines of the objects", limits=_CHANCE)

    def __post_init__(self) -> None:
        """Raise SettingsError with all values that are out of range."""
        wrong = [
            (setting.name, f"{setting.name}: {value} {what}") for setting, value, what in out_of_range(self)
        ]
        if wrong:
            raise SettingsError(wrong)
        if self.anchors == 0:  # in public files 0 means "those of the network"
            object.__setattr__(self, "anchors", None)

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain data, for `hyp.yaml`; without `anchors` if they are the network's."""
        return {name: value for name, value in to_plain(self).items() if value is not None}


def load_hyperparameters(path: str | Path) -> Hyperparameters:
    """Load hyperparameters from a YAML file, given by path or by the name of a shipped one.

    Raises:
        UserError: if there is no such file, or it is not YAML.
        UsageError: if keys are unknown or values invalid; names each with its line.
    """
    found = _find(Path(path))
    data, lines = load_yaml(found)
    anchors = data.get("anchors")
    if isinstance(anchors, float) and math.isfinite(anchors):
        data["anchors"] = round(anchors)  # fractional in files made by evolution
    return settings_from(Hyperparameters, data, lines, found)


def hyperparameter_warnings(path: str | Path) -> Iterator[str]:
    """Yield warnings about what the user may not expect of this file; none if it cannot be read."""
    try:
        found = _find(Path(path))
        copy_paste = load_yaml(found)[0].get("copy_paste")
    except UserError:  # `load_hyperparameters` will raise it again
        return
    instead, nearness = _STAND_INS.get(_full_name(Path(path)), ("", ""))
    if found.name == instead:
        yield f"{path} does not ship with this project: taking data/{instead}, {nearness}"
    if isinstance(copy_paste, int | float) and copy_paste > 0:
        yield f"{found}: copy_paste has no effect, it needs the outlines of the objects"


def _full_name(path: Path) -> str:
    return path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml"


def _find(path: Path) -> Path:
    """Find a file relative to the working folder or the project, or a shipped one or its substitute by name.

    A path with a folder of the user's own means the file in that folder, and no shipped one of its name.
    """
    refuse_address(path)
    name = _full_name(path)
    named = path.with_name(name) if path.name else path
    places = [path, named, ROOT / path, ROOT / named]
    if path.parent in _SHIPPED_AS:
        places += [ROOT / "data" / known for known in (name, *_STAND_INS.get(name, ())[:1])]
    for place in dict.fromkeys(places):
        if os.path.isfile(place):
            return place
    shipped = sorted(f"data/{entry.name}" for entry in (ROOT / "data").glob("hyp.*.yaml"))
    near = near_files(named) or near_names(f"data/{name}", shipped)
    raise UserError("is not there", path, question(near, f"these ship: {', '.join(shipped)}"))
