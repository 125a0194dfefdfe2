"""Which file a network's name stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.config import FOLDER, find_config
from utils.errors import UserError


def test_shipped_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("models/yolov5l.yaml", "model/yolov5l.yaml", "./model/yolov5l.yaml", "yolov5l.yaml"):
        assert find_config(name) == FOLDER / "yolov5l.yaml"


def test_a_file_of_the_users_goes_before_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "yolov5l.yaml").write_text("nc: 1\n")
    assert find_config("model/yolov5l.yaml") == Path("model/yolov5l.yaml")


@pytest.mark.parametrize("name", ["mine/yolov5l.yaml", "model/yolov5q.yaml", "x" * 300])
def test_a_config_that_is_not_there_is_no_other_one(name: str) -> None:
    with pytest.raises(UserError, match="no such network config"):
        find_config(name)
