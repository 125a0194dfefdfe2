"""Folders of images that can be read in part, or not at all."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from utils.config.dataset import load_dataset_config
from utils.datasets.check import check_split
from utils.datasets.sources import list_sources
from utils.errors import UserError


def without_the_right_to_read(folder: Path, monkeypatch) -> None:
    """Lets the system refuse to list a folder, which it does not where root runs the tests."""

    def refuse(read, path="."):
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(os, "scandir", partial(refuse, os.scandir))
    monkeypatch.setattr(os, "listdir", partial(refuse, os.listdir))


@pytest.mark.fault(
    "a subfolder of the images that the user may not read",
    "refused with the name of the folder, rather than used as a smaller dataset",
)
def test_a_folder_that_cannot_be_read_is_named(make_dataset, monkeypatch):
    config = make_dataset({"a/x.png": "0 .5 .5 .4 .4\n", "b/y.png": "1 .5 .5 .4 .4\n"})
    folder = config.splits["train"][0] / "b"
    without_the_right_to_read(folder, monkeypatch)
    with pytest.raises(UserError, match=r"images/train/b: the folder cannot be read \(Permission denied\)"):
        list_sources(config, "train")


def test_a_label_folder_that_cannot_be_listed_is_remarked(make_dataset, monkeypatch):
    config = make_dataset({"x.png": "0 .5 .5 .4 .4\n"})
    without_the_right_to_read(config.root / "labels/train", monkeypatch)
    report = check_split(config, "train", progress=False)
    assert report.is_good and report.boxes == 1
    assert any("labels/train: the folder cannot be read" in remark for remark in report.remarks)


def test_a_voc_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "train.txt").write_text("one\n")
    (tmp_path / "set.yaml").write_text("layout: voc\ntrain: train.txt\nnames: [cat]\n")
    without_the_right_to_read(tmp_path / "JPEGImages", monkeypatch)
    with pytest.raises(UserError, match="JPEGImages: the folder cannot be read"):
        list_sources(load_dataset_config(tmp_path / "set.yaml"), "train")
