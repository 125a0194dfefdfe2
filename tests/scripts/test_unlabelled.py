"""Unlabelled images beside labelled ones, as a person trains with them."""

import shutil

import cv2
import numpy as np
import pytest
import yaml

from utils.reporting.image_plots import AMBER

SMALL = [
    "--weights", "", "--cfg", "models/yolov5n.yaml", "--epochs", 1, "--img", 64, "--batch", 4, "--workers", 0,
    "--device", "cpu", "--noautoanchor",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four labelled, four unlabelled and four images for validation, each with a disc; gives the YAML."""
    root = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    for split in ("train", "val", "more"):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for number in range(4):
            picture = rng.integers(80, 140, (64, 64, 3), dtype=np.uint8)
            x, y = rng.integers(12, 52, 2).tolist()
            cv2.circle(picture, (x, y), 8, (40, 230, 40), -1)
            cv2.imwrite(str(root / f"images/{split}/{split}{number}.png"), picture)
            (root / f"labels/{split}/{split}{number}.txt").write_text(f"0 {x / 64} {y / 64} .27 .27")
    shutil.rmtree(root / "labels/more")
    splits = {"train": "images/train", "val": "images/val", "unlabeled": "images/more"}
    (root / "set.yaml").write_text(yaml.safe_dump({"path": str(root), **splits, "names": ["disc"]}))
    return root / "set.yaml"


@pytest.fixture(scope="module")
def plain(data, run_script_session, tmp_path_factory):
    """What train.py said on that data, and its run's folder."""
    project = tmp_path_factory.mktemp("plain")
    done = run_script_session("train.py", "--data", data, "--project", project, *SMALL)
    assert done.returncode == 0, done.stderr
    return done.stdout, project / "exp"


def marked(folder):
    """Pixels of each image of a training batch that say that an image is unlabelled."""
    pictures = [cv2.imread(str(path)) for path in sorted(folder.glob("train_batch*.jpg"))]
    return [int((np.abs(picture.astype(int) - AMBER).max(2) < 30).sum()) for picture in pictures]


def test_plain_training_leaves_them_out(plain):
    said, folder = plain
    assert "4 images for training, 4 for validation" in said
    assert marked(folder) == [0]


def test_distillation_takes_them_in_by_their_share_of_each_batch(data, plain, run_script, tmp_path):
    teacher = plain[1] / "weights/last.pt"
    done = run_script(
        "train_distill.py", "--data", data, "--teacher", teacher, "--project", tmp_path, *SMALL,
        "--unlabelled_share", 0.5,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8 images for training, 4 of them unlabelled, 4 for validation" in done.stdout
    amber = marked(tmp_path / "exp")
    assert len(amber) == 2 and min(amber) > 100
    assert yaml.safe_load((tmp_path / "exp/opt.yaml").read_text())["unlabeled_share"] == 0.5
    resumed = run_script("train_distill.py", "--resume", tmp_path / "exp", "--epochs", 2)
    assert resumed.returncode == 0, resumed.stderr
    assert "4 of them unlabelled" in resumed.stdout


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "8 images for training, 4 of them unlabelled"),
        (["--unlabeled-share", 0], "4 images for training, 4 for"),
    ],
)
def test_the_share_may_be_that_of_the_data_or_none(data, plain, run_script, tmp_path, given, told):
    teacher = plain[1] / "weights/last.pt"
    done = run_script(
        "train_distill.py", "--data", data, "--teacher", teacher, "--project", tmp_path, *SMALL, "--noplots",
        *given,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert told in done.stdout


@pytest.mark.parametrize("unlabelled", [None, "images/train"])
def test_a_share_of_none_is_refused_before_anything_is_made(data, plain, run_script, tmp_path, unlabelled):
    settings = yaml.safe_load(data.read_text()) | {"unlabeled": unlabelled}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(settings))
    done = run_script(
        "train_distill.py", "--data", tmp_path / "other.yaml", "--teacher", plain[1] / "weights/last.pt",
        "--project", tmp_path / "runs", *SMALL, "--unlabeled-share", 0.5,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "other.yaml: " in done.stderr and "leave --unlabeled-share out" in done.stderr
    assert not (tmp_path / "runs").exists()
