"""Warps: boxes stay on what they mark, images equal those of a canvas that is really made."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from utils.batch import FILL
from utils.datasets.geometry import (
    Tile,
    Warp,
    WarpSettings,
    box_candidates,
    random_warp,
    warp_boxes,
    warp_canvas,
)
from utils.datasets.mosaic import ImageInfo, mosaic_tiles, normalise_boxes, place_boxes, single_tile

SIZE = 160
SETTINGS = {
    "upright": WarpSettings(translate=0.1, scale=0.5),
    "turned": WarpSettings(degrees=25, translate=0.1, scale=0.5, shear=8),
    "perspective": WarpSettings(degrees=5, translate=0.1, scale=0.3, perspective=0.0008),
}


def marked_pictures(rng: np.random.Generator) -> tuple[list[np.ndarray], list[ImageInfo]]:
    """Four black images, each with one bright rectangle of its own colour and its label."""
    images, pictures = [], []
    for number in range(4):
        width, height = (
            (SIZE, int(rng.integers(90, SIZE))) if number % 2 else (int(rng.integers(90, SIZE)), SIZE)
        )
        image = np.zeros((height, width, 3), np.uint8)
        x1, y1 = rng.integers(0, [width - 40, height - 40])
        x2, y2 = rng.integers([x1 + 20, y1 + 20], [width + 1, height + 1])
        image[y1:y2, x1:x2] = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)][number]
        labels = normalise_boxes(np.array([[number, x1, y1, x2, y2]], np.float32), (width, height))
        images.append(image)
        pictures.append(ImageInfo(number, (width, height), labels))
    return images, pictures


def masks(out: np.ndarray) -> list[np.ndarray]:
    """Where each of the four colours is; half of the brightness is the rectangle's edge."""
    bright = out > 127
    blue, green, red = bright[..., 0], bright[..., 1], bright[..., 2]
    return [blue & ~green & ~red, green & ~blue & ~red, red & ~blue & ~green, blue & green & ~red]


def mosaic(seed: int, kind: str) -> tuple[np.ndarray, np.ndarray, list[Tile], Warp, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    images, pictures = marked_pictures(rng)
    tiles = mosaic_tiles(pictures, SIZE, rng)
    warp = random_warp(SETTINGS[kind], (2 * SIZE, 2 * SIZE), (SIZE, SIZE), rng)
    out, boxes = warp_canvas(tiles, warp, (SIZE, SIZE), images.__getitem__)
    return out, boxes, tiles, warp, images


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("seed", range(25))
def test_boxes_of_a_mosaic_sit_on_the_pixels_they_mark(kind, seed):
    out, boxes, *_ = mosaic(seed, kind)
    seen = masks(out)
    # A pixel counts when half of it is covered: half a pixel to each side, and as much again where
    # a corner of a turned rectangle is too thin to make any pixel bright.
    tolerance = 1.0 if kind == "upright" else 2.5
    for number, *corners in boxes:
        ys, xs = np.nonzero(seen[int(number)])
        found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        low, high = found[:2] - corners[:2], corners[2:] - found[2:]
        assert min(*low, *high) >= -tolerance
        if kind == "upright" or (min(corners) > 0 and max(corners) < SIZE):
            # Beyond the border of the image a turned rectangle may be wider than what shows.
            assert max(*low, *high) <= tolerance


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_marked_area_without_a_box_is_one_that_the_filter_drops(kind):
    for seed in range(25):
        out, boxes, _, warp, _ = mosaic(seed, kind)
        for number, mask in enumerate(masks(out)):
            if number not in boxes[:, 0] and mask.any():
                ys, xs = np.nonzero(mask)
                sides = np.ptp(xs) + 1, np.ptp(ys) + 1
                assert min(sides) <= 4 or mask.sum() < 0.25 * 60 * 60 * warp.scale**2


def reference(tiles: list[Tile], warp: Warp, images: list[np.ndarray]) -> np.ndarray:
    """The plain way: make the whole canvas, then warp it."""
    canvas = np.full((2 * SIZE, 2 * SIZE, 3), FILL, np.uint8)
    for tile in tiles:
        x1, y1, x2, y2 = tile.span_xyxy
        left, top = tile.origin_xy
        canvas[y1:y2, x1:x2] = images[tile.number][y1 - top : y2 - top, x1 - left : x2 - left]
    shift = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    matrix = np.linalg.inv(shift) @ warp.matrix @ shift
    return cv2.warpPerspective(canvas, matrix, (SIZE, SIZE), borderValue=(FILL,) * 3)


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_picture_equals_that_of_a_canvas_that_is_really_made(kind):
    for seed in range(15):
        rng = np.random.default_rng(seed)
        _, pictures = marked_pictures(rng)
        images = [
            cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), p.wh, interpolation=cv2.INTER_CUBIC)
            for p in pictures
        ]
        tiles = mosaic_tiles(pictures, SIZE, rng)
        warp = random_warp(SETTINGS[kind], (2 * SIZE, 2 * SIZE), (SIZE, SIZE), rng)
        out, _ = warp_canvas(tiles, warp, (SIZE, SIZE), images.__getitem__)
        difference = np.abs(out.astype(int) - reference(tiles, warp, images))
        # Smooth content: half a pixel of shift is a few levels. The edges of the tiles, at most
        # two rows and two columns each, may belong to either side.
        assert np.median(difference) <= 2
        assert np.quantile(difference, 0.9) <= 10


