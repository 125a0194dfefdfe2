"""Networks from Python: every form of an image, and what becomes of the detections."""

from __future__ import annotations

import functools
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import hubconf
from models.yolo import Model
from utils.errors import UserError
from utils.inference.hub import HubModel, bare, load, load_or_create, ready
from utils.inference.results import Detections

ROOT = Path(__file__).resolve().parents[2]
PICTURES = [str(ROOT / f"data/images/generated{number}.jpg") for number in (0, 1)]


@pytest.fixture(scope="module")
def model() -> HubModel:
    found = load(ROOT / "weights/demo_student.pt", "cpu", verbose=False)
    found.conf = 0.1
    return found


@pytest.fixture(scope="module")
def results(model: HubModel) -> Detections:
    return model(PICTURES, size=320)


def test_several_files_form_an_ensemble(results: Detections) -> None:
    student = str(ROOT / "weights/demo_student.pt")
    twice = load([student, student], "cpu", verbose=False)
    twice.conf = 0.1
    assert twice.device == torch.device("cpu") and twice.to("cpu") is twice
    for boxes, same in zip(twice(PICTURES, size=320).xyxy, results.xyxy, strict=True):
        assert torch.equal(boxes, same)
    with pytest.raises(UserError, match="names no weight file"):
        load([])


