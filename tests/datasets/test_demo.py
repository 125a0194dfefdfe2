"""The generated demo set."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.config.dataset import load_dataset_config
from utils.datasets import demo
from utils.datasets.demo_dice import Dice
from utils.datasets.demo_scene import MIN_SIDES_PX
from utils.datasets.demo_shapes import CLASSES, DISTRACTORS, Shape, draw
from utils.datasets.index import build_index
from utils.errors import UserError

ROOT = Path(__file__).parents[2]
COUNTS = {"train": 8, "val": 4, "test": 4}
# Of all decoded pixels, and of all label files, of the set with COUNTS. When a change to the
# drawing is meant, take the new values and raise demo.VERSION.
PIXELS_SHA256 = "3d610b5a63d2ed22c595bf47755cdcae9d9d8f43d410e75f1b7c4f8c702d3123"
LABELS_SHA256 = "ce02ee5c5b3f5ae5a9b693cd4f115050d6af3e4db4370f33a9da3788f369dfdc"


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "set"
    assert demo.write_demo_set(folder, COUNTS, progress=False)
    return folder


def test_pixels_and_labels_are_those_of_every_other_machine(demo_folder: Path) -> None:
    pixels, labels = hashlib.sha256(), hashlib.sha256()
    for path in sorted((demo_folder / "images").rglob("*.png")):
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        pixels.update(f"{path.name} {image.shape}".encode() + image.tobytes())
    for path in sorted((demo_folder / "labels").rglob("*.txt")):
        labels.update(path.name.encode() + path.read_bytes())
    assert (pixels.hexdigest(), labels.hexdigest()) == (PIXELS_SHA256, LABELS_SHA256)


def test_a_picture_does_not_depend_on_how_many_there_are(demo_folder: Path, tmp_path: Path) -> None:
    demo.write_demo_set(tmp_path / "set", {"train": 2, "val": 1, "test": 1}, progress=False)
    for name in ("images/train/train_00001.png", "labels/test/test_00000.txt"):
        assert (tmp_path / "set" / name).read_bytes() == (demo_folder / name).read_bytes()


def test_the_splits_share_no_picture(demo_folder: Path) -> None:
    contents = [path.read_bytes() for path in (demo_folder / "images").rglob("*.png")]
    assert len(contents) == sum(COUNTS.values()) == len(set(contents))


def test_the_set_reads_without_complaint_through_its_yaml(demo_folder: Path, tmp_path: Path) -> None:
    config = load_dataset_config(ROOT / "data/demo.yaml", demo_folder)
    assert config.names == list(CLASSES)
    for split, count in COUNTS.items():
        index = build_index(config, split, cache_dir=tmp_path, progress=False)
        assert (len(index.paths), index.problems) == (count, [])


def test_scenes_are_a_detection_problem() -> None:
    scenes = [demo.demo_scene("train", number) for number in range(120)]
    boxes = np.concatenate([scene.boxes_xyxy_px for scene in scenes])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() >= MIN_SIDES_PX[0]
    assert 10 <= sides.max(1).min() <= 14
    assert 120 <= sides.max() <= 155
    counts = np.bincount(np.concatenate([scene.class_ids for scene in scenes]), minlength=len(CLASSES))
    assert counts.min() > 0.6 * counts.mean()
    per_scene = np.array([len(scene.class_ids) for scene in scenes])
    assert 0 < (per_scene == 0).mean() < 0.2
    assert per_scene.max() >= 8
    assert len({scene.image.shape for scene in scenes}) >= 6
    brightness = [scene.image.mean() for scene in scenes]
    assert min(brightness) < 60 < 150 < max(brightness)


def test_boxes_lie_inside_and_objects_overlap_at_times() -> None:
    overlaps = 0
    for number in range(40):
        scene = demo.demo_scene("val", number)
        height, width = scene.image.shape[:2]
        boxes = scene.boxes_xyxy_px
        assert (boxes >= 0).all()
        assert (boxes[:, [0, 2]] <= width).all()
        assert (boxes[:, [1, 3]] <= height).all()
        left_top = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        right_bottom = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        overlaps += int(((right_bottom > left_top).all(2).sum() - len(boxes)) // 2)
    assert overlaps > 10


@pytest.mark.parametrize("shape", [*CLASSES.values(), *DISTRACTORS])
@pytest.mark.parametrize("radius", [6.0, 20.0, 75.0])
def test_a_shape_fills_its_square_and_no_more(shape: Shape, radius: float) -> None:
    for seed in range(8):
        stamp = draw(shape, (100.3, 50.7), radius, Dice(seed))
        assert stamp.cover.min() == 0
        assert stamp.cover.max() > 0.5
        assert stamp.marks.max() <= 1
        rows, columns = np.nonzero(stamp.cover > 0)
        x, y = columns + stamp.left + 0.5 - 100.3, rows + stamp.top + 0.5 - 50.7
        # One pixel more than the radius, along the diagonal: partly covered pixels count.
        reach = np.sqrt(x * x + y * y)
        assert radius * 0.55 < reach.max() < radius * 1.25 + 1.5


def test_dice_are_even_and_in_range() -> None:
    dice = Dice(3, 4)
    values = [dice.between(2, 5) for _ in range(4000)]
    assert set(values) == {2, 3, 4, 5}
    assert np.bincount(values)[2:].min() > 880
    bell = dice.bell(101, 99)
    assert bell.shape == (101, 99)
    assert abs(bell.mean()) < 0.03
    assert bell.std() == pytest.approx(1, abs=0.03)
    cosine, sine = dice.direction()
    assert cosine * cosine + sine * sine == pytest.approx(1)
    assert 2.0 <= dice.uniforms(2.0, 3.0, 50).min() <= dice.uniform(3.0, 4.0)


def test_a_complete_set_is_left_alone(demo_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo_folder.rglob("*")}
    assert not demo.write_demo_set(demo_folder, COUNTS, progress=False)
    assert {path: path.stat().st_mtime_ns for path in demo_folder.rglob("*")} == before


@pytest.mark.parametrize("damage", ["missing image", "changed label", "older version", "no manifest digest"])
def test_a_damaged_or_old_set_is_made_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"train": 1, "val": 1, "test": 1}
    out = tmp_path / "set"
    demo.write_demo_set(out, counts, progress=False)
    label = out / "labels/val/val_00000.txt"
    good = label.read_bytes()
    if damage == "missing image":
        (out / "images/train/train_00000.png").unlink()
    elif damage == "changed label":
        label.write_text("0 0.5 0.5 0.1 0.1\n")
    elif damage == "older version":
        monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    else:
        (out / "manifest.json").write_text("{")
    assert demo.write_demo_set(out, counts, progress=False)
    assert label.read_bytes() == good
    assert (out / "images/train/train_00000.png").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match="not a demo set"):
        demo.write_demo_set(tmp_path, COUNTS, progress=False)
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"


def test_a_file_of_the_users_inside_an_old_set_is_kept(tmp_path: Path) -> None:
    out, counts = tmp_path / "set", {"train": 1, "val": 1, "test": 1}
    demo.write_demo_set(out, counts, progress=False)
    (out / "images/train/mine.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="a file of yours"):
        demo.write_demo_set(out, {"train": 2, "val": 1, "test": 1}, progress=False)
    assert (out / "images/train/mine.png").read_bytes() == b"mine"


def test_an_interrupted_run_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(split: str, number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demo_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.write_demo_set(tmp_path / "set", COUNTS, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to handle")
def test_a_terminated_run_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(split: str, number: int) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(demo, "demo_scene", terminated)
    assert demo.main(["--out", str(tmp_path / "set")]) == 143
    assert list(tmp_path.iterdir()) == []


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::DeprecationWarning", "-m", "utils.datasets.demo", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)


def test_the_command_line_writes_the_set_and_says_where(tmp_path: Path) -> None:
    counts = ("--train", "2", "--val", "1", "--test", "1")
    done = _run("--out", str(tmp_path / "new/set"), *counts)
    assert (done.returncode, done.stdout) == (0, f"demo set written to {tmp_path / 'new/set'}\n")
    assert len(list((tmp_path / "new/set/images").rglob("*.png"))) == 4
    assert "is complete in" in _run("--out", str(tmp_path / "new/set"), *counts).stdout


def test_the_command_line_refuses_an_empty_split_and_a_file(tmp_path: Path) -> None:
    empty = _run("--out", str(tmp_path / "set"), "--val", "0")
    assert empty.returncode == 2
    assert empty.stderr == "error: --val 0: each split needs an image; give a number from 1 on\n"
    (tmp_path / "file").touch()
    done = _run("--out", str(tmp_path / "file"))
    assert done.returncode == 1
    assert "is a file" in done.stderr
    assert "Traceback" not in done.stderr
