"""Class names from weights and YAML files: paths, escape sequences, line breaks, formulas."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))  # importmode importlib knows no neighbours
from corpus import PICTURE, ROOT, own_file

NAMES = [
    "../../../escaped",
    "/tmp/escaped",
    "\x1b]0;owned\x07\x1b[2J",
    "line\nbreak\r\ttab",
    "right\u202eleft",
    "$\\frac{1}{0$",
    "nul\0con",
    "界" * 300,
    "",
    "..",
    "=cmd()",
]


@pytest.fixture(scope="module")
def class_count():
    return len(torch.load(ROOT / "weights/demo_student.pt", weights_only=True)["names"])


def names_of(count: int, start: int) -> list[str]:
    return [NAMES[(start + number) % len(NAMES)] for number in range(count)]


def assert_harmless(done, folder: Path, before: set[Path]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    odd = {c for c in done.stdout + done.stderr if unicodedata.category(c) in ("Cc", "Cf")} - {"\n", "\t"}
    assert not odd
    new = {path for path in folder.rglob("*")} - before
    assert all(folder / "runs" in (path, *path.parents) for path in new)
    for path in new:
        assert len(path.name.encode()) <= 255 and path.name.isprintable()


@pytest.mark.fault(
    "class names in weights with `../`, `/`, control characters, escape sequences, line breaks or 900 bytes",
    "all files stay inside the run folder, under printable names; no control characters reach the terminal",
)
@pytest.mark.parametrize("start", range(0, len(NAMES), 5))
def test_names_reach_neither_other_folders_nor_the_terminal(start, class_count, run_script, tmp_path):
    names = names_of(class_count, start)
    weights = own_file(tmp_path / "w.pt", names=names)
    before = set(tmp_path.rglob("*"))
    done = run_script(
        "detect.py", "--weights", weights, "--source", PICTURE, "--save-crop", "--save-txt", "--save-csv",
        "--conf-thres", "0.001", "--max-det", "40", "--img", "320", "--device", "cpu", "--project", "runs",
        cwd=tmp_path,
    )  # fmt: skip
    assert_harmless(done, tmp_path, before)
    assert len(list((tmp_path / "runs/exp/crops").rglob("*.jpg"))) == 40


def test_names_of_a_dataset_do_no_harm_in_tables_and_charts(class_count, run_script, tmp_path):
    names = [name.replace("\0", "0") for name in names_of(class_count, 0)]  # YAML has no NUL
    names = [name or f"class {number}" for number, name in enumerate(names)]
    for kind in ("images", "labels"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    for number in range(2):
        cv2.imwrite(str(tmp_path / f"set/images/{number}.png"), np.full((64, 64, 3), 90, np.uint8))
        lines = [f"{label} .5 .5 .{label + 1} .4" for label in range(min(class_count, 9))]
        (tmp_path / f"set/labels/{number}.txt").write_text("\n".join(lines))
    data = {"path": "set", "train": "images", "val": "images", "names": names}
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(data))
    own_file(tmp_path / "w.pt", names=names)
    before = set(tmp_path.rglob("*"))
    done = run_script(
        "test.py", "--weights", "w.pt", "--data", "set.yaml", "--img", "64", "--device", "cpu", "--verbose",
        "--save-json", "--workers", "0", "--project", "runs", cwd=tmp_path,
    )  # fmt: skip
    assert_harmless(done, tmp_path, before)
