"""Short display names."""

from __future__ import annotations

import re
from pathlib import PurePath


def weights_name(path: str) -> str:
    """Return a weight file's usual name: yolov5s for weights/yolov5s.pt, exp3 for exp3/weights/best.pt."""
    pure = PurePath(path.replace("\\", "/"))
    of_a_run = re.fullmatch(r"best|last|epoch\d+", pure.stem) and pure.parent.name == "weights"
    return pure.parts[-3] if of_a_run and len(pure.parts) > 2 else pure.stem


def short_title(title: str, most: int = 34) -> str:
    """Return a title of at most `most` characters; a weight file at its end is given by its short name."""
    kind, space, path = title.partition(" ")
    if space and path.endswith(".pt"):
        title = f"{kind} {weights_name(path)}"
    return title if len(title) <= most else f"…{title[1 - most :]}"
