"""What people may have meant."""

from pathlib import Path

import pytest

from utils.config.suggestions import did_you_mean, near_files, nearest_path, question


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/train/exp/weights/best.pt", "runs/train/exp2/weights/best.pt", "weights/yolov5s.pt",
                 "data/coco.yaml", "data/voc.yaml", "pictures/street.jpg", ".hidden/a.pt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        ("data/cocco.yaml", "data/coco.yaml"),
        ("date/coco.yaml", "data/coco.yaml"),
        ("runs/trian/exp/weights/bset.pt", "runs/train/exp/weights/best.pt"),
        ("pictures/Street.JPEG", "pictures/street.jpg"),
        ("picture", "pictures"),
        ("weights/yolov5s.py", None),  # a file of another kind is not meant
        ("rusn/trian/epx/weihgts/best.pt", None),  # too much is wrong
        ("nothing/like/it", None),
        (".hiden/a.pt", None),
        ("data/\0.yaml", None),
    ],
)
def test_a_path_is_followed_as_far_as_names_are_near(wanted, meant, here):
    found = nearest_path(wanted)
    assert found == (Path(meant) if meant else None)
    absolute = nearest_path(here / wanted)
    assert absolute == (here / meant if meant else None)


def test_files_of_that_name_that_lie_elsewhere_are_proposed_and_none_twice(here):
    runs = sorted(Path("runs").glob("*/*/weights/*.pt"))
    assert near_files("best.pt", runs) == [path.as_posix() for path in runs]
    twice = [Path("weights/yolov5s.pt"), here / "weights/yolov5s.pt"]
    assert near_files("yolov5x.pt", twice) == ["weights/yolov5s.pt"]
    assert near_files("weights/yolov5z.pt", twice) == ["weights/yolov5s.pt"]


def test_proposals_become_sentences():
    assert did_you_mean("adamw", ["SGD", "AdamW"]) == ", did you mean 'AdamW'?"
    assert did_you_mean("lr", ["lrf", "box", "lr0"]) == ", did you mean 'lr0' or 'lrf'?"
    assert did_you_mean("zzz", ["SGD"]) == ""
    assert question(["a", Path("b/c")], "look") == "did you mean a or b/c?"
    assert question([], "look") == "look"
