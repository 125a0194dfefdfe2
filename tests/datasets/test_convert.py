"""VOC and COCO annotations turned into the YOLO layout."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.config.dataset import load_dataset_config
from utils.datasets.coco_json import joined, read_coco
from utils.datasets.convert import Item, _names_without_doubles, main
from utils.datasets.index import build_index
from utils.errors import Terminated, UserError


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((50, 100, 3), 90, np.uint8))


def state_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def labels_of(yaml: Path, split: str) -> dict[str, list[list[float]]]:
    index = build_index(load_dataset_config(yaml), split, progress=False)
    return {
        Path(p).stem: np.round(rows.astype(float), 4).tolist()
        for p, rows in zip(index.paths, index.labels, strict=True)
    }


def boxed(name: str, *sides: float, difficult: int = 0) -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{key}>{side}</{key}>" for key, side in zip(keys, sides, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"


def voc_base(base: Path, prefix: str) -> None:
    lists = {"train": [f"{prefix}1", f"{prefix}2"], "test": [f"{prefix}3"]}
    objects = {
        f"{prefix}1": boxed("dog", 11, 6, 30, 25) + boxed("cat", 1, 1, 9, 9, difficult=1),
        f"{prefix}2": "",
        f"{prefix}3": boxed("ant", 1, 1, 100, 50),
    }
    for name, text in objects.items():
        write_image(base / "JPEGImages" / f"{name}.jpg")
        (base / "Annotations").mkdir(exist_ok=True)
        size = "<size><width>100</width><height>50</height></size>"
        (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{text}</annotation>")
    (base / "ImageSets/Main").mkdir(parents=True)
    for split, names in lists.items():
        (base / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def test_a_voc_folder_becomes_pictures_labels_and_a_yaml_and_is_not_changed(tmp_path, capsys):
    voc_base(tmp_path / "kit/VOC2007", "a")
    voc_base(tmp_path / "kit/VOC2012", "b")
    before, out = state_of(tmp_path / "kit"), tmp_path / "new" / "out"
    out.parent.mkdir()
    assert main(["voc", str(tmp_path / "kit"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "train: 4 images, 2 objects, 2 without any" in said
    assert f"written to {out / 'dataset.yaml'}; it is not enough to train, as there is no val" in said
    config = load_dataset_config(out / "dataset.yaml")
    assert (config.names, config.layout, sorted(config.splits)) == (
        ["ant", "cat", "dog"],
        "yolo",
        ["test", "train"],
    )
    dog = [2.0, 0.2, 0.3, 0.2, 0.4]
    assert labels_of(out / "dataset.yaml", "train") == {"a1": [dog], "a2": [], "b1": [dog], "b2": []}
    assert labels_of(out / "dataset.yaml", "test") == {
        "a3": [[0, 0.5, 0.5, 1, 1]],
        "b3": [[0, 0.5, 0.5, 1, 1]],
    }
    assert (out / "images/train/a1.jpg").read_bytes() == before["VOC2007/JPEGImages/a1.jpg"]
    assert state_of(tmp_path / "kit") == before and [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_yaml_says_splits_and_names_and_one_list_for_two_splits_is_written_once(tmp_path):
    voc_base(tmp_path / "data/2007", "a")
    main_lists = "2007/ImageSets/Main"
    (tmp_path / "set.yaml").write_text(
        f"path: data\nlayout: voc\ntrain: {main_lists}/train.txt\nval: {main_lists}/test.txt\n"
        f"test: {main_lists}/test.txt\nnames: [dog, cat, ant]\n"
    )
    assert main(["voc", str(tmp_path / "set.yaml"), "--out", str(tmp_path / "out"), "--link"]) == 0
    assert labels_of(tmp_path / "out/dataset.yaml", "train")["a1"] == [[0, 0.2, 0.3, 0.2, 0.4]]
    assert load_dataset_config(tmp_path / "out/dataset.yaml").splits["test"] == (tmp_path / "out/images/val",)
    assert os.readlink(tmp_path / "out/images/val/a3.jpg") == str(tmp_path / "data/2007/JPEGImages/a3.jpg")
    assert sorted(path.name for path in (tmp_path / "out/images").iterdir()) == ["train", "val"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda kit: (kit / "Annotations/a1.xml").write_text("<annotation>"), "a1.xml:1: no valid XML"),
        (
            lambda kit: (
                (kit / "ImageSets/Main/train.txt").unlink() or (kit / "ImageSets/Main/test.txt").unlink()
            ),
            "has no lists",
        ),
        (
            lambda kit: (kit / "ImageSets/Main").rename(kit / "ImageSets/Other"),
            "neither a YAML nor in VOC layout",
        ),
        (lambda kit: (kit.parent / "out").mkdir() or (kit.parent / "out/mine").touch(), "is there already"),
    ],
)
def test_what_cannot_be_converted_is_named_and_nothing_is_written(tmp_path, capsys, spoil, words):
    voc_base(tmp_path / "kit", "a")
    spoil(tmp_path / "kit")
    before = state_of(tmp_path)
    assert main(["voc", str(tmp_path / "kit"), "--out", str(tmp_path / "out")]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and words in errors[0]
    assert state_of(tmp_path) == before


def test_an_unknown_class_is_named(tmp_path, capsys):
    voc_base(tmp_path / "kit", "a")
    assert main(["voc", str(tmp_path / "kit"), "--names", "dog", "cat", "--out", str(tmp_path / "out")]) == 1
    assert "a3.xml:1: class 'ant' is not among" in capsys.readouterr().err


# 80 of COCO's ids up to 90, as it leaves out ten of them.
COCO_IDS = [number for number in range(1, 91) if number not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]


def coco(path: Path, images, annotations, categories=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [{"id": i, "file_name": name, "width": 100, "height": 50} for i, name in images.items()]
    named = categories or [{"id": number, "name": f"class {number}"} for number in reversed(COCO_IDS)]
    path.write_text(json.dumps({"images": pictures, "categories": named, "annotations": annotations}))
    return path


def box(image: int, category: int, *sides: float, **more) -> dict:
    return {"image_id": image, "category_id": category, "bbox": list(sides), "iscrowd": 0, **more}


def test_coco_ids_with_gaps_crowds_doubles_and_empty_pictures(tmp_path):
    path = coco(
        tmp_path / "a.json",
        {7: "b.jpg", 3: "sub/a.jpg"},
        [
            box(7, 1, 10, 5, 20, 20), box(7, 90, 90, 40, 30, 30), box(7, 13, 0, 0, 100, 50),
            box(7, 1, 10, 5, 20, 20), box(7, 2, 0, 0, 9, 9, iscrowd=1),
            box(7, 2, 5, 5, 0, 9), box(8, 2, 0, 0, 9, 9),
        ],
    )  # fmt: skip
    found = read_coco(path)
    assert len(found.names) == 80 and found.names[0] == "class 1" and found.names[79] == "class 90"
    assert [picture.name for picture in found.images] == ["b.jpg", "sub/a.jpg"]
    assert found.images[0].lines == [
        "0 0.200000 0.300000 0.200000 0.400000",
        "79 0.950000 0.900000 0.100000 0.200000",
        "11 0.500000 0.500000 1.000000 1.000000",
    ]
    assert found.images[1].lines == []
    assert [note.split(": ", 1)[1] for note in found.notes] == [
        "left out: 1 repeated label", "left out: 1 crowd", "left out: 1 box without area",
        "left out: 1 annotation without image",
    ]  # fmt: skip


def test_names_of_a_yaml_set_the_order_and_an_unknown_one_is_named(tmp_path):
    categories = [{"id": 5, "name": "cat"}, {"id": 9, "name": "dog"}]
    path = coco(tmp_path / "a.json", {1: "a.jpg"}, [box(1, 9, 0, 0, 100, 50)], categories)
    assert read_coco(path, ["bird", "dog", "cat"]).images[0].lines[0][:2] == "1 "
    with pytest.raises(UserError, match="class 'cat' is not among"):
        read_coco(path, ["dog"])


def test_outlines_are_written_where_they_are_asked_for_and_parts_are_joined(tmp_path):
    square = [0, 0, 10, 0, 10, 10, 0, 10]
    path = coco(
        tmp_path / "a.json",
        {1: "a.jpg"},
        [
            box(1, 1, 0, 0, 10, 10, segmentation=[square]),
            box(1, 2, 0, 0, 40, 10, segmentation=[square, [30, 0, 40, 0, 40, 10]]),
            box(1, 3, 0, 0, 50, 25, segmentation={"counts": "x", "size": [50, 100]}),
        ],
    )
    first, second, third = read_coco(path, segments=True).images[0].lines
    assert first == "0 0.000000 0.000000 0.100000 0.000000 0.100000 0.200000 0.000000 0.200000"
    points = np.array(second.split()[1:], float).reshape(-1, 2) * (100, 50)
    x, y = points.T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert area == pytest.approx(100 + 50) and points.max(0).tolist() == [40, 10]
    assert third.split()[1:] == [f"{v:.6f}" for v in (0, 0, 0.5, 0, 0.5, 0.5, 0, 0.5)]
    assert joined([]) == []


SPOILT = {
    "no json": ("{", "is not valid JSON"),
    "a list": ("[]", "it lacks images or categories"),
    "deep": ("[" * 100_000, "is not valid JSON"),
    "no id": (
        '{"images": [{"file_name": "a"}], "categories": []}',
        "its categories or images cannot be used ('id' is",
    ),
    "outside": (
        '{"images": [{"id": 1, "file_name": "../a.jpg", "width": 9, "height": 9}], "categories": []}',
        "leads out of the folder of images",
    ),
    "no size": (
        '{"images": [{"id": 1, "file_name": "a.jpg", "width": 0, "height": 9}], "categories": []}',
        "has a size of 0 x 9 px",
    ),
    "no number": (
        '{"images": [{"id": 1, "file_name": "a", "width": 9, "height": 9}], '
        '"categories": [{"id": 1, "name": "a"}], '
        '"annotations": [{"image_id": 1, "category_id": 1, "bbox": [NaN, 0, 1, 1]}]}',
        "entry 0 of its annotations cannot be used (a number is not finite)",
    ),
    "no class": (
        '{"images": [{"id": 1, "file_name": "a", "width": 9, "height": 9}], "categories": [], '
        '"annotations": [{"image_id": 1, "category_id": 4, "bbox": [0, 0, 1, 1]}]}',
        "entry 0 of its annotations cannot be used ('4' is missing)",
    ),
    "a large id of an image": (
        '{"images": [{"id": 9007199254740993, "file_name": "a", "width": 9, "height": 9}], "categories": []}',
        "id 9007199254740993 is too large",
    ),
    "a large id of a class": (
        '{"images": [], "categories": [{"id": -1e300, "name": "a"}]}', "id -1e+300 is too large",
    ),
    "null": ('{"images": [], "categories": [], "annotations": null}', "its annotations are not a list"),
    "a number": ('{"images": [], "categories": [], "annotations": 5}', "its annotations are not a list"),
}  # fmt: skip


@pytest.mark.fault(
    "a malformed or malicious COCO annotation file", "refused with the file name and the reason"
)
@pytest.mark.parametrize("name", SPOILT)
def test_a_damaged_annotation_file_is_refused(tmp_path, name):
    content, words = SPOILT[name]
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_coco(tmp_path / "a.json")
    assert words in str(caught.value) and str(tmp_path / "a.json") in str(caught.value)


@pytest.mark.fault(
    "a COCO annotation file that is a named pipe, a device or larger than 1 GiB", "refused without reading it"
)
@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_what_is_no_annotation_file_is_not_read(tmp_path, kind):
    path = tmp_path / "a.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, (1 << 30) + 1)
    with pytest.raises(UserError, match="not a regular file|more than 1024 MiB"):
        read_coco(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("parts", "corners"), [(2, 100_000), (50_000, 4)])
def test_outlines_of_very_many_corners_are_joined_in_short_time(parts, corners):
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    polygons = [[(x, y) for x, y in (ring + 3 * number).tolist()] for number in range(parts)]
    outline = joined(polygons)
    assert set(outline) == {point for polygon in polygons for point in polygon}
    x, y = np.array(outline).T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert area == pytest.approx(parts * corners * np.sin(2 * np.pi / corners) / 2, rel=1e-3)


def test_parts_are_joined_at_the_closest_of_any_numbers():
    left, right = [(0.0, 0.0), (-1e300, 0.0), (0.0, 1.0)], [(9.0, 9.0), (0.0, 2.0), (9.0, 2.0)]
    assert joined([left, right]) == [
        (0, 0), (-1e300, 0), (0, 1), (0, 2), (9, 2), (9, 9), (0, 2), (0, 1)
    ]  # fmt: skip


@pytest.mark.timeout(60)
def test_a_name_that_is_repeated_very_often_is_numbered_in_short_time():
    items = [Item(Path(name), name, []) for name in ["a.jpg", "a-3.jpg", "A.png", *["a.jpg"] * 30_000]]
    names = list(_names_without_doubles(items))
    assert names[:5] == ["a.jpg", "a-3.jpg", "A-2.png", "a-4.jpg", "a-5.jpg"] and names[-1] == "a-30003.jpg"


def test_coco_files_become_a_dataset_with_the_pictures_where_they_usually_lie(tmp_path, capsys):
    for part, names in (("train2017", ("a.jpg", "a.png", "sub/a.jpg")), ("val2017", ("b.jpg",))):
        for name in names:
            write_image(tmp_path / "coco" / part / name)
    train = coco(
        tmp_path / "coco/annotations/instances_train2017.json",
        {1: "a.jpg", 2: "a.png", 3: "sub/a.jpg", 4: "gone.jpg"},
        [box(number, 1, 0, 0, number * 10, 50) for number in (1, 2, 3)],
    )
    val = coco(tmp_path / "coco/annotations/instances_val2017.json", {9: "b.jpg"}, [])
    before, out = state_of(tmp_path / "coco"), tmp_path / "out"
    words = ["coco", str(train), str(val), "--images", str(tmp_path / "coco"), "--out", str(out)]
    assert main(words) == 0
    assert "gone.jpg: is not there, left out" in capsys.readouterr().out
    index = build_index(load_dataset_config(out / "dataset.yaml"), "train", progress=False)
    widths = {
        str(Path(p).relative_to(out / "images/train")): r[0, 3]
        for p, r in zip(index.paths, index.labels, strict=True)
    }
    assert {name: round(float(width), 3) for name, width in widths.items()} == {
        "a.jpg": 0.1,
        "a-2.png": 0.2,
        "sub/a.jpg": 0.3,
    }
    assert labels_of(out / "dataset.yaml", "val") == {"b": []}
    assert state_of(tmp_path / "coco") == before


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--images", "nowhere"], 1, "none of its 1 images is in nowhere nor nowhere/other"),
        (["--images", "nowhere", "--splits", "train", "val"], 2, "name one a file"),
    ],
)
def test_what_is_missing_for_coco_is_said(tmp_path, monkeypatch, capsys, words, code, expected):
    monkeypatch.chdir(tmp_path)
    coco(tmp_path / "train_other.json", {1: "a.jpg"}, [])
    assert main(["coco", "train_other.json", *words, "--out", "out"]) == code
    assert expected.replace("other", "train_other") in capsys.readouterr().err
    (tmp_path / "train_other.json").rename(tmp_path / "all.json")
    if code == 1:
        assert main(["coco", "all.json", *words, "--out", "out"]) == 2
        assert "it is not clear which split all.json is" in capsys.readouterr().err


def test_a_folder_of_images_within_a_name_does_not_part_a_picture_from_its_label(tmp_path):
    names = {1: "images/a.jpg", 2: "a.jpg", 3: "sub/images/b.jpg"}
    for name in names.values():
        write_image(tmp_path / "coco" / name)
    boxes = [box(number, 1, 0, 0, number * 10, 50) for number in names]
    train = coco(tmp_path / "train.json", names, boxes)
    out = tmp_path / "out"
    assert main(["coco", str(train), "--images", str(tmp_path / "coco"), "--out", str(out)]) == 0
    found = labels_of(out / "dataset.yaml", "train")
    assert {name: len(rows) for name, rows in found.items()} == {"a": 1, "a-2": 1, "b": 1}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Terminated(15), OSError()])
def test_an_interrupted_conversion_writes_through_no_old_link_and_leaves_nothing(
    tmp_path, monkeypatch, error
):
    write_image(tmp_path / "coco/a.jpg")
    train = coco(tmp_path / "train.json", {1: "a.jpg"}, [])
    (tmp_path / "mine").write_bytes(b"mine")
    left = tmp_path / f".out.{os.getpid()}.tmp/images/train"  # as a killed process once left it
    left.mkdir(parents=True)
    (left / "a.jpg").symlink_to(tmp_path / "mine")
    words = ["coco", str(train), "--images", str(tmp_path / "coco"), "--out", str(tmp_path / "out")]
    before = {path.name for path in tmp_path.iterdir()}

    def stopped(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("utils.datasets.convert.yaml_text", stopped)
        assert main(words) > 0
    assert {path.name for path in tmp_path.iterdir()} == before
    assert main(words) == 0
    assert (tmp_path / "mine").read_bytes() == b"mine"