def test_what_does_not_show_is_not_loaded():
    tile = Tile(0, (0, 0), (0, 0, 50, 50), np.array([[0, 1, 1, 40, 40]], np.float32))
    asked: list[int] = []

    def load(number):
        asked.append(number)
        return np.zeros((50, 50, 3), np.uint8)

    away = np.array([[1.0, 0, -60], [0, 1, 0], [0, 0, 1]])
    for matrix in (away, np.array([[0.9, 0.1, -80], [-0.1, 0.9, 0], [0, 0, 1]])):
        out, boxes = warp_canvas([tile], Warp(matrix, 1.0), (64, 64), load)
        assert (out == FILL).all()
        assert len(boxes) == 0
    assert asked == []
    warp_canvas([tile], Warp(np.eye(3), 1.0), (64, 64), load)
    assert asked == [0]


def test_without_strength_a_single_picture_of_the_size_passes_unchanged():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    labels = np.array([[1, 0.5, 0.5, 0.25, 0.5]], np.float32)
    warp = random_warp(WarpSettings(), (96, 64), (96, 64), rng)
    out, boxes = warp_canvas(
        [single_tile(ImageInfo(0, (96, 64), labels), (96, 64))], warp, (64, 96), lambda _: image
    )
    np.testing.assert_array_equal(out, image)
    np.testing.assert_allclose(boxes, [[1, 36, 16, 60, 48]], atol=1e-4)


def test_a_mosaic_without_strength_shows_the_middle_of_its_canvas():
    rng = np.random.default_rng(3)
    warp = random_warp(WarpSettings(), (2 * SIZE, 2 * SIZE), (SIZE, SIZE), rng)
    np.testing.assert_allclose(warp.matrix, [[1, 0, -SIZE / 2], [0, 1, -SIZE / 2], [0, 0, 1]], atol=1e-9)


class Highest:
    """A source of chance that always draws the upper end."""

    def uniform(self, low, high, size=None):
        return high if size is None else np.full(size, high)


def test_the_parts_of_a_warp_apply_in_the_order_centre_perspective_rotation_shear_translation():
    settings = WarpSettings(degrees=30, translate=0.2, scale=0.4, shear=45, perspective=0.001)
    warp = random_warp(settings, (200, 100), (80, 60), Highest())  # type: ignore[arg-type]
    point = np.array([130.0, 90.0])
    moved = point - [100, 50]  # the canvas's middle becomes the origin
    moved = moved / (1 + 0.001 * moved.sum())
    cos, sin = np.sqrt(3) / 2, 0.5
    moved = 1.4 * np.array([cos * moved[0] + sin * moved[1], -sin * moved[0] + cos * moved[1]])
    moved = np.array([moved[0] + moved[1], moved[0] + moved[1]])  # tan 45 degrees = 1, both ways
    moved += [0.7 * 80, 0.7 * 60]
    mapped = warp.matrix @ [*point, 1]
    np.testing.assert_allclose(mapped[:2] / mapped[2], moved)
    assert warp.scale == pytest.approx(1.4)


