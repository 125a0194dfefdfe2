"""Small valid files, damaged at random: readers answer with their own errors, never with another.

Seeds are fixed, so a run repeats; YOLO_FUZZ_SECONDS and YOLO_FUZZ_SEED let one look longer and elsewhere.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from models.checkpoint import build_model, read_checkpoint
from models.config import read_config
from utils.config.dataset import load_dataset_config, load_names
from utils.config.hyperparameters import load_hyperparameters
from utils.datasets.annotations import normalised, parse_annotation
from utils.datasets.images import UnreadableImageError, check_image, decode_image, read_for_training
from utils.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))  # importmode importlib knows no neighbours
from corpus import ROOT, archive, nested, tensor_over

SECONDS = float(os.environ.get("YOLO_FUZZ_SECONDS", "3"))  # for each of the readers
SEED = int(os.environ.get("YOLO_FUZZ_SEED", "0"))
FAULT = pytest.mark.fault(
    "random damage to label files, YAML, weights and images: truncation, bit flips, inserted, "
    "removed, repeated or swapped bytes",
    "read, or refused with the reader's own error; damaged files take under 10 s each; fixed seeds",
)

YOLO_LABELS = [
    b"0 0.5 0.5 0.2 0.2\n1 0.1 0.2 0.05 0.1\n",
    b"\xef\xbb\xbf1 .1 .2 .5 .1 .3 .9\r\n0 1 1 1 1\r\n",
    "0 0.5 0.5 1e-3 nan\n".encode("utf-16"),
]
VOC_LABELS = [
    b"<annotation><size><width>64</width><height>48</height></size><object><name>a</name><bndbox><xmin>1</xmin>"
    b"<ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>",
    b"<?xml version='1.0' encoding='latin-1'?>\n<annotation><object><name>b</name><difficult>1</difficult>"
    b"</object><x y='&amp;'/></annotation>",
]
ODD_BYTES = [b"\0", b"\xff", *b"\xff\xfe 1e308 1e400 - nan { &a *a !!binary <![CDATA[ encoding='gbk'".split()]
ODD_BYTES += [b"<<: *a", b"? ", b"[" * 50, b"9" * 400, b"<!DOCTYPE a>", b"!!python/name:os.system "]


def damaged(content: bytes, dice: random.Random, others: list[bytes]) -> bytes:
    """One to four changes."""
    data = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(data) + 1)
        stop = min(place + dice.randint(1, 16), len(data))
        kind = dice.randrange(6)
        if kind == 0:
            del data[place:]
        elif kind == 1 and data:
            data[place % len(data)] ^= 1 << dice.randrange(8)
        elif kind == 2:
            data[place:place] = dice.choice(ODD_BYTES)
        elif kind == 3:
            del data[place:stop]
        elif kind == 4:
            data[place:place] = data[place:stop] * dice.randint(1, 20)
        else:
            other = dice.choice(others)
            start = dice.randrange(len(other) + 1)
            data[place:stop] = other[start : start + dice.randint(1, 64)]
    return bytes(data)


def fuzz(seeds: list[bytes], read: Callable[[bytes], object], allowed: tuple[type[Exception], ...]) -> int:
    """Damages and reads until the time is over; gives how often."""
    dice, end, count = random.Random(SEED), time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        content = damaged(dice.choice(seeds), dice, seeds)
        begun = time.monotonic()
        try:
            read(content)
        except allowed as error:
            assert len(str(error)) < 1_000_000
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error}; of {content[:2000]!r}")
        assert time.monotonic() - begun < 10, content[:2000]
        count += 1
    return count


def read_labels(layout: str) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        annotation, wrong = parse_annotation(content, layout, ["a", "b"])
        assert all(line >= 0 and what for line, what in wrong)
        labels, _ = normalised(annotation, (64, 48))
        assert labels.dtype == np.float32 and np.isfinite(labels).all()
        assert ((labels[:, 1:] >= 0) & (labels[:, 1:] <= 1)).all() and set(labels[:, 0]) <= {0, 1}

    return read


@FAULT
@pytest.mark.parametrize(("layout", "seeds"), [("yolo", YOLO_LABELS), ("voc", VOC_LABELS)])
def test_damaged_label_files_give_wrong_lines_or_sound_labels(layout, seeds):
    assert fuzz(seeds, read_labels(layout), ()) > 50


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.one_of(st.floats(), st.integers(), st.text(max_size=5)), max_size=9), max_size=5))
def test_rows_of_any_values_give_wrong_lines_or_sound_labels(rows):
    text = "\n".join(" ".join(map(str, row)) for row in rows)
    read_labels("yolo")(text.encode("utf-8", errors="replace"))


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200))
def test_bytes_of_any_kind_give_wrong_lines_or_sound_labels(content):
    read_labels("yolo")(content)
    read_labels("voc")(content)


@FAULT
def test_damaged_yaml_ends_in_a_clear_error(tmp_path):
    seeds = [
        b"path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: [a, b]\n",
        b"train: [x, y]\nnames: {0: a, 1: b}\nlayout: voc\ndownload: 'curl x | sh'\n",
        b"a: &a {x: 1}\nnames: *a\nval:\n  <<: *a\n  y: 2001-01-01\n",
        (ROOT / "data/hyp.demo.yaml").read_bytes()[:400],
        (ROOT / "models/demo-student.yaml").read_bytes(),
    ]
    path = tmp_path / "a.yaml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        for reader in (load_names, load_dataset_config, load_hyperparameters, read_config):
            try:
                reader(path)
            except UserError as error:
                assert "\n" not in str(error).strip() or len(str(error)) < 10_000

    assert fuzz(seeds, read, ()) > 20


def small_files() -> tuple[list[bytes], list[bytes], dict[str, bytes]]:
    """Whole weight files, instructions of such, and the records that belong to these."""
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    own = {"format": "yolov5-distillation", "version": 1, "cfg": {"nc": 1, "anchors": 3}, "names": ["a"]}
    own |= {"model": {"model.0.x": torch.zeros(2)}, "epoch": 1, "best_fitness": 0.5, "meta": {"a": [1, None]}}
    contents = [{"model": layer, "epoch": 1}, own, {"state_dict": layer.state_dict(), "names": {0: "a"}}]
    files, pickles, records = [], [tensor_over(2, 1), nested(Path("nowhere")), pickle.dumps(own["cfg"])], {}
    for content in contents:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        files.append(buffer.getvalue())
        with zipfile.ZipFile(buffer) as stream:
            for name in stream.namelist():
                if name.endswith("/data.pkl"):
                    pickles.append(stream.read(name))
                elif "/data/" in name:
                    records.setdefault(name.rsplit("/", 1)[1], stream.read(name))
    return files, pickles, records


@FAULT
@pytest.mark.parametrize("part", ["the file", "its instructions"])
def test_damaged_weights_end_in_a_clear_error(tmp_path, part):
    files, pickles, records = small_files()
    path = tmp_path / "w.pt"

    def read(content: bytes) -> None:
        if part == "the file":
            path.write_bytes(content)
        else:
            archive(path, content, records)
        build_model(read_checkpoint(path))

    assert fuzz(files if part == "the file" else pickles, read, (UserError,)) > 50
    assert not Path("nowhere/marker").exists()


@FAULT
def test_damaged_configs_inside_weights_end_in_a_clear_error(tmp_path):
    """The values of a config, of our own format, at random from those of others and from odd ones."""
    content = torch.load(ROOT / "weights/demo_student.pt", weights_only=True)
    dice, end = random.Random(SEED), time.monotonic() + SECONDS
    odd = [
        None,
        True,
        -1,
        0,
        1e300,
        float("nan"),
        10**30,
        "",
        "x" * 100,
        [],
        {},
        [[]],
        [[-1, 1, "Conv", [8]]],
        {"a": 1},
    ]
    while time.monotonic() < end:
        cfg = yaml.safe_load(yaml.safe_dump(content["cfg"]))
        spot, where = cfg, []
        while isinstance(spot, dict | list) and spot and (not where or dice.random() < 0.8):
            parent, key = spot, dice.choice(list(spot) if isinstance(spot, dict) else range(len(spot)))
            where.append(key)
            spot = parent[key]
        parent[key] = dice.choice(odd)
        torch.save(
            {**content, "cfg": cfg, dice.choice(["names", "epoch", "meta", "x"]): dice.choice(odd)},
            tmp_path / "w.pt",
        )
        try:
            build_model(read_checkpoint(tmp_path / "w.pt"))
        except UserError:
            pass
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error}; {where} is {parent[key]!r}")


@FAULT
def test_damaged_pictures_are_read_or_refused(tmp_path):
    import cv2

    image = cv2.resize(np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8), (40, 30))
    seeds = [cv2.imencode(suffix, image)[1].tobytes() for suffix in (".jpg", ".png", ".bmp", ".webp", ".gif")]
    path = tmp_path / "a.jpg"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        width, height = check_image(path)
        assert decode_image(content if content else b"", cv2.IMREAD_COLOR).ndim == 3 or width
        assert read_for_training(path, (width, height), (20, 20)).shape == (20, 20, 3)

    assert fuzz(seeds, read, (UnreadableImageError,)) > 50
