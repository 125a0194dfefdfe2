"""Image files of every kind end up as upright 8-bit BGR; broken ones are recognised."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.datasets.images import (
    MAX_SEGMENTS,
    UnreadableImageError,
    all_scaled_wh,
    check_image,
    declared_wh,
    read_for_evaluation,
    read_for_training,
    read_image,
    scaled_wh,
)

SMOOTH = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8),
    (96, 64),
    interpolation=cv2.INTER_CUBIC,
)


def encoded(suffix: str, image: np.ndarray = SMOOTH) -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """The file with an EXIF block that holds one tag, the orientation."""
    tiff = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + b"\0\0\0\0"
    body = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tiff", ".ppm"])
def test_common_formats_are_read_and_measured(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encoded(suffix))
    assert check_image(path) == (96, 64)
    assert read_image(path).shape == (64, 96, 3)


@pytest.mark.parametrize(
    "image",
    [SMOOTH[..., 0], np.dstack([SMOOTH, SMOOTH[..., :1]]), SMOOTH.astype(np.uint16) * 257],
    ids=["grey", "alpha", "16 bit"],
)
def test_unusual_depths_become_8_bit_bgr(tmp_path, image):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(".png", image))
    read = read_image(path)
    assert (read.shape, read.dtype) == ((64, 96, 3), np.uint8)
    expected = SMOOTH[..., :1].repeat(3, 2) if image.ndim == 2 else SMOOTH
    assert np.abs(read.astype(int) - expected).max() <= 1
    assert check_image(path) == (96, 64)


def test_a_cmyk_jpeg_is_read_in_colour(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.jpg"
    pillow.fromarray(np.ascontiguousarray(SMOOTH[..., ::-1])).convert("CMYK").save(path, quality=95)
    assert check_image(path) == (96, 64)
    assert np.abs(read_image(path).astype(int) - SMOOTH).mean() < 8


@pytest.mark.parametrize(("orientation", "wh"), [(1, (96, 64)), (3, (96, 64)), (6, (64, 96)), (8, (64, 96))])
def test_the_index_measures_a_rotated_photo_as_the_loader_reads_it(tmp_path, orientation, wh):
    path = tmp_path / "a.jpg"
    path.write_bytes(with_orientation(encoded(".jpg"), orientation))
    assert check_image(path) == wh
    assert read_image(path).shape[1::-1] == wh
    half = (wh[0] // 2, wh[1] // 2)
    shrunk = cv2.resize(read_image(path), half, interpolation=cv2.INTER_AREA)
    assert np.abs(read_for_training(path, wh, half).astype(int) - shrunk).max() < 12


def test_file_names_may_hold_spaces_and_any_script(tmp_path):
    path = tmp_path / "größe 写真 ß.jpg"
    path.write_bytes(encoded(".jpg"))
    assert check_image(path) == (96, 64)
    assert read_for_evaluation(path, (48, 32)).shape == (32, 48, 3)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"no image at all", "decode"),
        (encoded(".jpg")[:-400], "cut off"),
        (encoded(".png")[:-20], "cut off"),
        (encoded(".jpg")[:30] + b"\xff\xd9", "decode"),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "header only"],
)
def test_a_broken_picture_is_refused_with_the_reason(tmp_path, content, why):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for read in (check_image, read_image):
        with pytest.raises(UnreadableImageError, match=why):
            read(path)
    assert path.read_bytes() == content


def test_a_missing_picture_is_refused(tmp_path):
    with pytest.raises(UnreadableImageError, match="No such file"):
        check_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("progressive", [0, 1])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_without_its_end_mark_is_used(tmp_path, missing, progressive):
    whole = cv2.imencode(".jpg", SMOOTH, [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive])[1].tobytes()
    path = tmp_path / "a.jpg"
    path.write_bytes(whole)
    expected = read_image(path)
    path.write_bytes(whole[:-missing])
    assert check_image(path) == (96, 64)
    assert np.array_equal(read_image(path), expected)
    assert np.array_equal(read_for_evaluation(path, (96, 64)), expected)
    assert np.array_equal(read_for_training(path, (96, 64), (96, 64)), expected)
    assert read_for_training(path, (96, 64), (48, 32)).shape == (32, 48, 3)


@pytest.mark.parametrize("progressive", [0, 1])
@pytest.mark.parametrize("kept", [0.3, 0.5, 0.7, 0.9])
def test_half_a_jpeg_is_neither_whole_nor_read(tmp_path, kept, progressive):
    whole = cv2.imencode(".jpg", SMOOTH, [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive])[1].tobytes()
    path = tmp_path / "a.jpg"
    path.write_bytes(whole[: int(len(whole) * kept)])
    for read in (check_image, read_image):
        with pytest.raises(UnreadableImageError):
            read(path)


def test_bytes_after_the_end_mark_do_no_harm(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(".jpg") + b"\0" * 100)
    assert check_image(path) == (96, 64)


@pytest.mark.parametrize(
    ("wh", "size", "expected"),
    [
        ((640, 480), 320, (320, 240)),
        ((333, 500), 640, (426, 640)),
        ((10000, 3), 320, (320, 1)),
        ((50, 50), 64, (64, 64)),
    ],
)
def test_the_longer_side_is_scaled_to_the_image_size(wh, size, expected):
    assert scaled_wh(*wh, size) == expected


@pytest.mark.parametrize("factor", [2, 3, 4, 9])
def test_decoding_at_a_part_of_the_size_stays_close_to_a_full_decode(tmp_path, factor):
    wh = (288, 216)
    large = cv2.resize(SMOOTH, (wh[0] * factor, wh[1] * factor), interpolation=cv2.INTER_CUBIC)
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(".jpg", large))
    fast = read_for_training(path, (wh[0] * factor, wh[1] * factor), wh)
    full = cv2.resize(cv2.imread(str(Path(path))), wh, interpolation=cv2.INTER_AREA)
    # Smooth content: what is left is the rounding of two ways to average.
    assert fast.shape == full.shape
    assert np.abs(fast.astype(int) - full).mean() < 1.0


# Colours at full size, at half the width, at half of both, at half the height.
SUBSAMPLING = [
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
]


@pytest.mark.parametrize("subsampling", SUBSAMPLING)
@pytest.mark.parametrize(
    ("wh", "size"),
    [((320, 240), 320), ((500, 375), 640), ((640, 480), 320), ((96, 640), 64), ((333, 200), 320)],
)
def test_the_first_rows_equal_those_of_the_whole_picture(tmp_path, capfd, subsampling, wh, size):
    rng = np.random.default_rng(wh[0])
    noise = rng.integers(0, 256, (wh[1] // 4, wh[0] // 4, 3), dtype=np.uint8)
    image = cv2.resize(noise, wh, interpolation=cv2.INTER_CUBIC)
    path = tmp_path / "a.jpg"
    path.write_bytes(
        cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, subsampling])[1].tobytes()
    )
    scaled = scaled_wh(*wh, size)
    whole = read_for_training(path, wh, scaled)
    heights = []
    for rows in (1, scaled[1] // 3, scaled[1] // 2, scaled[1] - 40, scaled[1]):
        part = read_for_training(path, wh, scaled, rows)
        assert np.array_equal(part[:rows], whole[:rows])
        assert part.shape[1:] == whole.shape[1:]
        heights.append(part.shape[0])
    assert heights[-1] == scaled[1]
    # Only where a part of the height is scaled to whole rows; 200 to 192 px has steps of 24.
    assert heights[0] < heights[2] < scaled[1]
    assert capfd.readouterr() == ("", "")  # libjpeg reports what it holds to be damage


@pytest.mark.parametrize("subsampling", SUBSAMPLING)
def test_an_enlarged_part_ends_where_the_next_rows_no_longer_matter(tmp_path, subsampling):
    wh, rng = (64, 96), np.random.default_rng(0)
    content = cv2.imencode(
        ".jpg",
        rng.integers(0, 256, (wh[1], wh[0], 3), dtype=np.uint8),
        [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, subsampling],
    )[1].tobytes()
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for factor in (1, 2, 3):
        scaled = (wh[0] * factor, wh[1] * factor)
        whole, cut = read_for_training(path, wh, scaled), 0
        for rows in range(1, scaled[1] + 1):
            part = read_for_training(path, wh, scaled, rows)
            assert np.array_equal(part[:rows], whole[:rows])
            cut += len(part) < scaled[1]
        assert cut > scaled[1] // 2


def with_restarts(content: bytes) -> bytes:
    """A JPEG with restart markers, one for each row of blocks."""
    return cv2.imencode(
        ".jpg", cv2.imdecode(np.frombuffer(content, np.uint8), 1), [cv2.IMWRITE_JPEG_RST_INTERVAL, 4]
    )[1].tobytes()


def before_scan(content: bytes, segment: bytes) -> bytes:
    """The file with a segment behind its frame header, where decoders still look for them."""
    place = content.index(b"\xff\xda")
    return content[:place] + segment + content[place:]


def progressive(content: bytes) -> bytes:
    image = cv2.imdecode(np.frombuffer(content, np.uint8), 1)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()


@pytest.mark.parametrize(
    "change",
    [
        progressive,
        with_restarts,
        lambda content: with_orientation(content, 3),
        lambda content: before_scan(content, with_orientation(b"\xff\xd8", 3)[2:]),
        lambda content: content + content,
        lambda content: content + b"\0" * 50 + b"\xff\xd9",
        lambda content: content[:2] + b"\xff\xe5\0\4\xff\xda" + content[2:],
    ],
    ids=[
        "progressive",
        "restarts",
        "rotated",
        "rotated late",
        "two images",
        "second end",
        "a scan's marker in a segment",
    ],
)
def test_a_jpeg_that_cannot_be_cut_is_read_whole(tmp_path, capfd, change):
    path, wh = tmp_path / "a.jpg", (96, 96)
    path.write_bytes(change(encoded(".jpg", cv2.resize(SMOOTH, wh))))
    whole = read_for_training(path, wh, wh)
    capfd.readouterr()
    part = read_for_training(path, wh, wh, 20)
    assert np.array_equal(part, whole)
    assert capfd.readouterr().err == ""


def test_a_jpeg_that_has_changed_its_size_is_read_whole(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(".jpg", cv2.resize(SMOOTH, (96, 200))))
    assert read_for_training(path, (96, 96), (96, 96), 20).shape == (96, 96, 3)


def test_other_formats_are_read_whole(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(".png"))
    assert np.array_equal(read_for_training(path, (96, 64), (96, 64), 20), SMOOTH)


def test_many_sizes_are_scaled_as_each_is():
    sizes = np.random.default_rng(0).integers(1, 5000, (2000, 2))
    for side in (64, 320, 641):
        assert all_scaled_wh(sizes, side).tolist() == [list(scaled_wh(w, h, side)) for w, h in sizes.tolist()]
    assert all_scaled_wh(np.zeros((0, 2), np.int64), 64).shape == (0, 2)


@pytest.mark.parametrize("between", [b"ab", b"\xff\0", b"\xff" * 9, b"\xff\0a\xff\xff\0"])
def test_stray_bytes_before_the_picture_of_a_jpeg_do_not_hide_its_size(between):
    content = encoded(".jpg")
    place = content.index(b"\xff\xdb")
    assert declared_wh(content[:place] + between + content[place:]) == (96, 64)


@pytest.mark.fault(
    "a JPEG with 16 MiB of padding, or of tiny segments, before its image data",
    "padding is skipped, too many segments are refused; either takes under 1 s",
)
@pytest.mark.parametrize("unit", [b"\xff", b"a", b"\xff\xe5\0\2", b"\xff\xd0"])
def test_what_stands_before_the_picture_of_a_jpeg_takes_no_time(unit):
    content = encoded(".jpg")
    place, size = content.index(b"\xff\xdb"), 1 << 24
    before = unit * (size // len(unit))
    began = time.process_time()
    if len(unit) == 1:
        assert declared_wh(content[:place] + before + content[place:]) == (96, 64)
    else:
        with pytest.raises(UnreadableImageError, match=f"more than {MAX_SEGMENTS:,} segments"):
            declared_wh(content[:place] + before + content[place:])
    assert time.process_time() - began < 1