def test_random_maps_fill_their_ranges_evenly():
    rng = np.random.default_rng(0)
    settings = WarpSettings(translate=0.1, scale=0.5)
    warps = [random_warp(settings, (200, 200), (100, 100), rng) for _ in range(2000)]
    scales = np.array([warp.scale for warp in warps])
    shifts = np.array([(warp.matrix @ [100, 100, 1])[:2] for warp in warps])
    for values, low, high in ((scales, 0.5, 1.5), (shifts[:, 0], 40, 60), (shifts[:, 1], 40, 60)):
        assert low <= values.min()
        assert values.max() <= high
        counts, _ = np.histogram(values, 10, (low, high))
        # 2000 draws in 10 bins: 200 +- 13; five deviations.
        assert np.abs(counts - 200).max() < 67


def test_the_point_of_a_mosaic_lies_evenly_in_the_middle_half():
    rng = np.random.default_rng(0)
    pictures = [ImageInfo(number, (SIZE, SIZE), np.zeros((0, 5), np.float32)) for number in range(4)]
    points = np.array([mosaic_tiles(pictures, SIZE, rng)[3].origin_xy for _ in range(2000)])
    assert points.min() >= SIZE / 2
    assert points.max() <= 1.5 * SIZE
    for axis in (0, 1):
        counts, _ = np.histogram(points[:, axis], 10, (SIZE / 2, 1.5 * SIZE))
        assert np.abs(counts - 200).max() < 67


def test_the_tiles_of_a_mosaic_meet_in_one_point_and_keep_inside_the_canvas():
    rng = np.random.default_rng(1)
    for _ in range(20):
        _, pictures = marked_pictures(rng)
        tiles = mosaic_tiles(pictures, SIZE, rng)
        x, y = tiles[3].origin_xy
        assert [tile.span_xyxy[2:] for tile in tiles[:1]] == [(x, y)]
        assert (tiles[1].span_xyxy[0], tiles[1].span_xyxy[3]) == (x, y)
        assert (tiles[2].span_xyxy[2], tiles[2].span_xyxy[1]) == (x, y)
        for tile, picture in zip(tiles, pictures, strict=True):
            x1, y1, x2, y2 = tile.span_xyxy
            assert 0 <= x1 < x2 <= 2 * SIZE
            assert 0 <= y1 < y2 <= 2 * SIZE
            assert x2 - x1 <= picture.wh[0]
            assert y2 - y1 <= picture.wh[1]


@pytest.mark.parametrize(
    ("after", "kept"),
    [
        ([0, 0, 100, 100], True),
        ([0, 0, 2, 100], False),  # not wider than 2 px
        ([0, 0, 100, 2], False),
        ([0, 0, 10.1, 100], True),
        ([0, 0, 9.9, 100], False),  # less than a tenth is left
        ([0, 0, 2.5, 250], False),  # 100 times as high as wide
    ],
)
def test_boxes_that_nearly_vanish_are_dropped(after, kept):
    before = np.array([[0, 0, 100, 100.0]])
    assert box_candidates(before, np.array([after], float)).tolist() == [kept]


def test_the_area_before_counts_at_the_scale_of_the_warp():
    boxes = np.array([[0, 0, 0, 40, 40]], np.float32)
    half = np.diag([0.5, 0.5, 1.0])
    assert len(warp_boxes(boxes, half, 0.5, (100, 100))) == 1
    assert len(warp_boxes(boxes, half, 0.5, (100, 1))) == 0
    turned = np.array([[0, -1.0, 40], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(
        warp_boxes(np.array([[2, 0, 10, 20, 40]], np.float32), turned, 1.0, (99, 99)), [[2, 0, 0, 30, 20]]
    )


def test_labels_survive_the_way_to_pixels_and_back():
    labels = np.array([[3, 0.3, 0.6, 0.2, 0.4], [0, 0.5, 0.5, 1, 1]], np.float32)
    boxes = place_boxes(labels, (80, 50), (7, -3))
    np.testing.assert_allclose(boxes[1], [0, 7, -3, 87, 47], atol=1e-4)
    boxes[:, 1:] -= [7, -3, 7, -3]
    np.testing.assert_allclose(normalise_boxes(boxes, (80, 50)), labels, atol=1e-6)
    assert place_boxes(labels[:0], (80, 50), (0, 0)).shape == (0, 5)
