"""Labelled boxes on images.

Shapes: n boxes on one image of H W pixels, channels blue, green, red.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.reporting.console import warning
from utils.reporting.fonts import ASCII, default_font, font_for, letters_of_default

Image: TypeAlias = NDArray[np.uint8]
Color: TypeAlias = tuple[int, int, int]

GOLDEN_RATIO = (5**0.5 - 1) / 2
SHADES = ((0.80, 1.00), (0.95, 0.80), (0.50, 0.95))  # (saturation, value), used in turn
BLACK, WHITE = (0, 0, 0), (255, 255, 255)

FONT = cv2.FONT_HERSHEY_SIMPLEX
CAPITAL_HEIGHT = 22.0  # pixels of a capital letter at font scale 1
_LONGEST_NAME = 40  # letters; a longer one would leave no room for the picture or chart
SMALLEST_TEXT = 7.0  # pixels of a capital letter; anything smaller is unreadable


@lru_cache(maxsize=1024)
def color_of(class_id: int) -> Color:
    """Return the colour (blue, green, red) of a class, the same in every run.

    Golden-ratio steps around the hue circle keep the first classes apart, however many there are; alternating
    three shades separates hues that still come close.
    """
    saturation, value = SHADES[class_id % len(SHADES)]
    red, green, blue = colorsys.hsv_to_rgb((class_id * GOLDEN_RATIO) % 1, saturation, value)
    return round(blue * 255), round(green * 255), round(red * 255)


def draw_boxes(  # noqa: PLR0913 - the drawing options of detect.py, beside the detections' four columns
    image_bgr: Image,
    boxes_xyxy_px: NDArray[np.floating],
    class_ids: NDArray[np.integer] | Sequence[int],
    names: Sequence[str],
    confidences: NDArray[np.floating] | Sequence[float] | None = None,
    line_thickness: int | None = None,
    hide_labels: bool = False,
    hide_conf: bool = False,
) -> Image:
    """Draw boxes and their labels into the image and return it.

    image_bgr: (H, W, 3), contiguous; boxes_xyxy_px: (n, 4); class_ids, confidences: (n,). Later boxes are
    drawn over earlier ones, and all labels over all boxes. Without `line_thickness` (pixels) it depends on
    the image's size. Labels stay inside the image.
    """
    height, width = image_bgr.shape[:2]
    size = (height * width) ** 0.5
    thickness = max(1, line_thickness or round(size / 320))
    inset = thickness // 2
    limits = np.array((width, height, width, height)) - 1 - inset
    corners = np.clip(np.asarray(boxes_xyxy_px, dtype=np.float64).reshape(-1, 4), inset, limits)
    boxes = [(int(x1), int(y1), int(x2), int(y2)) for x1, y1, x2, y2 in corners.round()]
    for box, class_id in zip(boxes, class_ids, strict=True):
        _draw_outline(image_bgr, box, color_of(int(class_id)), thickness)
    if hide_labels:
        return image_bgr
    capital_height = max(8.0, size * 0.016)
    for index, (box, class_id) in enumerate(zip(boxes, class_ids, strict=True)):
        text = name_of(int(class_id), names)
        if confidences is not None and not hide_conf:
            text = f"{text} {float(confidences[index]):.2f}"
        corner = (box[0] - inset, box[1] - inset)
        draw_plate(image_bgr, text, corner, color_of(int(class_id)), capital_height)
    return image_bgr


def _draw_outline(image_bgr: Image, box: tuple[int, int, int, int], color: Color, thickness: int) -> None:
    """Draw a box with its lines centred on its borders.

    By slicing, since OpenCV versions disagree about a line's thickness and lighten its colour.
    """
    left, top, right, bottom = (max(0, border - thickness // 2) for border in box)
    for line in (top, bottom):
        image_bgr[line : line + thickness, left : right + thickness] = color
    for line in (left, right):
        image_bgr[top : bottom + thickness, line : line + thickness] = color


def name_of(class_id: int, names: Sequence[str]) -> str:
    """Return a class's name, shortened for a picture or chart.

    Its number if it has none or, with a warning, if no font has its letters.
    """
    if not 0 <= class_id < len(names):
        return str(class_id)
    name = names[class_id]
    if drawable(name) == name:
        return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
    _warn_of_numbers()
    return str(class_id)


@lru_cache(maxsize=1)  # once is enough
def _warn_of_numbers() -> None:
    warning(
        "no font here has all letters of the class names: numbers are drawn in place of some; install one, "
        "such as Noto Sans CJK (fonts-noto-cjk in Debian and Ubuntu)"
    )


def draw_plate(
    image_bgr: Image, text: str, corner_xy: tuple[int, int], color: Color, capital_height: float
) -> None:
    """Draw a line of text on a coloured background into the image (H, W, 3).

    corner_xy: the plate's lower left corner in pixels. If the plate would leave the image, it is moved below
    that corner or to the left, made smaller, or cut off with two dots. `capital_height` is in pixels.
    """
    mask = _fitting_mask(text, capital_height, image_bgr.shape[1])
    height, width = mask.shape
    left, bottom = corner_xy
    top = bottom - height if bottom >= height else bottom
    top = max(0, min(top, image_bgr.shape[0] - height))
    left = max(0, min(left, image_bgr.shape[1] - width))
    place = image_bgr[top : top + height, left : left + width]
    alpha = mask[: place.shape[0], : place.shape[1], None].astype(np.float32) / 255
    ground, ink = np.array(color, np.float32), np.array(_ink_on(color), np.float32)
    place[:] = np.rint(ground + (ink - ground) * alpha).astype(np.uint8)


def _fitting_mask(text: str, capital_height: float, room: int) -> Image:
    """Return the text's mask, fitted to `room` pixels: first by its size, then by cutting off its end."""
    mask = _text_mask(text, capital_height)
    if mask.shape[1] > room:
        capital_height = min(capital_height, max(SMALLEST_TEXT, capital_height * room / mask.shape[1]))
        mask = _text_mask(text, capital_height)
    while mask.shape[1] > room and len(text) > 1:
        text = text[:-1]
        mask = _text_mask(f"{text}..", capital_height)
    return mask


