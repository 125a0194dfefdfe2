"""Detections of frames, alone and together."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from models.checkpoint import build_model, read_checkpoint
from utils.boxes import NmsRules
from utils.inference.detector import BATCH_ON_GPU, Detector
from utils.inference.frames import Frame
from utils.inference.predictor import Predictor, prepare_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def detector():
    model = prepare_model(build_model(read_checkpoint(ROOT / "weights/demo_student.pt")), torch.device("cpu"))
    return Detector(Predictor(model, NmsRules(conf_thres=0.05)), model.names, (320, 320))


def test_frames_of_one_shape_are_found_together_what_each_is_found_alone(detector):
    pictures = [cv2.imread(str(path)) for path in sorted((ROOT / "data/images").glob("generated*.jpg"))]
    first = pictures[0]
    pictures = [first, cv2.flip(first, 1), cv2.flip(first, 0)]
    prepared = [detector.prepare(Frame(picture, f"{number}.jpg")) for number, picture in enumerate(pictures)]
    together = detector.detect(prepared)
    assert sum(map(len, together)) > 3
    for one, found in zip(prepared, together, strict=True):
        (alone,) = detector.detect([one])
        torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-2)


def test_making_a_detector_on_a_gpu_runs_nothing():
    """The Python API makes one in every call: a first pass to warm up would double the network's work."""

    def predict(_images):
        pytest.fail("a pass")

    there = SimpleNamespace(
        model=SimpleNamespace(size_multiple=32), device=torch.device("cuda"), predict=predict
    )
    assert Detector(there, ["a"], (64, 64)).batch == BATCH_ON_GPU


def test_what_lies_within_the_border_alone_is_not_found(detector, monkeypatch):
    """The image takes the rows from 80 to 240 of 320; the second box is above it."""
    rows = torch.tensor([[10.0, 90, 60, 140, 0.9, 0], [10, 10, 60, 70, 0.8, 0], [10, 60, 60, 100, 0.7, 0]])
    monkeypatch.setattr(detector.predictor, "begin", lambda _images: lambda: [rows.clone()])
    image = np.zeros((160, 320, 3), np.uint8)
    prepared = detector.prepare(Frame(image, "a.jpg"))
    prepared = replace(prepared, letterbox=replace(prepared.letterbox, pad=(80.0, 0.0)))
    before = detector.found
    (found,) = detector.detect([prepared])
    assert found.tolist() == [pytest.approx([10, 10, 60, 60, 0.9, 0]), pytest.approx([10, 0, 60, 20, 0.7, 0])]
    assert detector.found - before == 2
