"""Warps: boxes stay on what they mark, images equal those of a canvas that is really made."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
import pytest

from utils.batch import FILL
from utils.datasets.colour import ColourJitter
from utils.datasets.geometry import Tile, Warp, WarpSettings, random_warp, warp_canvas
from utils.datasets.mosaic import mosaic_tiles, single_tile
from utils.datasets.targets import (
    PlacedTile,
    box_candidates,
    normalise_boxes,
    place_boxes,
    tile_targets,
    warp_boxes,
)

SIZE = 160
SETTINGS = {
    "upright": WarpSettings(translate=0.1, scale=0.5),
    "turned": WarpSettings(degrees=25, translate=0.1, scale=0.5, shear=8),
    "perspective": WarpSettings(degrees=5, translate=0.1, scale=0.3, perspective=0.0008),
}


@dataclass(frozen=True)
class Pictures:
    """Four images with their labels."""

    images: list[np.ndarray]
    labels: list[np.ndarray]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(image.shape[1], image.shape[0]) for image in self.images]

    def tiles(self, rng: np.random.Generator) -> list[Tile]:
        return mosaic_tiles(range(4), self.sizes, SIZE, rng)

    def load(self, number: int, rows: int) -> np.ndarray:
        """The rows that are needed, and those below spoiled."""
        image = self.images[number].copy()
        image[rows:] = 255 - image[rows:]
        return image


def marked_pictures(rng: np.random.Generator) -> Pictures:
    """Four black images, each with one bright rectangle of its own colour and its label."""
    images, labels = [], []
    for number in range(4):
        width, height = (
            (SIZE, int(rng.integers(90, SIZE))) if number % 2 else (int(rng.integers(90, SIZE)), SIZE)
        )
        image = np.zeros((height, width, 3), np.uint8)
        x1, y1 = rng.integers(0, [width - 40, height - 40])
        x2, y2 = rng.integers([x1 + 20, y1 + 20], [width + 1, height + 1])
        image[y1:y2, x1:x2] = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)][number]
        labels.append(normalise_boxes(np.array([[number, x1, y1, x2, y2]], np.float32), (width, height)))
        images.append(image)
    return Pictures(images, labels)


def smooth_pictures(rng: np.random.Generator) -> Pictures:
    """Four images of smooth colours, without labels."""
    images = [
        cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), wh, interpolation=cv2.INTER_CUBIC)
        for wh in marked_pictures(rng).sizes
    ]
    return Pictures(images, [np.zeros((0, 5), np.float32)] * 4)


def boxes_of(shown, labels, warp: Warp, canvas: int, out: np.ndarray) -> np.ndarray:
    """The boxes (n, 5) in pixels of what `warp_canvas` has drawn."""
    placed = [PlacedTile(0, tile, (canvas, canvas), matrix, warp.scale) for tile, matrix in shown]
    targets = tile_targets(placed, labels, (out.shape[0], out.shape[1]))
    return place_boxes(targets[:, 1:], (out.shape[1], out.shape[0]), (0, 0))


def masks(out: np.ndarray) -> list[np.ndarray]:
    """Where each of the four colours is; half of the brightness is the rectangle's edge."""
    bright = out > 127
    blue, green, red = bright[..., 0], bright[..., 1], bright[..., 2]
    return [blue & ~green & ~red, green & ~blue & ~red, red & ~blue & ~green, blue & green & ~red]


