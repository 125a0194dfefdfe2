"""What Python programs hand in: devices, sizes, rules, deep images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from models.yolo import Model
from utils.errors import UserError
from utils.inference.arguments import device_of, frame_of, rules_of, sides_of
from utils.inference.exported import ExportedNetwork
from utils.inference.facts import ExportFacts, NmsInside
from utils.inference.hub import HubModel, ready
from utils.inference.results import Detections

RULES = {"conf": 0.25, "iou": 0.45, "classes": None, "max_det": 10, "agnostic": False, "multi_label": False}
PICTURE = np.zeros((40, 60, 3), np.uint8)


@pytest.mark.parametrize("device", ["cpu", "CPU", torch.device("cpu"), torch.device("cpu", 0)])
def test_a_device_may_be_a_name_or_torchs_own(device: object) -> None:
    assert device_of(device) == torch.device("cpu")


@pytest.mark.parametrize("device", [99, np.int64(99), "99", "tpu", torch.device("cuda:99"), 1.5, -1, True])
def test_a_device_that_is_not_there_is_an_error_whatever_its_type(device: object) -> None:
    with pytest.raises(UserError, match=r"^device: ") as caught:
        device_of(device)
    assert "--device" not in str(caught.value)


@pytest.mark.parametrize("device", ["", None])
def test_no_device_is_the_first_gpu_or_else_the_cpu(device: str | None) -> None:
    assert device_of(device).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (320, (320, 320)),
        (np.int64(320), (320, 320)),
        (320.0, (320, 320)),
        ([320], (320, 320)),
        ((320, 640), (320, 640)),
        (np.array([320, 640]), (320, 640)),
        (torch.tensor(320), (320, 320)),
    ],
)
def test_a_size_is_one_number_or_two_of_any_whole_type(size: object, expected: tuple[int, int]) -> None:
    sides = sides_of(size)
    assert sides == expected and all(type(side) is int for side in sides)


@pytest.mark.parametrize("size", [0, -3, [], [1, 2, 3], "640", 320.5, True, None, float("nan"), float("inf")])
def test_what_is_no_size_is_said(size: object) -> None:
    with pytest.raises(UserError, match=r"^size: .*; give the side in pixels, or \(height, width\)$"):
        sides_of(size)


def test_classes_may_be_one_number_or_several() -> None:
    for given, expected in ((0, [0]), ([np.int64(1), 2], [1, 2]), (torch.tensor([1]), [1]), (None, None)):
        assert rules_of(**{**RULES, "classes": given}, class_count=3).classes == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes", [99]),
        ("classes", -1),
        ("classes", "person"),
        ("classes", ["person"]),
        ("conf", 2),
        ("conf", -0.1),
        ("conf", "high"),
        ("conf", None),
        ("iou", float("nan")),
        ("max_det", 0),
        ("max_det", 1.5),
    ],
)
def test_a_rule_outside_of_its_range_is_named(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^{name}: "):
        rules_of(**{**RULES, name: value}, class_count=3)


@pytest.fixture(scope="module")
def hub_model() -> HubModel:
    return ready(Model("yolov5n.yaml", nc=3), "cpu")


def test_a_network_checks_its_rules_and_sizes_when_it_is_called(hub_model: HubModel, capsys) -> None:
    with pytest.raises(UserError, match="size: 0 is not a size"):
        hub_model(PICTURE, size=0)
    hub_model.classes = [99]
    try:
        with pytest.raises(UserError, match="classes: there is no class 99; give numbers from 0 to 2"):
            hub_model(PICTURE, size=64)
    finally:
        hub_model.classes = None
    capsys.readouterr()
    hub_model(PICTURE, size=33)
    assert "size is not a multiple of the stride 32: using 64 64" in capsys.readouterr().err
    assert hub_model.to(torch.device("cpu")) is hub_model
    with pytest.raises(UserError, match="^device: "):
        hub_model.to(99)


class OfOneShape(ExportedNetwork):
    """A file that takes 64 x 96 px alone and finds nothing."""

    kind = "none"

    def run(self, images: Tensor) -> Tensor:
        assert images.shape[2:] == (64, 96)
        return torch.zeros(len(images), 10, 8 if self.facts.nms is None else 6)


def test_a_file_of_one_shape_says_once_that_a_size_has_no_effect(tmp_path: Path, capsys) -> None:
    facts = ExportFacts(names=("a", "b", "c"), stride=32, shape=(1, 64, 96))
    model = HubModel(OfOneShape(tmp_path / "x.onnx", facts, torch.device("cpu")))
    model(PICTURE)
    model(PICTURE, size=(64, 96))
    assert capsys.readouterr().err == ""
    for _ in range(2):
        model(PICTURE, size=640)
    said = capsys.readouterr().err
    assert said.count("takes images of 96x64 px alone: size has no effect") == 1


def test_a_file_with_nms_inside_says_once_which_settings_have_no_effect(tmp_path: Path, capsys) -> None:
    nms = NmsInside(conf_thres=0.25, iou_thres=0.45, max_det=10)
    facts = ExportFacts(names=("a", "b", "c"), stride=32, shape=(1, 64, 96), nms=nms)
    model = HubModel(OfOneShape(tmp_path / "x.onnx", facts, torch.device("cpu")))
    model.conf, model.max_det = 0.5, 3
    model(PICTURE)
    assert capsys.readouterr().err == ""
    model.iou, model.agnostic = 0.6, True
    for _ in range(2):
        model(PICTURE)
    said = capsys.readouterr().err
    assert said.count("has NMS inside: iou has no effect") == 1
    assert said.count("has NMS inside: agnostic has no effect") == 1 and "multi_label" not in said


@pytest.mark.parametrize("inside", [False, True])
def test_a_tensor_goes_through_an_exported_file_too(inside: bool, tmp_path: Path, capsys) -> None:
    nms = NmsInside(conf_thres=0.25, iou_thres=0.45, max_det=10) if inside else None
    facts = ExportFacts(names=("a", "b", "c"), stride=32, shape=(1, 64, 96), nms=nms)
    model = HubModel(OfOneShape(tmp_path / "x.onnx", facts, torch.device("cpu")))
    output, levels = model(torch.zeros(2, 3, 64, 90))
    assert output.shape == (2, 10, 6 if inside else 8) and levels is None
    with pytest.raises(UserError, match=r"is a tensor \(1, 3, 96, 64\); the file takes images of 96x64 px"):
        model(torch.zeros(1, 3, 96, 64))


def test_an_exported_file_has_no_parameters(tmp_path: Path, capsys) -> None:
    facts = ExportFacts(names=("a", "b", "c"), stride=32, shape=(1, 64, 96))
    model = HubModel(OfOneShape(tmp_path / "x.onnx", facts, torch.device("cpu")))
    for method in (model.parameters, model.named_parameters, model.state_dict):
        with pytest.raises(UserError, match=r"x\.onnx: is exported and has no .*; load the \.pt file"):
            method()
    assert model.nc == 3 and model.yaml is None
    assert model.half() is model and len(model(PICTURE)) == 1
    assert "in the precision that it was exported in: half() has no effect" in capsys.readouterr().err


def test_pictures_of_sixteen_bits_are_the_same_from_pil_and_from_their_file(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    values = (np.arange(40 * 60, dtype=np.uint16) * 27).reshape(40, 60)
    cv2.imwrite(str(tmp_path / "deep.png"), values)
    wanted = frame_of(str(tmp_path / "deep.png"), 0).image
    assert len(np.unique(wanted)) > 200
    assert np.array_equal(frame_of(pil.open(tmp_path / "deep.png"), 0).image, wanted)
    assert np.array_equal(frame_of(pil.fromarray(values.astype(np.int32)), 0).image, wanted)


def test_a_file_whose_name_begins_with_a_tilde_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("~no-such-user.png", PICTURE)
    assert np.array_equal(frame_of("~no-such-user.png", 0).image, PICTURE)


@pytest.mark.parametrize("values", [np.ones((4, 4), np.float32), np.full((4, 4), 2**20, np.int32)])
def test_pil_pictures_of_no_known_range_are_refused(values: np.ndarray) -> None:
    pil = pytest.importorskip("PIL.Image")
    with pytest.raises(UserError, match=r"image 3: is a PIL image of mode [IF]; scale it to 0\.\.255"):
        frame_of(pil.fromarray(values), 3)


def test_slices_of_results_and_folders_that_are_there() -> None:
    empty = torch.zeros(0, 6)
    results = Detections([PICTURE] * 3, [empty] * 3, ["a.jpg", "b.jpg", "c.jpg"], ["x"])
    assert results[1:].files == ["b.jpg", "c.jpg"] and results[-1].files == ["c.jpg"]
    assert len(results[3:]) == 0 and results[np.int64(1)].files == ["b.jpg"]
    with pytest.raises(IndexError):
        results[3]
    for place in (".", "..", "/"):
        with pytest.raises(UserError, match="is there already"):
            results.save(save_dir=place)
