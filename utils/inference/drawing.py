"""Drawing of detections into their frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.datasets.images import Image
from utils.reporting.draw import draw_boxes


@dataclass(frozen=True)
class DrawStyle:
    """Options for drawing boxes. line_thickness: in pixels; None fits the image, see `draw_boxes`."""

    line_thickness: int | None = 3
    hide_labels: bool = False
    hide_conf: bool = False


def draw_detections(
    image: Image, detections: NDArray[np.float32], names: Sequence[str], style: DrawStyle
) -> Image:
    """Draw detections (n, 6) into their image (H, W, 3) BGR, the most confident on top, and return it."""
    flipped = detections[::-1]
    return draw_boxes(
        image,
        flipped[:, :4],
        flipped[:, 5].astype(np.int64),
        names,
        flipped[:, 4],
        line_thickness=style.line_thickness,
        hide_labels=style.hide_labels,
        hide_conf=style.hide_conf,
    )
