"""Small datasets on disk, and a cache folder that no test shares with the user."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.config.dataset import DatasetConfig, load_dataset_config

MakeDataset = Callable[..., DatasetConfig]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("YOLO_CACHE_DIR", str(folder))
    return folder


def picture(wh: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A smooth coloured image, so that JPEG keeps it nearly as it is."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, wh, interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """Writes a dataset in YOLO layout: names of files with their label text (None: no file)."""

    def make(
        files: dict[str, str | None],
        names: Iterable[str] = ("cat", "dog"),
        wh: tuple[int, int] = (64, 48),
        split: str = "train",
    ) -> DatasetConfig:
        root = tmp_path / "data set"
        for number, (name, text) in enumerate(files.items()):
            image = root / "images" / split / name
            label = (root / "labels" / split / name).with_suffix(".txt")
            image.parent.mkdir(parents=True, exist_ok=True)
            label.parent.mkdir(parents=True, exist_ok=True)
            _, content = cv2.imencode(image.suffix, picture(wh, number))
            image.write_bytes(content.tobytes())
            if text is not None:
                label.write_text(text, encoding="utf-8")
        yaml = tmp_path / "set.yaml"
        yaml.write_text(
            f"path: data set\ntrain: images/{split}\nunlabeled: images/{split}\n"
            f"names: [{', '.join(names)}]\n",
            encoding="utf-8",
        )
        return load_dataset_config(yaml)

    return make
