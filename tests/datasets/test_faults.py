"""Odd and broken images and labels in a set of good ones: what becomes of them."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.config.dataset import load_dataset_config
from utils.datasets.check import check_split
from utils.datasets.images import (
    MAX_PIXELS,
    UnreadableImageError,
    check_image,
    declared_wh,
    decode_image,
    read_for_training,
    read_image,
)
from utils.datasets.index import build_index
from utils.datasets.loader import AugmentSettings, eval_loader, train_loader
from utils.errors import UserError

pillow = pytest.importorskip("PIL.Image")

GOOD = b"1 0.5 0.5 0.25 0.5\n"
SMOOTH = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8),
    (96, 64),
    interpolation=cv2.INTER_CUBIC,
)


@dataclass(frozen=True)
class Picture:
    """A file, what docs/reliability.md says of it, and what must become of it."""

    what: str
    happens: str
    suffix: str
    content: bytes
    wh: tuple[int, int] = (96, 64)  # (0, 0): it is skipped
    reason: str = ""


def encoded(suffix: str, image: np.ndarray = SMOOTH) -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def by_pillow(kind: str, mode: str = "RGB", frames: int = 1, **words: object) -> bytes:
    first = pillow.fromarray(np.ascontiguousarray(SMOOTH[..., ::-1])).convert(mode)
    others = [pillow.fromarray(np.full_like(SMOOTH, 9)).convert(mode)] * (frames - 1)
    extra = {"save_all": True, "append_images": others} if others else {}
    buffer = io.BytesIO()
    first.save(buffer, kind, **extra, **words)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    tiff = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + b"\0\0\0\0"
    body, jpeg = b"Exif\0\0" + tiff, encoded(".jpg")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


LEFT_OUT = "skipped; one warning names and counts it"
EIGHT_BIT = "read as 8-bit colour"
PICTURES = {
    "empty": Picture("an empty image file", LEFT_OUT, ".jpg", b"", (0, 0), "the file is empty"),
    "cut jpeg": Picture("a truncated JPEG", LEFT_OUT, ".jpg", encoded(".jpg")[:-400], (0, 0), "cut off"),
    "cut png": Picture("a truncated PNG", LEFT_OUT, ".png", encoded(".png")[:-40], (0, 0), "cut off"),
    "cut webp": Picture("a truncated WebP", LEFT_OUT, ".webp", encoded(".webp")[:-90], (0, 0), "decode"),
    "cut bmp": Picture("a truncated BMP", LEFT_OUT, ".bmp", encoded(".bmp")[:-900], (0, 0), "decode"),
    "cut tiff": Picture("a truncated TIFF", LEFT_OUT, ".tif", encoded(".tif")[:-900], (0, 0), "decode"),
    "end mark": Picture(
        "a JPEG that lacks only its end-of-image marker", "used", ".jpg", encoded(".jpg")[:-2]
    ),
    "png as jpg": Picture(
        "a PNG named `.jpg`", "used; the actual format is detected", ".jpg", encoded(".png")
    ),
    "gif as jpg": Picture(
        "a GIF named `.jpg`", "used; the actual format is detected", ".jpg", by_pillow("GIF")
    ),
    "text": Picture("a text file named `.jpg`", LEFT_OUT, ".jpg", b"hello\n" * 9, (0, 0), "decode"),
    "cmyk": Picture("a CMYK JPEG", EIGHT_BIT, ".jpg", by_pillow("JPEG", "CMYK", quality=95)),
    "cmyk tiff": Picture("a CMYK TIFF", EIGHT_BIT, ".tif", by_pillow("TIFF", "CMYK")),
    "16 bit": Picture("a 16-bit PNG", EIGHT_BIT, ".png", encoded(".png", SMOOTH.astype(np.uint16) * 257)),
    "float": Picture(
        "a floating-point TIFF",
        LEFT_OUT,
        ".tif",
        encoded(".tif", SMOOTH.astype(np.float32)),
        (0, 0),
        "decode",
    ),
    "grey": Picture("a greyscale image", EIGHT_BIT, ".png", encoded(".png", SMOOTH[..., 0])),
    "alpha": Picture(
        "an image with an alpha channel",
        "read as opaque",
        ".png",
        encoded(".png", np.dstack([SMOOTH, np.zeros_like(SMOOTH[..., :1])])),
    ),
    "palette": Picture("an image with a colour palette", EIGHT_BIT, ".png", by_pillow("PNG", "P")),
    "animated gif": Picture(
        "an animated GIF named `.jpg`", "used as a single image", ".jpg", by_pillow("GIF", frames=3)
    ),
    "animated webp": Picture(
        "an animated WebP", "its first frame is used", ".webp", by_pillow("WEBP", frames=3, lossless=True)
    ),
    "apng": Picture("an animated PNG", "its first frame is used", ".png", by_pillow("PNG", frames=3)),
    "pages": Picture("a multi-page TIFF", "its first page is used", ".tif", by_pillow("TIFF", frames=2)),
    "turned": Picture(
        "a photo with an EXIF orientation",
        "rotated upright; labels refer to the upright image",
        ".jpg",
        turned(6),
        (64, 96),
    ),
    "odd orientation": Picture(
        "a photo with an invalid EXIF orientation (99)", "not rotated", ".jpg", turned(99)
    ),
    "one pixel": Picture("an image of 1 x 1 px", "used", ".png", encoded(".png", SMOOTH[:1, :1]), (1, 1)),
    "wide": Picture(
        "an image of 20,000 x 20 px",
        "used",
        ".jpg",
        encoded(".jpg", np.zeros((20, 20_000, 3), np.uint8)),
        (20_000, 20),
    ),
}


def write_set(make_dataset, name: str, content: bytes, label: bytes = GOOD):
    config = make_dataset({"good 0.png": "0 .5 .5 .4 .4\n", "good 1.png": "1 .5 .5 .4 .4\n", name: ""})
    folder = config.splits["train"][0]
    (folder / name).write_bytes(content)
    (config.root / "labels" / "train" / name).with_suffix(".txt").write_bytes(label)
    return config


def batches_of(index):
    augment = AugmentSettings(translate=0.1, scale=0.5, fliplr=0.5, mosaic=0.5)
    training = train_loader(index, image_size=64, batch_size=2, augment=augment, workers=0, seed=0)
    evaluation = eval_loader(index, image_size=64, batch_size=2, workers=0)
    return [*training], [*evaluation]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.fault(p.what, p.happens)) for n, p in PICTURES.items()]
)
def test_a_picture_is_used_or_left_out_by_name(name, make_dataset):
    case = PICTURES[name]
    config = write_set(make_dataset, f"odd{case.suffix}", case.content)
    index = build_index(config, "train", progress=False)
    report = check_split(config, "train", progress=False)
    assert [int(side) for side in case.wh] == (index.sizes_wh[2].tolist() if len(index) == 3 else [0, 0])
    if case.wh == (0, 0):
        [problem] = index.problems
        assert problem.startswith("1 image skipped: ") and f"odd{case.suffix}: " in problem
        assert case.reason in problem
        assert len(report.unusable) == 1 and case.reason in report.unusable[0]
    else:
        assert index.problems == [] and report.is_good
        np.testing.assert_allclose(index.labels[2], [[1, 0.5, 0.5, 0.25, 0.5]])
    training, evaluation = batches_of(index)
    for batches in (training, evaluation):
        assert sum(len(batch.images) for batch in batches) == len(index)
    path = config.splits["train"][0] / f"odd{case.suffix}"
    assert path.read_bytes() == case.content
    if case.wh == (96, 64) and "grey" not in name and "palette" not in name and "gif" not in name:
        assert np.abs(read_image(path).astype(int) - SMOOTH).mean() < 3


@pytest.mark.fault("a 16-bit TIFF", EIGHT_BIT)
def test_a_16_bit_tiff_keeps_its_colours(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(encoded(".tif", SMOOTH.astype(np.uint16) * 257))
    assert np.abs(read_image(path).astype(int) - SMOOTH).max() <= 1


READ_ALL = """
import resource, sys
from utils.datasets.images import check_image, read_for_evaluation, read_for_training, scaled_wh
wh = check_image(sys.argv[1])
small = scaled_wh(*wh, 640)
assert read_for_training(sys.argv[1], wh, small).shape == (640, 640, 3)
assert read_for_evaluation(sys.argv[1], small).shape == (640, 640, 3)
print(wh, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.slow
@pytest.mark.fault(
    "an image of 20,000 x 20,000 px", "readable; the process that reads it stays below 3,000 MiB of memory"
)
def test_a_picture_of_400_million_pixels_is_read(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(".jpg", np.zeros((20_000, 20_000), np.uint8)))
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, path], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(20000, 20000) ") and int(done.stdout.split()[-1]) < 3000


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A grey progressive JPEG whose scans after the first say of every block that nothing is added."""

    def segment(marker: int, content: bytes) -> bytes:
        return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content

    blocks = (side // 8) ** 2
    one_code = bytes([1, *[0] * 15])
    runs = "".join("0" + "1" * 14 for _ in range(blocks // 32_767))  # a bit of code, 14 of length
    bits = int(runs + "1" * (-len(runs) % 8) or "1" * 8, 2).to_bytes(max(-(-len(runs) // 8), 1), "big")
    parts = [
        b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64),
        segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0"),
        segment(0xC4, b"\0" + one_code + b"\0") + segment(0xC4, b"\x10" + one_code + b"\xe0"),
        segment(0xDA, b"\1\1\0\0\0\0") + bytes(blocks // 8),
    ]
    rest = bits.replace(b"\xff", b"\xff\0")
    parts += [segment(0xDA, b"\1\1\0" + bytes([1 + scan % 63] * 2) + b"\0") + rest for scan in range(scans)]
    return b"".join(parts) + b"\xff\xd9"


@pytest.mark.fault(
    "a JPEG of 0.4 MB with 3,000 scans, which would take minutes to decode",
    "refused without being decoded, in under 2 s",
)
def test_a_jpeg_that_would_take_minutes_is_not_decoded():
    assert decode_image(jpeg_of_scans(256, 63)).shape == (256, 256, 3)
    began = time.process_time()
    with pytest.raises(UnreadableImageError, match="3001 scans would take minutes"):
        decode_image(jpeg_of_scans(8000, 3000))
    assert time.process_time() - began < 2


@pytest.mark.fault(
    "a PNG, GIF or JPEG that claims more than 537 million pixels", "refused before it is decoded"
)
@pytest.mark.parametrize("suffix", [".png", ".gif", ".jpg"])
def test_a_picture_that_claims_too_much_is_refused_before_it_is_decoded(suffix, tmp_path):
    content = bytearray(encoded(suffix))
    assert declared_wh(bytes(content)) == (96, 64)
    side = struct.pack(">I" if suffix == ".png" else "<H" if suffix == ".gif" else ">H", 60_000)
    if suffix == ".jpg":
        frame = content.index(b"\xff\xc0")
        content[frame + 5 : frame + 9] = side * 2
    else:
        start = 16 if suffix == ".png" else 6
        content[start : start + 2 * len(side)] = side * 2
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert declared_wh(bytes(content)) == (60_000, 60_000) and 60_000**2 > MAX_PIXELS
    with pytest.raises(UnreadableImageError, match="60000 x 60000 px are more than"):
        check_image(path)


@pytest.mark.fault(
    "the same without the end marker, which has to be decoded to see whether more is missing",
    "refused before that",
)
def test_a_bomb_without_its_end_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    def decode(*_):
        raise AssertionError("decoded")

    wide = bytearray(encoded(".jpg"))
    frame = wide.index(b"\xff\xc0")
    wide[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    monkeypatch.setattr(cv2, "imdecode", decode)
    for content, told in ((bytes(wide), "60000 x 60000 px"), (jpeg_of_scans(8000, 3000), "3001 scans")):
        assert content.endswith(b"\xff\xd9")
        path = tmp_path / "a.jpg"
        path.write_bytes(content[:-2])
        for read in (check_image, read_image, lambda path: read_for_training(path, (8000, 8000), (80, 80))):
            with pytest.raises(UnreadableImageError, match=told):
                read(path)


@pytest.mark.fault(
    "a named pipe, device or folder in place of an image",
    "skipped without blocking; a warning names pipes and devices",
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_left_out(kind, make_dataset):
    config = make_dataset({"good.png": "0 .5 .5 .4 .4\n"})
    path = config.splits["train"][0] / "odd.png"
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    index = build_index(config, "train", progress=False)
    assert [Path(found).name for found in index.paths] == ["good.png"]
    skipped = [problem for problem in index.problems if problem.startswith("1 image skipped: ")]
    assert len(skipped) == (kind != "folder")  # a folder of that name holds no images


@pytest.mark.fault(
    "symlinks in an image folder that lead back to a parent folder", "not followed; other symlinks are"
)
def test_links_that_lead_back_up_are_not_followed(make_dataset):
    config = make_dataset({"a/x.png": "0 .5 .5 .4 .4\n", "b/y.png": "1 .5 .5 .4 .4\n"})
    folder = config.splits["train"][0]
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "self").symlink_to(folder / "a")
    (folder / "a" / "over").symlink_to(folder / "b")
    (folder / "b" / "back").symlink_to(folder / "a")
    names = [Path(path).relative_to(folder).as_posix() for path in build_index(config, "train").paths]
    assert {"a/x.png", "b/y.png", "a/over/y.png", "b/back/x.png"} == set(names)


@dataclass(frozen=True)
class Label:
    """A label file's content, what docs/reliability.md says of it, and what must become of it.

    refused: words of the error; else `labels` are the rows and `corrected` a word of the warning.
    """

    what: str
    happens: str
    content: bytes
    refused: str = ""
    labels: tuple[tuple[float, ...], ...] = ((1, 0.5, 0.5, 0.25, 0.5),)
    corrected: str = ""


STOPS = "training is refused with file and line; `--check-data` reports the line too"
MENDED = "corrected in memory, with a warning giving count and file: "
LABELS = {
    "nan": Label("NaN in a label", STOPS, b"0 nan .5 .1 .1\n", "odd.txt:1: a number is not finite"),
    "negative": Label(
        "a box with a negative width", STOPS, GOOD + b"0 .5 .5 -.1 .1\n", "odd.txt:2: negative size"
    ),
    "pixels": Label(
        "box coordinates in pixels", STOPS, b"0 320 240 50 50\n", "odd.txt:1: coordinates must be"
    ),
    "columns": Label(
        "a label line with a wrong number of columns", STOPS, b"0 .5 .5 .1\n", "odd.txt:1: 4 numbers"
    ),
    "class": Label(
        "a class id that is missing from `names`", STOPS, b"7 .5 .5 .1 .1\n", "odd.txt:1: class 7"
    ),
    "words": Label(
        "words or decimal commas in a label line", STOPS, b"cat 0,5 0,5 0,1 0,1\n", "odd.txt:1: 'cat 0,5"
    ),
    "latin-1": Label(
        "a label file that is not in UTF-8 (Latin-1)",
        STOPS,
        "caf\xe9 .5 .5".encode("latin-1"),
        "odd.txt:1: 'caf",
    ),
    "outside": Label(
        "a box that extends beyond the image",
        MENDED + "clipped",
        b"1 .9 .5 .4 .5\n",
        labels=((1, 0.85, 0.5, 0.3, 0.5),),
        corrected="reached out",
    ),
    "gone": Label(
        "a box outside the image or with zero area",
        MENDED + "dropped",
        GOOD + b"0 1.5 .5 .2 .2\n0 .5 .5 0 .1\n",
        corrected="1 box lay outside of the image and was left out",
    ),
    "twice": Label(
        "duplicate labels", MENDED + "duplicates dropped", GOOD * 3, corrected="2 labels repeated"
    ),
    "segment": Label(
        "a polygon instead of a box", "its bounding box is used", b"1 .375 .25 .625 .25 .625 .75 .375 .75\n"
    ),
    "crlf": Label(
        "Windows or classic Mac line endings, blank lines", "accepted", b"\r\n1 .5 .5 .25 .5\r\r\n"
    ),
    "bom": Label("a UTF-8 label file with a byte order mark", "accepted", b"\xef\xbb\xbf" + GOOD),
    "utf-16": Label("a UTF-16 label file with a byte order mark", "accepted", GOOD.decode().encode("utf-16")),
    "empty": Label("an empty label file", "the image has no objects", b"", labels=()),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.fault(c.what, c.happens)) for n, c in LABELS.items()]
)
def test_a_label_is_understood_corrected_or_refused_by_file_and_line(name, make_dataset):
    case = LABELS[name]
    config = write_set(make_dataset, "odd.png", encoded(".png"), case.content)
    report = check_split(config, "train", progress=False)
    path = config.root / "labels" / "train" / "odd.txt"
    if case.refused:
        with pytest.raises(UserError) as caught:
            build_index(config, "train", progress=False)
        assert case.refused in str(caught.value) and "--check-data" in str(caught.value)
        assert any(case.refused in line for line in report.wrong)
    else:
        index = build_index(config, "train", progress=False)
        np.testing.assert_allclose(index.labels[2], np.reshape(case.labels, (-1, 5)), atol=1e-6)
        told = " ".join(problem for problem in index.problems if "odd.txt" in problem)
        assert case.corrected in told and bool(case.corrected) == bool(told) == bool(report.corrected)
        assert case.corrected in " ".join(report.corrected) and report.wrong == []
        batches_of(index)
    assert path.read_bytes() == case.content


@pytest.mark.fault("an image without a label file", "treated as background; a warning gives count and file")
def test_a_picture_without_a_label_file_is_background(make_dataset):
    config = make_dataset({"a.png": "0 .5 .5 .4 .4\n", "b.png": None})
    index = build_index(config, "train", progress=False)
    [problem] = index.problems
    assert len(index.labels[1]) == 0 and problem.startswith("1 of 2 images has no label file")
    assert "b.png" in problem


VOC = """<?xml version="1.0" encoding="{}"?>
<annotation><size><width>{}</width><height>48</height></size><object><name>{}</name>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>24</ymax></bndbox></object></annotation>"""


@pytest.mark.fault(
    "a VOC annotation that is truncated, has NaN as a coordinate, or is in an unsupported encoding",
    "training is refused with file and line",
)
@pytest.mark.fault(
    "a VOC annotation made for another image size",
    "boxes are scaled in memory, with a warning naming the file",
)
def test_voc_annotations_are_corrected_or_refused_by_file_and_line(make_dataset):
    source = make_dataset({"a.png": ""})
    base = source.root / "VOC"
    for name in ("Annotations", "ImageSets", "JPEGImages"):
        (base / name).mkdir(parents=True)
    (source.splits["train"][0] / "a.png").rename(base / "JPEGImages/a.png")
    (base / "ImageSets/all.txt").write_text("a\n")
    config_path = source.yaml_path.with_name("voc.yaml")
    config_path.write_text("path: data set/VOC\nlayout: voc\ntrain: ImageSets/all.txt\nnames: [cat, 鼠]\n")
    config = load_dataset_config(config_path)
    path = base / "Annotations/a.xml"
    path.write_text(VOC.format("utf-8", 128, "cat", 64))
    index = build_index(config, "train", progress=False)
    np.testing.assert_allclose(index.labels[0], [[0, 0.25, 0.25, 0.5, 0.5]])
    assert "a.xml: annotated at 128 x 48 px" in index.problems[0]
    for content, words in (
        (VOC.format("gbk", 64, "鼠", 64).encode("gbk"), "a.xml:1: its encoding is not known"),
        (VOC.format("no-such", 64, "cat", 64).encode(), "a.xml:1: "),
        (VOC.format("utf-8", 64, "cat", 64).encode()[:-30], "a.xml:3: no valid XML"),
        (VOC.format("utf-8", 64, "cat", "nan").encode(), "a.xml:2: 'bndbox/xmax' is 'nan'"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            build_index(config, "train", progress=False)
        assert words in str(caught.value)
