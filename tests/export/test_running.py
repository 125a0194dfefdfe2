"""detect.py and test.py run exported files as they run weights; export.py as a person runs it."""

from __future__ import annotations

import copy
import csv
import re
import shutil
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.checkpoint import save_checkpoint
from models.yolo import Model, default_names
from utils.config import options as declared
from utils.config.cli import parse
from utils.config.options import DetectOptions, ExportOptions
from utils.errors import UsageError, UserError
from utils.evaluation.run import run_test
from utils.export import run as export
from utils.export.run import run_export
from utils.export.torchscript_file import torchscript_content
from utils.export.verify import Comparison
from utils.inference.exported import ExportedNetwork
from utils.inference.facts import ExportFacts, NmsInside
from utils.inference.run import run_detect
from utils.reporting.console import Console

ROOT = Path(__file__).resolve().parents[2]
ANY = (None, None, None)
NAMES = '["nut & bolt", "it\'s", "a \\"b\\""]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Model, tiny_weights: Path, pictures) -> Path:
    """The weights, exports of them as `free`, `fixed` and `nms`, and a labelled set of seven images."""
    made = tmp_path_factory.mktemp("running")
    shutil.copy(tiny_weights, made / "tiny.pt")
    nms = NmsInside(conf_thres=0.4, iou_thres=0.45, max_det=2000)
    for name, shape, inside in (("free", ANY, None), ("fixed", (2, 96, 96), None), ("nms", ANY, nms)):
        facts = ExportFacts(names=tuple(tiny.names), stride=tiny.size_multiple, shape=shape, nms=inside)
        (made / f"{name}.torchscript").write_bytes(torchscript_content(tiny, facts))
    for kind in ("images", "labels"):
        (made / kind / "val").mkdir(parents=True)
    for number in range(7):
        picture = pictures[number % 3][: 200 + 20 * number]
        cv2.imwrite(str(made / f"images/val/{number}.png"), cv2.resize(picture, None, fx=0.3, fy=0.3))
        (made / f"labels/val/{number}.txt").touch()
    # The network's own best finds are the labels: then it scores something.
    found = detected(made, made / "labels", "tiny.pt", "--max-det", "3")
    for name, rows in found.items():
        lines = [f"{int(label)} {x} {y} {w} {h}" for label, x, y, w, h, _ in rows]
        (made / "labels/val" / name).write_text("\n".join(lines))
    (made / "set.yaml").write_text(f"path: .\ntrain: images/val\nval: images/val\nnames: {NAMES}\n")
    return made


def detected(folder: Path, tmp_path: Path, weights: str, *words: str) -> dict[str, np.ndarray]:
    """The lines of the label files, by name."""
    given = ["--weights", str(folder / weights), "--source", str(folder / "images/val"), "--device", "cpu"]
    given += ["--save-txt", "--save-conf", "--nosave", "--img", "96", "--project", str(tmp_path), *words]
    run = run_detect(parse(DetectOptions, given), Console(quiet=True))
    assert run is not None
    return {path.name: np.loadtxt(path, ndmin=2) for path in sorted((run / "labels").iterdir())}


