"""What people get wrong ends in one clear line, before anything is made, and leaves their files alone."""

import os
import pickle
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

COMMON = ["--cfg", "models/yolov5n.yaml", "--img", "64", "--batch", "4", "--workers", "0", "--epochs", "1"]


@pytest.fixture
def data(tmp_path):
    """Three images in each split, each with a box; gives the YAML."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (tmp_path / "set" / folder / split).mkdir(parents=True)
        for number in range(3):
            picture = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / f"set/images/{split}/{number}.png"), picture)
            (tmp_path / f"set/labels/{split}/{number}.txt").write_text("1 .5 .5 .4 .4\n")
    settings = {"path": "set", "train": "images/train", "val": "images/val", "names": ["a", "b"]}
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "set.yaml"


def state_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def short_line(data):
    (data.parent / "set/labels/train/1.txt").write_text("0 .5 .5 .4 .4\n1 .5 .5 .4\n")
    return {}, ["1.txt:2", "4 numbers"]


def label_is_a_folder(data):
    path = data.parent / "set/labels/val/1.txt"
    path.unlink()
    path.mkdir()
    return {}, ["1.txt", "label file"]


def class_out_of_range(data):
    (data.parent / "set/labels/val/2.txt").write_text("7 .5 .5 .4 .4\n")
    return {}, ["2.txt:1", "class 7"]


def empty_set(data):
    for path in (data.parent / "set/images/train").iterdir():
        path.unlink()
    return {}, ["train", "no images"]


def missing_data(data):
    data.write_text(data.read_text().replace("path: set", "path: nowhere"))
    return {}, ["nowhere", "--data-dir"]


def mistyped_yaml_before_weights_are_looked_for(_data):
    return {"--data": "sett.yaml", "--weights": "nowhere.pt"}, ["sett.yaml"]


def no_names(data):
    data.write_text(data.read_text().split("names:")[0] + "train: images/train\nval: images/val\n")
    return {}, ["names", "set.yaml"]


def no_checkpoint(data):
    (data.parent / "w.pt").write_text("these are not weights")
    return {"--weights": data.parent / "w.pt"}, ["w.pt"]


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch touched",))


def hostile_pickle(data):
    with (data.parent / "h.pt").open("wb") as stream:
        pickle.dump({"model": Hostile()}, stream)
    return {"--weights": data.parent / "h.pt"}, ["h.pt", "bare pickle"]


def hostile_archive(data):
    torch.save({"model": Hostile()}, data.parent / "h.pt")
    return {"--weights": data.parent / "h.pt"}, ["h.pt", "system"]


def unknown_option(_data):
    return {"--epoch-count": 3}, ["--epoch-count"]


def odd_device(_data):
    return {"--device": "gpu7"}, ["--device"]


CASES = [
    short_line, label_is_a_folder, class_out_of_range, empty_set, missing_data, no_names, no_checkpoint,
    mistyped_yaml_before_weights_are_looked_for, hostile_pickle, hostile_archive, unknown_option, odd_device,
]  # fmt: skip


@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_a_run_that_cannot_go_on_says_what_and_where_and_changes_nothing(spoil, data, run_script, tmp_path):
    extra, words = spoil(data)
    before = state_of(tmp_path)
    given = {"--weights": "", "--device": "cpu", **extra}
    arguments = [str(part) for pair in given.items() for part in pair]
    done = run_script("train.py", "--data", data, *COMMON, *arguments, "--project", tmp_path / "runs")
    assert done.returncode in (1, 2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert state_of(tmp_path) == before
    assert not (tmp_path / "runs").exists() and not Path("touched").exists()


def test_a_truncated_and_a_missing_picture_are_named_and_left_out(data, run_script, tmp_path):
    first = data.parent / "set/images/train/0.png"
    first.write_bytes(first.read_bytes()[:300])
    listed = [f"images/train/{number}.png" for number in (0, 1, 2, 9)]
    (data.parent / "set/train.txt").write_text("\n".join(listed))
    data.write_text(data.read_text().replace("train: images/train", "train: train.txt"))
    before = state_of(data.parent / "set")
    done = run_script(
        "train.py", "--data", data, *COMMON, "--weights", "", "--device", "cpu", "--noplots",
        "--project", tmp_path / "runs",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warning = "\n".join(line for line in done.stderr.splitlines() if line.startswith("warning:"))
    assert "0.png" in warning and "9.png" in warning
    assert state_of(data.parent / "set") == before


@pytest.mark.parametrize("script", ["train.py", "train_distill.py", "test.py", "detect.py"])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_project_that_cannot_be_is_told_before_anything_is_looked_for(script, dry, run_script, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    given = ["--weights", tmp_path / "none.pt", "--project", tmp_path / "file" / "runs", *dry]
    done = run_script(script, *given, *(["--teacher", "none.pt"] if script == "train_distill.py" else []))
    assert done.returncode == 1
    assert "file/runs/exp: the run's folder cannot be made" in done.stderr and "none.pt" not in done.stderr


def test_a_run_that_writes_nothing_needs_no_folder(run_script, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    given = ["--weights", tmp_path / "none.pt", "--source", "data/images", "--project", tmp_path / "file"]
    done = run_script("detect.py", *given, "--nosave")
    assert done.returncode == 1 and "none.pt" in done.stderr and "folder" not in done.stderr


@pytest.mark.fault(
    "an image of a format whose header is not read first (TIFF, BMP, WebP, ...) with over 2^29 pixels",
    "skipped with a warning, before it is decoded",
)
def test_a_picture_of_any_format_with_too_many_pixels_is_left_out(tmp_path, run_script):
    """A BMP file of 96 x 64 px with another size in its header, which only OpenCV's own limit stops."""
    content = bytearray(cv2.imencode(".bmp", np.zeros((64, 96, 3), np.uint8))[1].tobytes())
    struct.pack_into("<ii", content, 18, 24_000, 24_000)
    (tmp_path / "a.bmp").write_bytes(content)
    words = ["--weights", "weights/demo_student.pt", "--source", tmp_path / "a.bmp", "--nosave"]
    alone = {"PYTHONDONTWRITEBYTECODE": "1"}  # a Python of its own, as the limit is read with the import
    done = run_script("detect.py", *words, "--device", "cpu", env=alone)
    assert "a.bmp: cannot be decoded" in done.stderr and "MAX_IMAGE_PIXELS" in done.stderr, done.stderr