def mosaic(seed: int, kind: str, flips=(False, False)) -> tuple[np.ndarray, np.ndarray, Warp]:
    rng = np.random.default_rng(seed)
    pictures = marked_pictures(rng)
    tiles = pictures.tiles(rng)
    warp = random_warp(SETTINGS[kind], (2 * SIZE, 2 * SIZE), (SIZE, SIZE), rng)
    warp, out = replace(warp, flips=flips), np.zeros((SIZE, SIZE, 3), np.uint8)
    shown = warp_canvas(tiles, warp, out, pictures.load)
    return out, boxes_of(shown, pictures.labels, warp, 2 * SIZE, out), warp


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("seed", range(25))
def test_boxes_of_a_mosaic_sit_on_the_pixels_they_mark(kind, seed):
    out, boxes, _ = mosaic(seed, kind)
    seen = masks(out)
    # A pixel counts when half of it is covered: half a pixel to each side, and as much again where
    # a corner of a turned rectangle is too thin to make any pixel bright.
    tolerance = 1.0 if kind == "upright" else 2.5
    for number, *corners in boxes:
        ys, xs = np.nonzero(seen[int(number)])
        found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        low, high = found[:2] - corners[:2], corners[2:] - found[2:]
        assert min(*low, *high) >= -tolerance
        # What the border cuts off a turned rectangle may end in a thinner corner than its own.
        at_border = kind != "upright" and (min(corners) <= 0 or max(corners) >= SIZE)
        assert max(*low, *high) <= tolerance * (2 if at_border else 1)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_marked_area_without_a_box_is_one_that_the_filter_drops(kind):
    for seed in range(25):
        out, boxes, warp = mosaic(seed, kind)
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
@pytest.mark.parametrize("flips", [(False, False), (False, True), (True, False), (True, True)])
def test_flips_mirror_picture_and_boxes_alike(kind, flips):
    for seed in range(5):
        straight, boxes, _ = mosaic(seed, kind)
        out, moved, _ = mosaic(seed, kind, flips)
        mirrored, expected = straight, boxes.copy()
        for flipped, axis, low, high in ((flips[0], 0, 2, 4), (flips[1], 1, 1, 3)):
            if flipped:
                mirrored = np.flip(mirrored, axis)
                expected[:, [low, high]] = SIZE - expected[:, [high, low]]
        np.testing.assert_allclose(moved, expected, atol=1e-3)
        difference = np.abs(out.astype(int) - mirrored)
        # A general warp interpolates in steps of 1/32 px, which round to another side.
        assert difference.max() == 0 if kind == "upright" else np.quantile(difference, 0.97) <= 8


def drawn(pictures: Pictures, tiles: list[Tile], warp: Warp, colour: ColourJitter | None) -> np.ndarray:
    out = np.full((SIZE, SIZE, 3), 7, np.uint8)
    warp_canvas(tiles, warp, out, pictures.load, colour)
    return out


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_picture_equals_that_of_a_canvas_that_is_really_made(kind):
    for seed in range(15):
        rng = np.random.default_rng(seed)
        pictures = smooth_pictures(rng)
        tiles = pictures.tiles(rng)
        warp = random_warp(SETTINGS[kind], (2 * SIZE, 2 * SIZE), (SIZE, SIZE), rng)
        difference = np.abs(
            drawn(pictures, tiles, warp, None).astype(int) - reference(tiles, warp, pictures.images)
        )
        # Smooth content: half a pixel of shift is a few levels. The edges of the tiles, at most
        # two rows and two columns each, may belong to either side.
        assert np.median(difference) <= 2
        assert np.quantile(difference, 0.9) <= 10


@pytest.mark.parametrize("kind", SETTINGS)
def test_colours_change_as_if_after_the_warp(kind):
    means = []
    for seed in range(15):
        rng = np.random.default_rng(seed)
        pictures = smooth_pictures(rng)
        tiles = pictures.tiles(rng)
        warp = random_warp(SETTINGS[kind], (2 * SIZE, 2 * SIZE), (SIZE, SIZE), rng)
        colour = ColourJitter((1.01, float(rng.uniform(0.3, 1.7)), float(rng.uniform(0.6, 1.4))))
        afterwards = drawn(pictures, tiles, warp, None)
        colour.paint(afterwards)
        difference = drawn(pictures, tiles, warp, colour).astype(int) - afterwards
        # Rounding in another place; a step of hue, of which there are 180, is up to 4 levels.
        assert np.median(np.abs(difference)) <= 1
        assert np.quantile(np.abs(difference), 0.95) <= 6
        means.append(difference.mean())
    assert abs(np.mean(means)) < 0.15
    assert max(np.abs(means)) < 0.4


