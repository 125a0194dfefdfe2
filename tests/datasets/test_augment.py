"""Colour, mixture, mirroring and the letterbox."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from utils.batch import FILL, Letterbox
from utils.datasets.augment import AugmentSettings, fit_letterbox, mixup_share, random_flips
from utils.datasets.colour import ColourJitter, random_jitter

IMAGE = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8),
    (80, 60),
    interpolation=cv2.INTER_CUBIC,
)


def jittered(gains: tuple[float, float, float], seed: int = 0) -> np.ndarray:
    out = IMAGE.copy()
    random_jitter(gains, np.random.default_rng(seed)).paint(out)
    return out


def test_without_gains_colour_only_changes_the_order_of_the_channels():
    np.testing.assert_array_equal(jittered((0, 0, 0)), IMAGE[..., ::-1])


@pytest.mark.parametrize("gains", [(0.015, 0.7, 0.4), (0.4, 0.2, 0.9), (0.9, 0.9, 0.9)])
@pytest.mark.parametrize("seed", range(6))
def test_hue_saturation_and_value_are_multiplied_by_random_factors(gains, seed):
    factors = 1 + np.random.default_rng(seed).uniform(-1, 1, 3) * gains
    hsv = cv2.cvtColor(IMAGE, cv2.COLOR_BGR2HSV).astype(float) * factors
    hsv[..., 0] %= 180
    expected = cv2.cvtColor(hsv.clip(0, 255).round().astype(np.uint8), cv2.COLOR_HSV2RGB)
    difference = np.abs(jittered(gains, seed).astype(int) - expected)
    # Rounding in another place: one step of hue is up to 4 levels of a channel.
    assert difference.mean() < 1.5
    assert np.quantile(difference, 0.99) <= 9


@pytest.mark.parametrize("width", [1, 7, 31, 33, 80])
def test_colours_do_not_depend_on_the_width(width):
    whole, part = IMAGE.copy(), np.array(IMAGE[:, :width])
    colour = ColourJitter((1.01, 0.6, 1.2))
    colour.paint(whole)
    colour.paint(part)
    # OpenCV rounds the last pixels, which do not fill a vector, in another way.
    assert np.abs(part.astype(int) - whole[:, :width]).max() <= 1


@pytest.mark.parametrize("factors", [None, (1.01, 0.6, 1.2), (0.9, 1.5, 0.3), (1.0, 1.0, 2.9)])
def test_the_level_of_the_border_is_that_of_painted_grey(factors):
    grey, colour = np.full((4, 4, 3), FILL, np.uint8), ColourJitter(factors)
    colour.paint(grey)
    assert (grey == colour.fill).all()


def test_flips_come_with_their_probabilities():
    rng = np.random.default_rng(0)
    drawn = np.array([random_flips(AugmentSettings(flipud=0.1, fliplr=0.5), rng) for _ in range(1000)])
    # 1000 draws: deviations of 9.5 and 16; five of each.
    assert abs(drawn[:, 0].sum() - 100) < 48
    assert abs(drawn[:, 1].sum() - 500) < 80


def test_a_mixture_is_about_half_of_each():
    rng = np.random.default_rng(0)
    shares = [mixup_share(rng) for _ in range(300)]
    # Beta(32, 32): mean .5, deviation .062; 300 draws put the mean within .0036.
    assert abs(np.mean(shares) - 0.5) < 0.018
    assert 0.05 < np.std(shares) < 0.075


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