def _ink_on(color: Color) -> Color:
    """Return black or white, whichever contrasts more with the background."""
    blue, green, red = color
    return BLACK if 0.114 * blue + 0.587 * green + 0.299 * red > 128 else WHITE


@lru_cache(maxsize=512)
def _text_mask(text: str, capital_height: float) -> Image:
    """Return the coverage of a line of text (h, w), 0 to 255, with a margin around it."""
    margin = max(2, round(capital_height * 0.35))
    draw = _ascii_mask if text.isascii() else _any_mask
    return draw(text, capital_height, margin)


def _ascii_mask(text: str, capital_height: float, margin: int) -> Image:
    scale = capital_height / CAPITAL_HEIGHT
    stroke = max(1, round(capital_height / 9))
    (width, height), baseline = cv2.getTextSize(text, FONT, scale, stroke)
    mask: Image = np.zeros((height + baseline + margin, width + 2 * margin), np.uint8)
    cv2.putText(mask, text, (margin, height + margin // 2), FONT, scale, 255, stroke, cv2.LINE_AA)
    return mask


def _any_mask(text: str, capital_height: float, margin: int) -> Image:
    """Like `_ascii_mask`, for characters that OpenCV's own font may lack."""
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

    # Capitals are .73 of its size.
    font = ImageFont.truetype(font_for(text) or default_font(), round(capital_height / 0.73))
    ascent, descent = font.getmetrics()
    canvas = PILImage.new("L", (round(font.getlength(text)) + 2 * margin, ascent + descent))
    ImageDraw.Draw(canvas).text((margin, 0), text, fill=255, font=font)
    return np.array(canvas, dtype=np.uint8)


def drawable(text: str) -> str:
    """Return a line of text that can be drawn: with '?' for letters that are lacking, if no font has all."""
    known = ASCII if text.isascii() else letters_of_default()
    shown = "".join(letter if ord(letter) in known else "?" for letter in text)
    return text if shown != text and not text.isascii() and font_for(text) else shown