@pytest.mark.parametrize("kind", SETTINGS)
def test_colours_change_where_there_are_fewer_pixels(monkeypatch, kind):
    painted = []
    monkeypatch.setattr(ColourJitter, "paint", lambda _, image: painted.append(image.shape[:2]))
    tile, out = Tile(0, (40, 40), (0, 0), (0, 0, 40, 40)), np.zeros((100, 100, 3), np.uint8)
    slant = 0.0 if kind == "upright" else 0.01
    for factor in (0.5, 2.0):
        matrix = np.array([[factor, slant, 0], [0, factor, 0], [0, 0, 1]])
        warp_canvas(
            [tile], Warp(matrix, factor), out, lambda *_: np.zeros((40, 40, 3), np.uint8), ColourJitter()
        )
    shrunk, original = painted
    assert original == (40, 40)
    assert max(shrunk) <= 21


def test_grey_is_filled_around_the_tiles_and_nowhere_else():
    """Whatever the tiles cover, with the level that the change of colours gives."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pictures = marked_pictures(rng)
        white = Pictures([np.full_like(image, 255) for image in pictures.images], pictures.labels)
        tiles = white.tiles(rng)
        warp = random_warp(SETTINGS["upright"], (2 * SIZE, 2 * SIZE), (SIZE, SIZE), rng)
        warp = replace(warp, flips=tuple(rng.random(2) < 0.5))
        out = drawn(white, tiles, warp, None)
        assert set(np.unique(out)) <= {FILL, 255}
        share = (reference(tiles, warp, white.images) > 200).mean()
        assert abs((out == 255).mean() - share) < 0.03


def test_what_lies_behind_the_camera_is_not_drawn():
    tile, out = Tile(0, (100, 100), (0, 0), (0, 0, 100, 100)), np.zeros((80, 80, 3), np.uint8)
    white = np.full((100, 100, 3), 255, np.uint8)
    # What is right of 50 comes to lie right of 60; what is left of it would appear, upside down, left of 40.
    matrix = np.array([[1.0, 0, 40], [0, 1, 40], [0, 0, 1]]) @ [[0.2, 0, 0], [0, 0.2, 0], [0.02, 0, -1]]
    warp_canvas([tile], Warp(matrix, 1.0), out, lambda *_: white)
    assert (out[:, :59] == FILL).all()
    assert (out[42:58, 62:] == 255).all()


def test_what_does_not_show_is_not_loaded():
    tile = Tile(0, (50, 50), (0, 0), (0, 0, 50, 50))
    asked: list[tuple[int, int]] = []
    out = np.zeros((64, 64, 3), np.uint8)

    def load(number, rows):
        asked.append((number, rows))
        return np.zeros((50, 50, 3), np.uint8)

    away = np.array([[1.0, 0, -60], [0, 1, 0], [0, 0, 1]])
    for matrix in (away, np.array([[0.9, 0.1, -80], [-0.1, 0.9, 0], [0, 0, 1]])):
        assert warp_canvas([tile], Warp(matrix, 1.0), out, load) == []
        assert (out == FILL).all()
    assert asked == []
    warp_canvas([tile], Warp(np.eye(3), 1.0), out, load)
    assert asked == [(0, 50)]


def test_only_the_rows_that_show_are_asked_for():
    tile, asked = Tile(3, (50, 50), (10, 20), (10, 20, 60, 64)), []

    def load(number, rows):
        asked.append((number, rows))
        return np.zeros((rows, 50, 3), np.uint8)

    out = np.zeros((40, 64, 3), np.uint8)
    warp_canvas([tile], Warp(np.eye(3), 1.0), out, load)
    turned = np.array([[0.99, 0.01, 0], [-0.01, 0.99, 0], [0, 0, 1]])
    warp_canvas([tile], Warp(turned, 1.0), out, load)
    # The output ends at row 40 of the canvas, at which the tile's row 20 is; the canvas ends at row 64.
    assert asked == [(3, 20), (3, 44)]


def test_without_strength_a_single_picture_of_the_size_passes_unchanged():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    labels = [np.array([[1, 0.5, 0.5, 0.25, 0.5]], np.float32)]
    warp, out = random_warp(WarpSettings(), (96, 64), (96, 64), rng), np.zeros_like(image)
    shown = warp_canvas([single_tile(0, (96, 64), (96, 64))], warp, out, lambda *_: image)
    np.testing.assert_array_equal(out, image)
    np.testing.assert_allclose(boxes_of(shown, labels, warp, 96, out), [[1, 36, 16, 60, 48]], atol=1e-4)


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
    sizes = [(SIZE, SIZE)] * 4
    points = np.array([mosaic_tiles(range(4), sizes, SIZE, rng)[3].origin_xy for _ in range(2000)])
    assert points.min() >= SIZE / 2
    assert points.max() <= 1.5 * SIZE
    for axis in (0, 1):
        counts, _ = np.histogram(points[:, axis], 10, (SIZE / 2, 1.5 * SIZE))
        assert np.abs(counts - 200).max() < 67


def test_the_tiles_of_a_mosaic_meet_in_one_point_and_keep_inside_the_canvas():
    rng = np.random.default_rng(1)
    for _ in range(20):
        pictures = marked_pictures(rng)
        tiles = pictures.tiles(rng)
        x, y = tiles[3].origin_xy
        assert [tile.span_xyxy[2:] for tile in tiles[:1]] == [(x, y)]
        assert (tiles[1].span_xyxy[0], tiles[1].span_xyxy[3]) == (x, y)
        assert (tiles[2].span_xyxy[2], tiles[2].span_xyxy[1]) == (x, y)
        for tile, (width, height) in zip(tiles, pictures.sizes, strict=True):
            x1, y1, x2, y2 = tile.span_xyxy
            assert 0 <= x1 < x2 <= 2 * SIZE
            assert 0 <= y1 < y2 <= 2 * SIZE
            assert x2 - x1 <= width
            assert y2 - y1 <= height


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
    labels = [np.array([[0, 0.5, 0.5, 1, 1]], np.float32)]
    tile = Tile(0, (40, 40), (0, 0), (0, 0, 40, 40))
    placed = PlacedTile(0, tile, (40, 40), np.diag([0.5, 0.5, 1.0]), 0.5)
    assert len(tile_targets([placed], labels, (100, 100))) == 1
    assert len(tile_targets([placed], labels, (5, 100))) == 1  # a quarter of the 20 px is left
    assert len(tile_targets([placed], labels, (3, 100))) == 1
    assert len(tile_targets([placed], labels, (2, 100))) == 0
    assert len(tile_targets([replace(placed, scale=1.0)], labels, (3, 100))) == 0


def test_a_turned_box_becomes_the_box_around_it():
    turned = np.array([[0, -1.0, 40], [1, 0, 0], [0, 0, 1]])
    boxes = warp_boxes(np.array([[2, 0, 10, 20, 40]], np.float32), turned, (99, 99))
    np.testing.assert_allclose(boxes, [[2, 0, 0, 30, 20]])


def test_labels_end_at_the_edge_of_the_canvas():
    labels = [np.array([[4, 0.5, 0.5, 1, 1]], np.float32)]
    tile = Tile(0, (80, 40), (-30, 50), (0, 50, 50, 64))
    placed = [PlacedTile(1, tile, (64, 64), np.eye(3), 1.0)]
    np.testing.assert_allclose(tile_targets(placed, labels, (100, 100)), [[1, 4, 0.25, 0.57, 0.5, 0.14]])


def test_labels_survive_the_way_to_pixels_and_back():
    labels = np.array([[3, 0.3, 0.6, 0.2, 0.4], [0, 0.5, 0.5, 1, 1]], np.float32)
    boxes = place_boxes(labels, (80, 50), (7, -3))
    np.testing.assert_allclose(boxes[1], [0, 7, -3, 87, 47], atol=1e-4)
    boxes[:, 1:] -= [7, -3, 7, -3]
    np.testing.assert_allclose(normalise_boxes(boxes, (80, 50)), labels, atol=1e-6)
    assert place_boxes(labels[:0], (80, 50), (0, 0)).shape == (0, 5)
