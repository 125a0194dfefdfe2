"""Images into the network's frame and boxes back out of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.inference.predictor import place_boxes, rescale_boxes
from utils.inference.preprocess import letterbox_image


@pytest.mark.parametrize(
    ("image_hw", "size_hw", "expected_hw"),
    [
        ((480, 640), (640, 640), (480, 640)),
        ((427, 640), (640, 640), (448, 640)),
        ((1080, 1920), (640, 640), (384, 640)),
        ((100, 50), (320, 320), (320, 160)),
        ((1080, 1920), (384, 640), (384, 640)),
        ((1, 1000), (640, 640), (32, 640)),
    ],
)
def test_a_picture_fills_the_smallest_frame_of_whole_strides(
    image_hw: tuple[int, int], size_hw: tuple[int, int], expected_hw: tuple[int, int]
) -> None:
    image = np.full((*image_hw, 3), 255, np.uint8)
    pixels, letterbox = letterbox_image(image, size_hw, stride=32)
    assert pixels.shape == (1, 3, *expected_hw) and pixels.dtype == torch.uint8
    assert letterbox.original_hw == image_hw
    inside = pixels[0, 0] == 255
    height, width = round(image_hw[0] * letterbox.scale[0]), round(image_hw[1] * letterbox.scale[1])
    top, left = (int(side) for side in letterbox.pad)
    assert inside.sum() == height * width and inside[top : top + height, left : left + width].all()
    assert (pixels[0, 0][~inside] == 114).all()


def test_colours_arrive_as_rgb() -> None:
    blue = np.zeros((32, 32, 3), np.uint8)
    blue[..., 0] = 200
    pixels, _ = letterbox_image(blue, (32, 32), stride=32)
    assert pixels[0, 2].eq(200).all() and pixels[0, :2].eq(0).all()


def test_boxes_come_back_where_they_were() -> None:
    boxes = torch.tensor([[10.0, 20, 300, 400], [0, 0, 333, 500], [5.5, 7.25, 9, 30]])
    for size_hw in ((640, 640), (320, 640), (128, 128)):
        _, letterbox = letterbox_image(np.zeros((500, 333, 3), np.uint8), size_hw, stride=32)
        placed = place_boxes(boxes, letterbox)
        torch.testing.assert_close(rescale_boxes(placed, letterbox), boxes, atol=1e-3, rtol=0)


def test_boxes_are_clipped_to_the_original() -> None:
    _, letterbox = letterbox_image(np.zeros((100, 200, 3), np.uint8), (320, 320), stride=32)
    boxes = rescale_boxes(torch.tensor([[-50.0, -50, 9999, 9999]]), letterbox)
    assert boxes.tolist() == [[0, 0, 200, 100]]
