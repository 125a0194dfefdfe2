"""Network configs: the YAML file or dict that defines classes, anchors and layers."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from utils.config.addresses import refuse_address
from utils.config.schema import load_yaml
from utils.config.suggestions import did_you_mean, near_files, near_names, question
from utils.errors import UserError

FOLDER = Path(__file__).parent
# Initial anchors for a config that gives only their number: sizes in cells, with common aspect ratios.
# AutoAnchor fits them to the labels.
START_SIZES = (1.25, 1.6), (2.0, 3.75), (4.1, 2.9)
KEYS = (
    "nc",
    "ch",
    "depth_multiple",
    "width_multiple",
    "activation",
    "csp_activation",
    "anchors",
    "backbone",
    "head",
    "inplace",
)
MAX_CLASSES = 100_000
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is ten times as fast


@dataclass(frozen=True)
class Config:
    """A parsed and checked config.

    content: the dict, with the effective `nc` and `anchors`; where: the file, for messages.
    """

    content: dict[str, Any]
    channels: int
    nc: int
    where: str

    def anchors_px(self, strides: Sequence[float]) -> Tensor:
        """Return anchor widths and heights in px, (levels, anchors, 2), for a head with these strides.

        Raises UserError if the config has anchors for another number of levels.
        """
        given = self.content["anchors"]
        if isinstance(given, int):
            cells = [[side * 1.5 ** (i // 3) for side in START_SIZES[i % 3]] for i in range(given)]
            given = [[side * stride for size in cells for side in size] for stride in strides]
        if len(given) != len(strides):
            raise UserError(
                f"it has anchors for {len(given)} levels and Detect has {len(strides)} inputs",
                self.where,
                "give one list of anchors for each level",
            )
        # Explicitly on the CPU: the model may be built under the meta device, to be filled from a file.
        return torch.tensor(given, dtype=torch.float32, device="cpu").view(len(given), -1, 2)


def read_config(
    cfg: dict[str, Any] | Path | str,
    *,
    nc: int | None = None,
    channels: int | None = None,
    anchors: object = None,
) -> Config:
    """Read the config in a file or dict; arguments override its values. Raises UserError."""
    if isinstance(cfg, dict):
        content, where = copy.deepcopy(cfg), "network config"
        where = str(content.pop("yaml_file", "")) or where
    else:
        path = find_config(cfg)
        content, where = _load(path), str(path)
    content["nc"] = _whole(content.get("nc") if nc is None else nc, "nc", MAX_CLASSES, where)
    content["anchors"] = _checked_anchors(content.get("anchors") if anchors is None else anchors, where)
    inputs = _whole(content.get("ch", 3) if channels is None else channels, "ch", 1024, where)
    return Config(content, inputs, content["nc"], where)


def find_config(name: Path | str) -> Path:
    """Find a config: the path as given, else by name under `models/` (also written `model/`).

    Raises UserError, with near matches, if there is none, and for an address.
    """
    refuse_address(name)
    given = Path(name)
    if os.path.isfile(given):
        return given
    known = {path.name: path for path in sorted(FOLDER.rglob("*.yaml"), reverse=True)}
    known |= {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*.yaml")}
    wanted = given.as_posix().removeprefix("models/").removeprefix("model/")
    if wanted in known:
        return known[wanted]
    near = near_files(given)[:1] or [f"models/{entry}" for entry in near_names(wanted, known)]
    fix = question(near, "see the folder models for the networks that ship")
    raise UserError("no such network config", name, fix)


def _load(path: Path) -> dict[str, Any]:
    """Load a file. Raises UserError for unknown keys, which are most likely typos."""
    content, lines = load_yaml(path, _LOADER)
    unknown = [key for key in content if key not in KEYS]
    wrong = [
        f"{f'line {lines[key]}: ' if key in lines else ''}unknown key {key!r}{did_you_mean(key, KEYS)}"
        for key in unknown
    ]
    if wrong:
        raise UserError("; ".join(wrong), path, f"known are {', '.join(KEYS)}")
    return content


def _whole(value: Any, key: str, most: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UserError(f"{key} is {str(value)[:80]}", where, f"it must be a whole number from 1 to {most}")
    return value


def _checked_anchors(value: Any, where: str) -> int | list[list[float]]:
    """Return the number of anchors per cell, or a list per level: width, height, width, height, ... in px."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= 32:
        return round(value)
    try:
        levels = [[float(x) for x in _flat(level)] for level in value]
    # OverflowError: an integer too large for a float; RecursionError: a list within itself, by an alias.
    except (TypeError, ValueError, OverflowError, RecursionError):
        levels = []
    sizes = [x for level in levels for x in level]
    alike = len({len(level) for level in levels}) == 1 and len(levels[0]) % 2 == 0
    if sizes and alike and all(0 < x < 1e5 for x in sizes):
        return levels
    raise UserError(
        f"anchors are {str(value)[:80]}",
        where,
        "give each level as many sizes in pixels, like [10,13, 16,30, 33,23], or how many a cell is to have",
    )


def _flat(value: Any) -> list[Any]:
    return [x for item in value for x in _flat(item)] if isinstance(value, list | tuple) else [value]
