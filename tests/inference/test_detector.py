"""Detections of frames, alone and together."""

from pathlib import Path
from types import SimpleNamespace

import cv2
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
