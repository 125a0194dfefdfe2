"""An image set that scripts can train on in seconds."""

import csv

import cv2
import numpy as np
import pytest
import yaml


def make_set(root, images=8, names=("square", "disc")):
    """Squares and discs on noise, in YOLO layout; gives the YAML."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for number in range(images):
            picture = rng.integers(80, 140, (64, 64, 3), dtype=np.uint8)
            lines = []
            for kind in rng.integers(0, 2, 2):
                x, y = rng.integers(12, 52, 2).tolist()
                if kind == 0:
                    cv2.rectangle(picture, (x - 8, y - 8), (x + 8, y + 8), (230, 40, 40), -1)
                else:
                    cv2.circle(picture, (x, y), 8, (40, 230, 40), -1)
                lines.append(f"{kind} {x / 64} {y / 64} {17 / 64} {17 / 64}")
            cv2.imwrite(str(root / "images" / split / f"{number}.png"), picture)
            (root / "labels" / split / f"{number}.txt").write_text("\n".join(lines))
    settings = {"path": str(root), "train": "images/train", "val": "images/val", "names": list(names)}
    (root / "set.yaml").write_text(yaml.safe_dump(settings))
    return root / "set.yaml"


@pytest.fixture(scope="session")
def make_shapes():
    """The function that makes such a set: make_shapes(folder, images, names) gives the YAML."""
    return make_set


@pytest.fixture(scope="module")
def small_set(make_shapes, tmp_path_factory):
    """Such a set for the tests of one file; a file that needs another kind makes its own."""
    return make_shapes(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def rows_of():
    """The function that reads a run folder's results.csv: a list of dicts, one an epoch."""

    def read(folder):
        with open(folder / "results.csv", encoding="utf-8") as stream:
            return [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(stream)]

    return read
