"""Colour, mixture, mirroring and the letterbox."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from utils.batch import FILL, Letterbox
from utils.datasets.augment import AugmentSettings, fit_letterbox, flip, jitter_colour, mix

IMAGE = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8),
    (80, 60),
    interpolation=cv2.INTER_CUBIC,
)


def jittered(settings: AugmentSettings, seed: int = 0) -> np.ndarray:
    out = np.zeros_like(IMAGE)
    jitter_colour(IMAGE.copy(), settings, np.random.default_rng(seed), out)
    return out


def test_without_gains_colour_only_changes_the_order_of_the_channels():
    np.testing.assert_array_equal(jittered(AugmentSettings()), IMAGE[..., ::-1])


@pytest.mark.parametrize("gains", [(0.015, 0.7, 0.4), (0.4, 0.2, 0.9), (0.9, 0.9, 0.9)])
@pytest.mark.parametrize("seed", range(6))
def test_hue_saturation_and_value_are_multiplied_by_random_factors(gains, seed):
    factors = 1 + np.random.default_rng(seed).uniform(-1, 1, 3) * gains
    hsv = cv2.cvtColor(IMAGE, cv2.COLOR_BGR2HSV).astype(float) * factors
    hsv[..., 0] %= 180
    expected = cv2.cvtColor(hsv.clip(0, 255).round().astype(np.uint8), cv2.COLOR_HSV2RGB)
    difference = np.abs(jittered(AugmentSettings(*gains), seed).astype(int) - expected)
    # Rounding in another place: one step of hue is up to 4 levels of a channel.
    assert difference.mean() < 1.5
    assert np.quantile(difference, 0.99) <= 9


def test_a_flip_mirrors_picture_and_boxes_alike():
    image = np.zeros((60, 80, 3), np.uint8)
    image[10:25, 5:40] = 255
    boxes = np.array([[1, 5, 10, 40, 25]], np.float32)
    moved = flip(image, boxes, AugmentSettings(flipud=1, fliplr=1), np.random.default_rng(0))
    ys, xs = np.nonzero(image[..., 0])
    assert moved.tolist() == [[1, xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]
    assert moved.tolist() == [[1, 40, 35, 75, 50]]
    assert boxes.tolist() == [[1, 5, 10, 40, 25]]


def test_flips_come_with_their_probabilities():
    rng = np.random.default_rng(0)
    boxes = np.array([[0, 0, 0, 10, 10]], np.float32)
    moved = [flip(IMAGE.copy(), boxes, AugmentSettings(flipud=0.1, fliplr=0.5), rng)[0] for _ in range(1000)]
    # 1000 draws: deviations of 9.5 and 16; five of each.
    assert abs(sum(row[2] != 0 for row in moved) - 100) < 48
    assert abs(sum(row[1] != 0 for row in moved) - 500) < 80


def test_a_mixture_is_about_half_of_each_and_has_the_boxes_of_both():
    dark, bright = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8)
    rng = np.random.default_rng(0)
    boxes = np.array([[0, 1, 1, 5, 5]], np.float32), np.array([[1, 2, 2, 6, 6]], np.float32)
    levels = []
    for _ in range(300):
        image, joined = mix((dark, boxes[0]), (bright, boxes[1]), rng)
        assert joined[:, 0].tolist() == [0, 1]
        assert np.ptp(image) == 0
        levels.append(image[0, 0, 0] / 200)
    # Beta(32, 32): mean .5, deviation .062; 300 draws put the mean within .0036.
    assert abs(np.mean(levels) - 0.5) < 0.018
    assert 0.05 < np.std(levels) < 0.075


@pytest.mark.parametrize(
    ("original", "scaled", "out", "expected"),
    [
        # original (h, w), scaled (h, w), batch (h, w), expected scale and pad (top, left)
        ((480, 640), (480, 640), (512, 672), ((1.0, 1.0), (16, 16))),
        ((480, 640), (240, 320), (320, 320), ((0.5, 0.5), (40, 0))),
        ((375, 500), (480, 640), (512, 672), ((1.28, 1.28), (16, 16))),
        ((427, 640), (427, 640), (448, 672), ((1.0, 1.0), (10, 16))),  # 10.5 rounds down
        ((100, 33), (320, 106), (320, 128), ((3.2, 106 / 33), (0, 11))),
        ((480, 640), (480, 640), (320, 320), ((0.5, 0.5), (40, 0))),  # too large: shrunk to fit
    ],
)
def test_the_letterbox_puts_a_picture_in_the_middle_of_its_place(original, scaled, out, expected):
    image = np.zeros((*scaled, 3), np.uint8)
    image[..., 0] = 250  # blue comes out last
    place = np.full((*out, 3), 7, np.uint8)
    letterbox = fit_letterbox(image, original, place)
    (scale, pad) = expected
    assert letterbox.original_hw == original
    np.testing.assert_allclose(letterbox.scale, scale)
    assert letterbox.pad == pad
    height, width = round(original[0] * scale[0]), round(original[1] * scale[1])
    top, left = pad
    inside = place[top : top + height, left : left + width]
    assert (inside == [0, 0, 250]).all()
    assert (place == FILL).all(2).sum() == out[0] * out[1] - height * width


def test_a_letterbox_maps_a_box_back_to_its_place_in_the_file():
    place = np.zeros((512, 672, 3), np.uint8)
    letterbox = fit_letterbox(np.zeros((480, 640, 3), np.uint8), (960, 1280), place)
    assert letterbox == Letterbox((960, 1280), (0.5, 0.5), (16.0, 16.0))