def assert_alike(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys() and len(first) > 3
    for name, rows in first.items():
        assert np.array_equal(rows[:, 0], second[name][:, 0])
        np.testing.assert_allclose(rows, second[name], atol=1e-4)  # six digits are written


def test_detect_finds_the_same_with_an_exported_file(folder: Path, tmp_path: Path) -> None:
    words = ("--conf", "0.5", "--max-det", "40", "--classes", "0", "2")
    wanted = detected(folder, tmp_path, "tiny.pt", *words)
    assert_alike(wanted, detected(folder, tmp_path, "free.torchscript", *words))
    assert_alike(wanted, detected(folder, tmp_path, "nms.torchscript", *words))


def test_test_says_which_of_its_options_nms_inside_leaves_without_effect(
    folder: Path, tmp_path: Path, capsys
) -> None:
    words = ("--iou", "0.3", "--conf", "0.0001", "--max-det", "3000")
    assert scored(folder, tmp_path, "nms.torchscript", *words) == scored(
        folder, tmp_path, "nms.torchscript", "--max-det", "2000"
    )
    said = capsys.readouterr().err
    assert said.count("--iou-thres has no effect") == said.count("has NMS inside: what is scored") - 1 == 1
    assert "--conf-thres: nothing below" in said and "--max-det: no more than" in said


def test_detect_fits_pictures_to_a_file_of_one_shape(folder: Path, tmp_path: Path, capsys) -> None:
    """Seven images in batches of two, the last one filled up; boxes lie where they lay without padding."""
    found = detected(folder, tmp_path, "fixed.torchscript", "--img", "64")
    assert len(found) == 7
    assert "takes images of 96x96 px alone: --imgsz has no effect" in capsys.readouterr().err
    for rows in found.values():
        assert rows[:, 1:5].min() >= 0 and rows[:, 1:5].max() <= 1


def scored(folder: Path, tmp_path: Path, weights: str, *words: str) -> dict[str, float]:
    given = ["--weights", str(folder / weights), "--data", str(folder / "set.yaml"), "--device", "cpu"]
    given += ["--workers", "0", "--noplots", "--img", "96", "--project", str(tmp_path), *words]
    result = run_test(parse(declared.TestOptions, given), Console(quiet=True))
    return {"map50": result.map50, "map50_95": result.map50_95, "images": result.images}


def test_test_gives_the_same_scores_with_an_exported_file(folder: Path, tmp_path: Path, capsys) -> None:
    """Batches of equal aspect where shapes are free; squares where the file takes one."""
    wanted = scored(folder, tmp_path, "tiny.pt", "--batch", "3")
    assert wanted["map50"] > 0
    assert scored(folder, tmp_path, "free.torchscript", "--batch", "3") == pytest.approx(wanted, abs=1e-6)
    squares = scored(folder, tmp_path, "tiny.pt", "--batch", "3", "--no-rect")
    assert scored(folder, tmp_path, "fixed.torchscript", "--batch", "3") == pytest.approx(squares, abs=1e-6)
    assert "scores are those of --no-rect" in capsys.readouterr().err
    assert scored(folder, tmp_path, "nms.torchscript")["images"] == 7
    assert "NMS inside" in capsys.readouterr().err


def test_files_for_a_shape_that_is_no_square_are_scored(folder: Path, tmp_path: Path, tiny: Model) -> None:
    facts = ExportFacts(names=tuple(tiny.names), stride=tiny.size_multiple, shape=(1, 64, 96))
    (folder / "wide.torchscript").write_bytes(torchscript_content(tiny, facts))
    assert scored(folder, tmp_path, "wide.torchscript")["images"] == 7


def test_what_does_not_fit_an_exported_file_is_refused_or_told(folder: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(UsageError, match="--augment: needs the network itself"):
        detected(folder, tmp_path, "free.torchscript", "--augment")
    with pytest.raises(UsageError, match="there is no class 3"):
        detected(folder, tmp_path, "free.torchscript", "--classes", "3")
    detected(folder, tmp_path, "nms.torchscript", "--half", "--iou", "0.9", "--conf", "0.1")
    said = capsys.readouterr().err
    for words in ("--half has no effect", "--iou-thres has no effect", "nothing below 0.4 comes out"):
        assert words in said
    (folder / "net.engine").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file for TensorRT, which is not supported"):
        detected(folder, tmp_path, "net.engine")


def predicted(tmp_path: Path) -> set[str]:
    """The class names in the tables of the runs in a folder."""
    tables = [path.read_text(encoding="utf-8").splitlines() for path in tmp_path.glob("*/predictions.csv")]
    return {row["Prediction"] for table in tables for row in csv.DictReader(table)}


@pytest.mark.parametrize("weights", ["tiny.pt", "free.torchscript"])
@pytest.mark.parametrize("names", ["[a, b, c]", "[a, b]"])
def test_names_of_a_dataset_never_replace_those_in_the_weights(
    folder: Path, tmp_path: Path, tiny: Model, weights: str, names: str, capsys
) -> None:
    own, other = folder / "set.yaml", tmp_path / "other.yaml"
    other.write_text(f"names: {names}\n")
    detected(folder, tmp_path / "runs", weights, "--save-csv", "--data", str(other))
    assert set() < predicted(tmp_path / "runs") <= set(tiny.names)
    warned = f"{folder / weights} has its own class names, which are used, not those of {other}"
    assert warned in capsys.readouterr().err
    detected(folder, tmp_path / "runs", weights, "--data", str(own))
    assert "its own class names" not in capsys.readouterr().err


def test_weights_with_placeholders_for_names_take_those_of_a_dataset(
    folder: Path, tmp_path: Path, tiny: Model, capsys
) -> None:
    bare = copy.deepcopy(tiny)
    bare.names = default_names(bare.nc)
    save_checkpoint(folder / "unnamed.pt", model=bare, epoch=0, best_fitness=None, meta={})
    detected(folder, tmp_path, "unnamed.pt", "--save-csv", "--data", str(folder / "set.yaml"))
    assert set() < predicted(tmp_path) <= set(tiny.names)
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "two.yaml").write_text("names: [x, y]\n")
    with pytest.raises(UserError, match=r"two.yaml: has 2 class names, .* knows 3 classes"):
        detected(folder, tmp_path, "unnamed.pt", "--data", str(tmp_path / "two.yaml"))


class Bare(nn.Module):
    """What somebody else may have traced: decoded predictions and more, of three classes."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(x)[0], x


def test_a_file_without_metadata_takes_names_from_a_dataset(
    folder: Path, tmp_path: Path, tiny: Model
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Bare(tiny), torch.zeros(1, 3, 96, 96), check_trace=False)
        torch.jit.save(traced, str(folder / "bare.torchscript"))
    with pytest.raises(UserError, match="bare.torchscript: has no class names inside; .*--data"):
        detected(folder, tmp_path, "bare.torchscript")
    (folder / "two.yaml").write_text((folder / "set.yaml").read_text().replace(NAMES, "[x, y]"))
    with pytest.raises(UserError, match=r"has 2 class names, .* knows 3 classes"):
        detected(folder, tmp_path, "bare.torchscript", "--data", str(folder / "two.yaml"))
    found = detected(folder, tmp_path, "bare.torchscript", "--data", str(folder / "set.yaml"))
    assert_alike(found, found)
    wanted = scored(folder, tmp_path, "tiny.pt", "--no-rect")
    assert scored(folder, tmp_path, "bare.torchscript") == pytest.approx(wanted, abs=1e-6)


def test_export_writes_beside_the_weights_and_says_so(tmp_path: Path, tiny_weights: Path, run_script) -> None:
    weights = tmp_path / "best.pt"
    shutil.copy(tiny_weights, weights)
    before = weights.read_bytes()
    size = ("--img", 96, 128, "--batch-size", 2)
    done = run_script("export.py", "--weights", weights, *size, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "best.torchscript"]
    assert weights.read_bytes() == before
    agreed = "best.torchscript agrees with PyTorch: 3840 predictions, 1 shape, scores within"
    assert agreed in done.stdout
    assert re.search(r"use it: python \S*detect\.py --weights", done.stdout)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--include", "coreml"], "--include coreml: is not supported: --include takes onnx,"),
        (["--include", "onyx"], "--include onyx: must be one of torchscript, onnx, openvino"),
        (["--weights", "nowhere.pt"], "nowhere.pt"),
        (["--weights", "best.torchscript"], "is an exported file already"),
        (["--source", "empty"], "no image or video"),
        (["--img", "10"], "--img"),
        (["--img", "64", "64", "64"], "takes one number, or height and width"),
    ],
)
def test_export_refuses_what_cannot_work(
    words: list[str], message: str, tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_weights, tmp_path / "best.pt")
    (tmp_path / "best.torchscript").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    given = words if "--weights" in words else ["--weights", "best.pt", *words]
    with pytest.raises(UserError) as refusal:
        run_export(parse(ExportOptions, given), Console(quiet=True))
    assert message in str(refusal.value)


@pytest.fixture
def exporting(tmp_path: Path, tiny: Model, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that exports `best.pt` in formats; TorchScript files are of another network."""
    shutil.copy(tiny_weights, tmp_path / "best.pt")
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.head.m[0].bias += 0.05
    monkeypatch.setattr(export, "is_installed", lambda _: True)
    monkeypatch.setattr(export, "torchscript_content", lambda _, facts: torchscript_content(other, facts))

    def run(*include: str) -> list[Path]:
        words = ["--weights", str(tmp_path / "best.pt"), "--img", "96", "--include", *include]
        return run_export(parse(ExportOptions, words), Console())

    return run


@pytest.mark.fault(
    "an exported file whose outputs differ from the model's, or that is corrupt",
    "an error names each; the previous file is kept, and the other formats are written",
)
def test_a_file_that_does_not_pass_replaces_none_and_costs_the_others_nothing(
    tmp_path: Path, exporting, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "best.torchscript").write_bytes(b"good")
    monkeypatch.setattr(export, "onnx_content", lambda *_: b"no protobuf")
    monkeypatch.setattr(export, "write_openvino", _openvino_stub)
    monkeypatch.setattr(export, "compare", _passing_folders(export.compare))
    monkeypatch.setattr(export, "load_network", _loading_folders(export.load_network))
    with pytest.raises(UserError, match=r"best\.onnx: is not an intact ONNX file") as last:
        exporting("torchscript", "onnx", "openvino")
    assert last.value.where == str(tmp_path / "best.onnx")
    said = capsys.readouterr()
    assert f"{tmp_path / 'best.torchscript'}: differs from PyTorch: scores by" in said.err
    use = [line for line in said.out.splitlines() if line.startswith("use it: ")]
    assert len(use) == 1 and "best_openvino_model" in use[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("best.pt", "best.torchscript", "best_openvino_model")
    ]
    assert (tmp_path / "best.torchscript").read_bytes() == b"good"


def test_an_openvino_folder_takes_its_place_file_by_file(
    tmp_path: Path, exporting, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "best_openvino_model"
    folder.mkdir()
    for name in ("best.xml", "best.bin", "notes.txt"):
        (folder / name).write_text("old")
    monkeypatch.setattr(export, "onnx_content", lambda *_: b"")
    monkeypatch.setattr(export, "write_openvino", _openvino_stub)
    with pytest.raises(UserError, match=r"best_openvino_model") as refusal:
        exporting("openvino")  # there is no network in it
    assert ".export-" not in str(refusal.value)
    assert {path.read_text() for path in folder.iterdir()} == {"old"}
    monkeypatch.setattr(export, "compare", _passing_folders(export.compare))
    monkeypatch.setattr(export, "load_network", _loading_folders(export.load_network))
    assert exporting("openvino") == [folder]
    contents = {path.name: path.read_text() for path in folder.iterdir()}
    assert contents == {"best.xml": "new", "best.bin": "new", "best.yaml": "new", "notes.txt": "old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", folder.name]


def _openvino_stub(folder: Path, *_: object) -> None:
    folder.mkdir()
    for suffix in ("bin", "xml", "yaml"):
        (folder / f"best.{suffix}").write_text("new")


def _loading_folders(real):
    class Network(ExportedNetwork):
        kind = "stub"

        def run(self, images: Tensor) -> Tensor:
            return images

    return lambda path, device: Network(path, ExportFacts(), device) if path.is_dir() else real(path, device)


def _passing_folders(real):
    return lambda model, network, *given: (
        Comparison(predictions=1) if network.path.is_dir() else real(model, network, *given)
    )


def test_packages_that_are_missing_are_named_before_anything_is_written(
    folder: Path, tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(tiny_weights, tmp_path / "best.pt")
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    words = ["--weights", str(tmp_path / "best.pt"), "--include", "torchscript", "onnx", "openvino"]
    with pytest.raises(UserError, match=r"--include: needs .*onnxruntime, openvino; pip install"):
        run_export(parse(ExportOptions, words), Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
    (folder / "any.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match="any.onnx: needs onnxruntime; pip install onnx onnxruntime"):
        detected(folder, tmp_path, "any.onnx")


def test_public_weights_give_the_same_boxes_as_their_export(
    tmp_path: Path, public_yolov5n: Path, voc320_dir: Path
) -> None:
    """On real photos, in the format that needs no further package."""
    from models.checkpoint import build_model, read_checkpoint

    (tmp_path / "images/val").mkdir(parents=True)
    for picture in sorted((voc320_dir / "images/val").glob("*.jpg"))[:7]:
        shutil.copy(picture, tmp_path / "images/val")
    shutil.copy(public_yolov5n, tmp_path / "n.pt")
    model = build_model(read_checkpoint(public_yolov5n)).fuse().requires_grad_(False)
    facts = ExportFacts(names=tuple(model.names), stride=model.size_multiple)
    (tmp_path / "n.torchscript").write_bytes(torchscript_content(model, facts))
    first, second = (detected(tmp_path, tmp_path, name, "--img", "320") for name in ("n.pt", "n.torchscript"))
    assert first.keys() == second.keys() and sum(map(len, first.values())) >= 7
    for name, rows in first.items():
        np.testing.assert_allclose(rows, second[name], atol=1e-4)


def test_the_exporters_packages_are_imported_before_anything_is_written(
    tmp_path: Path, exporting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during an import ends the process at once, and would leave what is half written."""
    seen = []

    def imported(name: str) -> None:
        seen.append((name, [path.name for path in tmp_path.iterdir()]))
        if name == "onnxscript":
            raise KeyboardInterrupt

    monkeypatch.setattr(export, "import_at_once", imported)
    with pytest.raises(KeyboardInterrupt):
        exporting("torchscript", "onnx")
    assert seen == [("torch._dynamo", ["best.pt"]), ("onnxscript", ["best.pt"])]


@pytest.mark.parametrize(
    ("seen", "told"),
    [(0, "sees nothing in these images, so nothing was compared"), (1, "sees only 1 object in"), (5, "")],
)
def test_a_comparison_of_next_to_nothing_is_a_warning(
    seen: int, told: str, exporting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "compare", lambda *_: Comparison(detections=seen, shapes=1))
    exporting("torchscript")
    output = capsys.readouterr()
    assert ("agrees with PyTorch" in output.out) == (seen > 0)
    assert ("with --source" in output.err) == bool(told) and told in output.err
