"""`--check-data`: everything that is wrong with a dataset, and the exit code."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.config.dataset import load_dataset_config
from utils.config.options import TrainOptions
from utils.datasets.check import COLUMNS, check_data, check_split
from utils.errors import UserError
from utils.training.start import run_training

GOOD = "0 0.5 0.5 0.5 0.5\n"


def checked(config, single_cls=False):
    """The lines and the rows of the summary, and the error or None."""
    lines, tables = [], []
    try:
        check_data(config, lines.append, lambda rows, header: tables.append([*rows]), single_cls)
    except UserError as error:
        return lines, tables[0], error
    return lines, tables[0], None


def with_val(config):
    """Copies the training split as the validation split; the pictures are others, by a byte at their end."""
    for kind in ("images", "labels"):
        shutil.copytree(config.root / kind / "train", config.root / kind / "val")
    for path in (config.root / "images/val").rglob("*.*"):
        path.write_bytes(path.read_bytes() + b" ")
    text = config.yaml_path.read_text().replace("unlabeled: images/train", "val: images/val")
    config.yaml_path.write_text(text)
    return load_dataset_config(config.yaml_path)


def test_a_good_set_is_called_good(make_dataset):
    config = with_val(make_dataset({"a.jpg": GOOD, "b.jpg": "1 .5 .5 .1 .1\n"}))
    lines, rows, error = checked(config)
    assert error is None and lines == [f"{config.yaml_path}: nothing is wrong"]
    assert rows == [("train", 2, 0, 0, 2, 0, 0, 0), ("val", 2, 0, 0, 2, 0, 0, 0)]


def test_every_problem_is_listed_with_its_file_and_line_not_only_the_first(make_dataset):
    files = {f"{number:02}.jpg": "9 .5 .5 .1 .1\n" * 3 for number in range(15)}
    config = make_dataset({**files, "gone.jpg": GOOD, "clip.jpg": "0 .9 .5 .4 .4\n" * 2, "none.jpg": None})
    folder = config.splits["train"][0]
    for number in range(12):
        (folder / f"{number:02}.jpg").write_bytes(b"")
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in config.root.rglob("*.*")}
    lines, rows, error = checked(config)
    found = "\n".join(lines)
    for number in range(15):
        for line in (1, 2, 3):
            assert f"{number:02}.txt:{line}: class 9 is not one of 0..1" in found
        assert (f"{number:02}.jpg: the file is empty" in found) is (number < 12)
    assert "clip.txt: 1 label repeated" in found and "clip.txt: 1 boxes" not in found
    assert "clip.txt: 2 boxes reached out" in found
    assert "none.jpg: has no label file" in found
    assert "no box is of class 'dog'" in found
    assert rows[0] == ("train", 18, 0, 12, 2, 45, 2, 1)
    assert str(error).startswith(f"{config.yaml_path}: ") and "split 'val' cannot be used" in str(error)
    assert f"{12 + 12} images unusable, 45 label lines wrong" in str(error)  # unlabeled: the same folder
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in config.root.rglob("*.*")} == before


def test_with_single_cls_class_ids_need_no_names(make_dataset):
    config = with_val(make_dataset({"a.jpg": GOOD + "1 .5 .5 .1 .1\n7 .2 .2 .1 .1\n"}, names=("a", "b")))
    lines, rows, error = checked(config, single_cls=True)
    assert error is None and lines == [f"{config.yaml_path}: nothing is wrong"]
    assert rows[0] == ("train", 1, 0, 0, 3, 0, 0, 0)
    assert "2 label lines wrong" in str(checked(config)[2])
    options = TrainOptions(data=config.yaml_path, check_data=True, single_cls=True)
    assert run_training(options) == config.yaml_path


def test_unlabelled_pictures_need_no_labels(make_dataset):
    config = make_dataset({"a.jpg": None})
    report = check_split(config, "unlabeled", progress=False)
    assert report.is_good and not list(report.lines())
    assert dict(zip(COLUMNS, report.row(), strict=True))["unlabelled"] == 1
    [failure] = check_split(config, "train", progress=False).failures
    assert "not one label file" in failure


def test_a_missing_test_split_is_a_remark(make_dataset):
    config = with_val(make_dataset({"a.jpg": GOOD, "b.jpg": "1 .5 .5 .1 .1\n"}))
    config.yaml_path.write_text(config.yaml_path.read_text() + "test: kept/back\n")
    lines, _, error = checked(load_dataset_config(config.yaml_path))
    assert error is None and any(line.startswith("test: remark: ") for line in lines)


@pytest.mark.fault(
    "files in image folders without a supported suffix (`.gif`, none), label files without an image",
    "ignored; `--check-data` counts them and names the first few",
)
def test_files_that_are_passed_over_are_remarked(make_dataset):
    config = with_val(make_dataset({"a.jpg": GOOD, "sub/b.jpg": "1 .5 .5 .1 .1\n"}))
    folder = config.splits["train"][0]
    labels = config.root / "labels/train"
    for name in ("anim.gif", "sub/noext", ".hidden"):
        (folder / name).write_bytes(b"x")
    for name in ("anim.txt", "gone.txt", "notes.md", ".hidden.txt", *(f"sub/{n}.txt" for n in range(9))):
        (labels / name).write_text(GOOD)
    lines, rows, error = checked(config)
    assert error is None and lines[-1].endswith("nothing is wrong")
    told = [line for line in lines if line.startswith("train: ")]
    assert told == [
        f"train: remark: {folder}: 2 files that are not images by their names: anim.gif, sub/noext",
        f"train: remark: {labels}: 11 label files without an image: "
        "anim.txt, gone.txt, sub/0.txt, sub/1.txt, sub/2.txt, ...",
    ]
    assert rows[0] == ("train", 2, 0, 0, 2, 0, 0, 0)


def test_labels_beside_their_pictures_are_no_files_that_are_passed_over(make_dataset, tmp_path):
    config = with_val(make_dataset({"a.jpg": GOOD, "b.jpg": "1 .5 .5 .1 .1\n"}))
    beside = tmp_path / "data set/beside"
    (config.root / "images/train").rename(beside)
    for path in (config.root / "labels/train").iterdir():
        path.rename(beside / path.name)
    (beside / "classes.txt").write_text("cat\ndog\n")
    text = "path: data set\ntrain: beside\nval: beside\nunlabeled: beside\nnames: [cat, dog]\n"
    config.yaml_path.write_text(text)
    lines, _, error = checked(load_dataset_config(config.yaml_path))
    assert error is None and [line for line in lines if "remark" in line] == [
        f"train: remark: {beside}: 1 label file without an image: classes.txt",
        f"val: remark: {beside}: 1 label file without an image: classes.txt",
        f"unlabeled: remark: {beside}: 1 file that is not an image by its name: classes.txt",
        f"val: remark: 2 of 2 images are in 'train' too, such as {beside / 'a.jpg'}: their scores say little",
        f"val: remark: 2 of 2 images are in 'unlabeled' too, such as {beside / 'a.jpg'}: "
        "their scores say little",
    ]


@pytest.mark.fault(
    "copies of training images among the validation or test images, also under other names",
    "`--check-data` counts them and names one; training warns of those that are the same file",
)
def test_images_that_are_trained_on_and_evaluated_are_remarked(make_dataset):
    config = with_val(make_dataset({f"{name}.jpg": GOOD + "1 .5 .5 .1 .1\n" for name in "abcd"}))
    train, val = config.root / "images/train", config.root / "images/val"
    shutil.copy(train / "b.jpg", val / "a.jpg")
    (val / "d.jpg").unlink()
    os.link(train / "d.jpg", val / "d.jpg")
    same_size = bytearray((train / "c.jpg").read_bytes())
    same_size[-30] ^= 1
    (val / "c.jpg").write_bytes(same_size)
    lines, _, error = checked(config)
    assert error is None and lines == [
        f"val: remark: 2 of 4 images are in 'train' too, such as {val / 'a.jpg'}, "
        f"the same as {train / 'b.jpg'}: their scores say little",
        f"{config.yaml_path}: nothing is wrong",
    ]


@pytest.fixture
def set_yaml(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "set" / kind / split).mkdir(parents=True)
        for number in range(3):
            cv2.imwrite(str(tmp_path / f"set/images/{split}/{number}.png"), np.zeros((8, 8, 3), np.uint8))
            (tmp_path / f"set/labels/{split}/{number}.txt").write_text(f"{number % 2} .5 .5 .4 .4\n")
    (tmp_path / "set.yaml").write_text("path: set\ntrain: images/train\nval: images/val\nnames: [a, b]\n")
    return tmp_path / "set.yaml"


@pytest.mark.fault(
    "`--check-data` on a dataset with an unreadable image and a wrong label line",
    "both are listed, exit code 1 (0 for a good dataset); no run folder is created",
)
@pytest.mark.parametrize("script", ["train.py", "train_distill.py"])
def test_the_scripts_check_without_training(script, set_yaml, run_script, tmp_path):
    words = [script, "--check-data", "--data", set_yaml, "--project", tmp_path / "runs"]
    good = run_script(*words)
    assert (good.returncode, "nothing is wrong" in good.stdout) == (0, True), good.stderr
    (tmp_path / "set/images/train/1.png").write_bytes(b"text")
    (tmp_path / "set/labels/val/0.txt").write_text("0 .5 .5 .4\n")
    bad = run_script(*words)
    assert bad.returncode == 1
    assert "train: image unusable: " in bad.stdout and "val: label wrong: " in bad.stdout
    [line] = [line for line in bad.stderr.splitlines() if line.startswith("error: ")]
    assert line.endswith("1 image unusable, 1 label line wrong; fix them, or take them out of the dataset")
    assert "Traceback" not in bad.stderr and not (tmp_path / "runs").exists()
