"""Public weights that are fetched where they are missing."""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path

import pytest
import torch

from models.download import main
from models.places import resolve_weights
from utils.errors import UserError
from utils.inference.backends import find_network

OWN = Path(__file__).resolve().parents[2] / "weights/demo_student.pt"


@pytest.fixture
def mirror(serving, tmp_path, monkeypatch):
    """A mirror of public weights, and a working folder with a folder for them; nothing else is reached."""
    monkeypatch.setenv("YOLO_MIRROR", serving.url)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "models.places.FOLDER", tmp_path / "project/models"
    )  # whoever's own weights lie there
    (tmp_path / "weights").mkdir()
    return serving


def test_public_weights_that_are_missing_are_fetched_once(mirror, tmp_path):
    mirror.files["/yolov5x6.pt"] = OWN.read_bytes()
    for _ in range(2):
        assert resolve_weights("yolov5x6.pt", download=True) == Path("weights/yolov5x6.pt")
    assert resolve_weights("weights/yolov5x6.pt", download=True) == Path("weights/yolov5x6.pt")
    assert mirror.asked == [("/yolov5x6.pt", 0)]
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["yolov5x6.pt"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "weights/yolov5x6.pt").unlink()
    assert resolve_weights(tmp_path / "mine/yolov5x6.pt", download=True) == tmp_path / "mine/yolov5x6.pt"


@pytest.mark.fault(
    "a mirror sends a malicious pickle, or something other than weights",
    "rejected; nothing is left in `weights/`",
)
def test_what_is_fetched_gets_its_name_only_when_the_reader_takes_it(mirror, tmp_path):
    for content in (b"no weights", pickle.dumps({"model": 1}), other_pickle()):
        mirror.files["/yolov5x6.pt"] = content
        with pytest.raises(
            UserError, match=r"yolov5x6\.pt: cannot be fetched \(127\.0\.0\.1: sends no weights: "
        ):
            resolve_weights("yolov5x6.pt", download=True)
        assert list((tmp_path / "weights").iterdir()) == []


def other_pickle() -> bytes:
    """A whole module as torch pickles it, of a class that networks are not made of."""
    stream = io.BytesIO()
    torch.save({"model": pathlib.PurePosixPath("x"), "run": print}, stream)
    return stream.getvalue()


def test_without_a_network_the_message_says_where_the_weights_are_to_be_put(mirror):
    with pytest.raises(UserError) as caught:
        resolve_weights("yolov5x6.pt", download=True)
    message = str(caught.value)
    assert message.startswith(
        "yolov5x6.pt: cannot be fetched (127.0.0.1: answers 404 Not Found; github.com: "
    )
    assert "releases/download/v7.0/yolov5x6.pt by other means and put it at weights/yolov5x6.pt" in message


def test_other_names_and_folders_that_are_not_there_are_never_fetched(mirror):
    for name in ("yolov5q.pt", "best.pt", "runs/gone/yolov5x6.pt", "YOLOV5X6.PT"):
        with pytest.raises(UserError, match="no such weight file"):
            resolve_weights(name, download=True)
    with pytest.raises(UserError, match=r"did you mean yolov5n\.pt"):
        resolve_weights("yolov5nn.pt", download=True)
    with pytest.raises(UserError, match="public file, which is fetched without --no-download"):
        resolve_weights("yolov5x6.pt")
    assert mirror.asked == []


@pytest.mark.fault("broken symlinks among the weights of runs", "ignored when a similar name is suggested")
def test_a_link_to_nothing_among_the_weights_of_runs_is_passed_over(mirror, tmp_path):
    for name in ("exp", "exp2"):
        (tmp_path / f"runs/train/{name}/weights").mkdir(parents=True)
    (tmp_path / "runs/train/exp/weights/best.pt").touch()
    (tmp_path / "runs/train/exp2/weights/best.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(UserError, match=r"did you mean runs/train/exp/weights/best\.pt\?"):
        resolve_weights("bset.pt")


@pytest.mark.parametrize("name", ["x" * 300, f"{'x' * 300}.pt"])
def test_a_name_that_no_file_can_have_is_a_file_that_is_not_there(mirror, name):
    with pytest.raises(UserError, match="no such weight file"):
        resolve_weights(name, download=True)
    with pytest.raises(UserError, match="no such weight file"):
        find_network(name)


def test_the_command_fetches_what_is_named(mirror, tmp_path, capsys):
    mirror.files |= {"/yolov5x6.pt": OWN.read_bytes(), "/yolov5l6.pt": OWN.read_bytes()}
    assert main(["yolov5x6", "yolov5l6.pt"]) == 0
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["yolov5l6.pt", "yolov5x6.pt"]
    assert main(["yolov5x6.pt", "yolov5m6.pt"]) == 1
    said = capsys.readouterr()
    assert "weights/yolov5x6.pt is there" in said.out
    assert said.err.splitlines()[-1].startswith("error: yolov5m6.pt: cannot be fetched")