@pytest.fixture
def address() -> Iterator[str]:
    """A server on this machine that has the shipped images."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(ROOT / "data/images"))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_form_of_a_picture_gives_the_same_boxes(
    model: HubModel, results: Detections, address: str
) -> None:
    pil = pytest.importorskip("PIL.Image")
    path = PICTURES[0]
    rgb = cv2.imread(path)[..., ::-1]
    forms = [path, Path(path), Path(path).read_bytes(), rgb, rgb.transpose(2, 0, 1), pil.open(path)]
    forms += [np.dstack([rgb, rgb[..., 0]]), f"{address}/generated0.jpg"]
    assert len(results.xyxy[0]) > 2
    found = model(forms, size=320)
    for boxes in found.xyxy:
        assert torch.equal(boxes, results.xyxy[0])
    assert found.files[0] == found.files[5] == path and found.files[7] == "generated0.jpg"
    assert np.array_equal(found.ims[3], rgb)
    grey = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2GRAY)
    one, two = model([grey, np.dstack([grey] * 3)], size=320)
    assert torch.equal(one.xyxy[0], two.xyxy[0])


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.float32, np.float16])
def test_arrays_of_other_types_may_hold_the_same_values(
    model: HubModel, results: Detections, dtype: type
) -> None:
    rgb = cv2.imread(PICTURES[0])[..., ::-1]
    found = model(rgb.astype(dtype), size=320)
    assert torch.equal(found.xyxy[0], results.xyxy[0]) and found.ims[0].dtype == np.uint8
    assert len(model(np.zeros((40, 40, 3), dtype), size=320)) == 1  # black on any scale


def test_a_tensor_goes_straight_through_the_network(model: HubModel) -> None:
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    predictions, levels = model(images, profile=True)
    wanted, _ = bare(ROOT / "weights/demo_student.pt", "cpu").eval()(images)
    torch.testing.assert_close(predictions, wanted, rtol=1e-4, atol=1e-3)
    assert not predictions.requires_grad and predictions.shape[2] == 5 + model.nc
    assert sum(level[0, ..., 0].numel() for level in levels) == predictions.shape[1]
    augmented, none = model(images.double(), augment=True)
    assert (
        augmented.shape[1] > predictions.shape[1] // 2 and augmented.dtype == torch.float32 and none is None
    )
    both = load([ROOT / "weights/demo_student.pt"] * 2, "cpu", verbose=False)
    torch.testing.assert_close(both(images)[0], torch.cat((predictions, predictions), 1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), r"ims: is a tensor \(3, 64, 64\); give \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 64, 64), r"is a tensor \(1, 1, 64, 64\)"),
        (torch.zeros(0, 3, 64, 64), r"is a tensor \(0, 3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), r"torch.uint8; give 0..1: images.float\(\) / 255"),
        (torch.zeros(1, 3, 65, 64), "multiples of the stride"),
    ],
)
def test_a_tensor_that_a_network_does_not_take_is_named(
    model: HubModel, images: torch.Tensor, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        model(images)


def test_the_methods_of_a_module_do_what_they_can(model: HubModel, capsys) -> None:
    assert model.train(False) is model and model.eval() is model and model.float() is model
    with pytest.raises(UserError, match=r"train\(\): this model is for inference; .*autoshape=False"):
        model.train()
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert model.half() is model
    assert capsys.readouterr().err.count("the model is on the cpu: half() has no effect") == 1
    assert model.amp
    model.amp = False
    assert not model.amp and not model._half
    assert len(model(PICTURES[0], size=320, profile=True)) == 1
    assert model.float() is model
    assert model.nc == len(model.names) and model.yaml["nc"] == model.nc
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(list(model.parameters())) and set(names) <= set(model.state_dict())
    assert next(model.parameters()).device == model.device


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("nowhere.jpg", "nowhere.jpg: cannot be read"),
        (b"no image", "image 0: cannot be read"),
        ("http://127.0.0.1:9/a.jpg", "the server cannot be reached"),
        (
            np.full((4, 4, 3), 0.5),
            r"is an array of float64 with values from 0\.5 to 0\.5; scale it to 0\.\.255",
        ),
        (np.full((4, 4, 3), -1, np.int64), r"of int64 with values from -1 to -1; scale it to 0\.\.255"),
        (np.full((4, 4, 3), 256, np.uint16), r"of uint16 with values from 256 to 256; scale it"),
        (np.full((4, 4, 3), np.nan, np.float32), "of float32 with values from nan to nan"),
        (np.zeros((4, 4, 3), bool), r"is an array \(4, 4, 3\) of bool; give a path"),
        (np.zeros((4, 4, 2), np.uint8), r"is an array \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), "is an array"),
        (7, "image 0: is a int; give a path"),
    ],
)
def test_what_is_no_picture_is_named(model: HubModel, picture: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model(picture)


def test_the_rules_are_attributes(model: HubModel, results: Detections) -> None:
    labels = results.xyxy[0][:, 5]
    model.classes, model.max_det, model.conf = [int(labels[0])], 1, 0.2
    try:
        (found,) = model(PICTURES[:1], size=320).xyxy
    finally:
        model.classes, model.max_det, model.conf = None, 1000, 0.1
    assert len(found) == 1 and found[0, 5] == labels[0] and found[0, 4] > 0.2


def test_boxes_come_in_four_forms(results: Detections) -> None:
    assert len(results) == results.n == 2 and [one.n for one in results] == [1, 1]
    height, width = results.ims[0].shape[:2]
    size = torch.tensor([width, height, width, height])
    corners, centres = results.xyxy[0][:, :4], results.xywh[0][:, :4]
    torch.testing.assert_close((corners[:, :2] + corners[:, 2:]) / 2, centres[:, :2])
    torch.testing.assert_close(results.xyxyn[0][:, :4] * size, corners)
    torch.testing.assert_close(results.xywhn[0][:, :4] * size, centres)
    assert torch.equal(results[1].xyxy[0], results.xyxy[1])


def test_a_dict_holds_all_and_fits_into_json(results: Detections) -> None:
    plain = json.loads(json.dumps(results.to_dict()))
    assert [entry["file"] for entry in plain] == PICTURES
    first = plain[0]["detections"][0]
    row = results.xyxy[0][0].tolist()
    assert list(first["box"].values()) == row[:4] and first["confidence"] == row[4]
    assert first["name"] == results.names[int(row[5])]
    assert str(results).startswith(f"image 1/2: {plain[0]['height']}x{plain[0]['width']} ")


def test_pictures_are_drawn_on_copies_and_saved(results: Detections, tmp_path: Path) -> None:
    before = [image.copy() for image in results.ims]
    drawn = results.plot()
    x1, y1, *_ = results.xyxy[0][0].round().int().tolist()
    assert not np.array_equal(drawn[0][y1, x1 : x1 + 5], before[0][y1, x1 : x1 + 5])
    assert all(np.array_equal(*pair) for pair in zip(results.ims, before, strict=True))
    first = results.save(save_dir=tmp_path / "exp")
    assert results.save(save_dir=tmp_path / "exp") == tmp_path / "exp2"
    saved = cv2.imread(str(first / "generated0.jpg"))[..., ::-1]
    assert np.abs(saved.astype(int) - drawn[0]).mean() < 4  # what JPEG costs
    crops = results.crop(save_dir=tmp_path / "cut")
    assert len(crops) == sum(map(len, results.xyxy))
    assert crops[0]["label"].startswith(results.names[crops[0]["cls"]]) and crops[0]["im"].ndim == 3
    files = {path: cv2.imread(str(path)).shape for path in (tmp_path / "cut/crops").rglob("*.jpg")}
    assert sorted(files.values()) == sorted(crop["im"].shape for crop in crops)  # the margin in both
    x1, y1, x2, y2, *_ = results.xyxy[0][0].tolist()
    assert crops[0]["im"].shape[0] > y2 - y1 + 5 and crops[0]["im"].shape[1] > x2 - x1 + 5


def test_display_does_what_it_is_asked_for(results: Detections, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    results.display()
    assert capsys.readouterr().out == "" and not (tmp_path / "runs").exists()
    before = results[:]
    before.display(pprint=True, save=True, crop=True, render=True)
    assert capsys.readouterr().out.startswith("image 1/2: ")
    assert (tmp_path / "runs/detect/exp/generated0.jpg").exists()
    assert (tmp_path / "runs/detect/exp2/crops").is_dir()
    assert before.imgs is before.ims and not np.array_equal(before.imgs[0], results.imgs[0])


def test_results_know_times_and_the_size_that_the_network_saw(model: HubModel, results: Detections) -> None:
    assert results.times == results.t and results.times[1] > 0
    height, width = results.s[2:]
    assert results.s == (2, 3, height, width) and max(height, width) == 320 and height % model.stride == 0
    assert results[0].s == results.s


def test_crops_of_pictures_with_one_name_are_all_kept(tmp_path: Path) -> None:
    image, boxes = np.zeros((40, 40, 3), np.uint8), torch.tensor([[3, 3, 20, 20, 0.9, 0]])
    results = Detections([image, image], [boxes, boxes], ["one/a.jpg", "two/a.jpg"], ["a"])
    assert len(results.crop(save_dir=tmp_path / "cut")) == 2
    assert len(list((tmp_path / "cut/crops").rglob("*.jpg"))) == 2


def test_objects_are_counted_as_people_count_them() -> None:
    boxes = torch.tensor([[3, 3, 20, 20, 0.9, 1], [3, 3, 20, 20, 0.8, 0], [3, 3, 9, 9, 0.8, 1]])
    results = Detections([np.zeros((30, 40, 3), np.uint8)], [boxes], ["a.jpg"], ["dog", "person"])
    assert str(results).startswith("image 1/1: 30x40 1 dog, 2 persons\n")


def test_crops_of_boxes_at_the_borders_hold_a_pixel_at_least(tmp_path: Path) -> None:
    boxes = torch.tensor([[3, 9.6, 8, 10, 0.9, 0], [19.7, 2, 20, 7, 0.8, 0], [19.9, 9.9, 20, 10, 0.7, 0]])
    results = Detections([np.zeros((10, 20, 3), np.uint8)], [boxes], ["a.jpg"], ["a"])
    shapes = [crop["im"].shape for crop in results.crop(save_dir=tmp_path / "cut")]
    assert shapes == [(6, 14, 3), (10, 6, 3), (6, 6, 3)]


def test_tables_of_pandas_or_a_line_that_says_what_to_install(results: Detections) -> None:
    try:
        import pandas  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install pandas"):
            results.pandas()
        return
    table = results.pandas().xyxy[0]
    assert list(table.columns) == [*("xmin", "ymin", "xmax", "ymax"), "confidence", "class", "name"]
    assert len(table) == len(results.xyxy[0])


def test_bare_networks_can_be_trained(tmp_path: Path) -> None:
    network = bare(ROOT / "weights/demo_student.pt", "cpu")
    assert isinstance(network, Model) and all(p.requires_grad for p in network.parameters())
    assert not network.training  # a pass must not change what is loaded
    fresh = load_or_create("yolov5n", pretrained=False, channels=1, classes=4, device="cpu")
    assert fresh.nc == 4 and fresh.channels == 1
    with pytest.raises(UserError, match="takes images of 1 channel"):
        ready(fresh, "cpu")
    with pytest.raises(UserError, match="no such weight file"):
        load_or_create("yolov5z", device="cpu")


def test_the_hub_has_public_networks_by_name(public_yolov5n: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/yolov5n.pt").symlink_to(public_yolov5n)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    whole = torch.hub.load(str(ROOT), "yolov5n", source="local", device="cpu", verbose=False)
    assert whole.names[16] == "dog" and len(whole(PICTURES[0], size=320)) == 1
    few = torch.hub.load(str(ROOT), "yolov5n", source="local", classes=3, autoshape=False, device="cpu")
    assert few.nc == 3 and few.training
    bare_one = torch.hub.load(str(ROOT), "yolov5n", source="local", autoshape=False, device="cpu")
    assert bare_one.nc == 80 and not bare_one.training
    assert torch.equal(few.model[0].bn.running_mean, bare(public_yolov5n, "cpu").model[0].bn.running_mean)


def test_networks_of_a_size_say_what_they_are_unless_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"pretrained": False, "classes": 4, "device": "cpu"}
    hubconf.yolov5n(**given)
    assert capsys.readouterr().out == "yolov5n: 4 classes, stride 32\n"
    hubconf.yolov5n(**given, _verbose=False)
    hubconf.yolov5n(**given, autoshape=False)
    assert capsys.readouterr().out == ""


def test_custom_takes_the_older_name_of_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    found = hubconf.custom(path_or_model=str(ROOT / "weights/demo_student.pt"), device="cpu")
    assert isinstance(found, HubModel) and "demo_student.pt" in capsys.readouterr().out
    with pytest.raises(UserError, match="path: is a Model; give the path of a weight file"):
        hubconf.custom(path_or_model=found.model)
    with pytest.raises(UserError, match="names no weight file"):
        hubconf.custom()


def test_the_hub_is_told_all_packages_that_are_imported() -> None:
    """scipy is for trainings alone."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    modules = {"opencv-python": "cv2", "pyyaml": "yaml"}
    required = {modules.get(name, name) for name in (re.split("[<>=]", line)[0] for line in lines)}
    assert set(hubconf.dependencies) == required - {"scipy"}


def test_a_size_that_no_memory_holds_is_refused(model: HubModel) -> None:
    with pytest.raises(UserError, match="size: 1000000000 px are too many; take at most 16384"):
        model(PICTURES[0], size=10**9)
