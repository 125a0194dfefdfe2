"""Exported networks do what the network does, and say of themselves what others expect to read."""

from __future__ import annotations

import ast
import copy
import io
import json
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from models.yolo import Model
from utils.boxes import NmsRules, suppress
from utils.errors import UsageError, UserError
from utils.export.network import ExportNetwork, decode_for_export
from utils.export.scripted_nms import select_detections
from utils.export.torchscript_file import torchscript_content
from utils.export.verify import EXACT, HALF, compare
from utils.inference.backends import load_network
from utils.inference.exported import ExportedNetwork
from utils.inference.facts import ExportFacts, NmsInside, facts_to_dict
from utils.inference.predictor import halved

CPU = torch.device("cpu")
SIZE_HW = (96, 128)
FIXED, FREE = (2, *SIZE_HW), (None, None, None)
USUAL = NmsInside(conf_thres=0.5, iou_thres=0.45, max_det=40)
AGNOSTIC = NmsInside(conf_thres=0.3, iou_thres=0.3, max_det=300, agnostic=True)


def facts_of(model: Model, shape: tuple[int | None, ...], nms: NmsInside | None = None) -> ExportFacts:
    return ExportFacts(names=tuple(model.names), stride=model.size_multiple, shape=shape, nms=nms)


def loaded(path: Path, content: bytes) -> ExportedNetwork:
    path.write_bytes(content)
    network = load_network(path, CPU)
    assert isinstance(network, ExportedNetwork)
    network.probe()
    return network


@pytest.mark.parametrize("shape", [FIXED, FREE])
@pytest.mark.parametrize("nms", [None, USUAL, AGNOSTIC])
def test_a_torchscript_file_does_what_the_network_does(
    tiny: Model, pictures: list[np.ndarray], shape, nms, tmp_path: Path
) -> None:
    facts = facts_of(tiny, shape, nms)
    network = loaded(tmp_path / "a.torchscript", torchscript_content(tiny, facts))
    assert network.facts == facts and network.names == tiny.names
    result = compare(tiny, network, pictures, SIZE_HW, EXACT)
    assert result.shapes == (1 if shape == FIXED else 3)
    assert (result.detections > 20) == (nms is not None)


@pytest.mark.parametrize("nms", [None, USUAL])
def test_a_torchscript_file_gives_a_tuple_of_one_as_other_programs_expect(
    tiny: Model, nms: NmsInside | None
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        module = torch.jit.load(io.BytesIO(torchscript_content(tiny, facts_of(tiny, FIXED, nms))))
    output = module(torch.zeros(2, 3, *SIZE_HW))
    assert isinstance(output, tuple) and len(output) == 1
    assert output[0].shape == ((2, 1920, 8) if nms is None else (2, USUAL.max_det, 6))


class OfATensor(torch.nn.Module):
    """What this project exported before: the predictions alone, in no tuple."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network = ExportNetwork(model)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)[0]


def test_a_torchscript_file_of_a_bare_tensor_is_read_as_before(
    tiny: Model, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        traced = torch.jit.trace(OfATensor(tiny).eval(), torch.zeros(2, 3, *SIZE_HW), check_trace=False)
        config = json.dumps(facts_to_dict(facts_of(tiny, FIXED)))
        torch.jit.save(traced, stream, _extra_files={"config.txt": config})
    network = loaded(tmp_path / "a.torchscript", stream.getvalue())
    assert compare(tiny, network, pictures, SIZE_HW, EXACT).shapes == 1


@pytest.fixture(scope="module")
def onnx_files(tiny: Model):
    """A function that gives the .onnx file of a shape and NMS; making one takes seconds."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is missing: make dev")
    from utils.export.onnx_file import onnx_content

    @lru_cache
    def content(shape: tuple[int | None, ...], nms: NmsInside | None = None, opset: int = 18) -> bytes:
        return onnx_content(tiny, facts_of(tiny, shape, nms), opset, simplify=opset == 18)

    return content


@pytest.mark.parametrize("nms", [None, USUAL])
def test_an_onnx_file_of_one_shape_does_what_the_network_does(
    tiny: Model, pictures: list[np.ndarray], onnx_files, nms, tmp_path: Path
) -> None:
    content = onnx_files(FIXED, nms)
    network = loaded(tmp_path / "a.onnx", content)
    assert network.facts == facts_of(tiny, FIXED, nms)
    result = compare(tiny, network, pictures, SIZE_HW, EXACT)
    assert (result.detections > 20) == (nms is not None)
    assert b"/torch/" not in content and str(Path.cwd()).encode() not in content


def test_the_metadata_of_an_onnx_file_are_what_others_read(tiny: Model, onnx_files) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.ModelProto.FromString(onnx_files(FIXED, USUAL))
    stated = {entry.key: entry.value for entry in model.metadata_props}
    assert stated["stride"] == "8"
    assert ast.literal_eval(stated["names"]) == dict(enumerate(tiny.names))
    assert "NonMaxSuppression" in {node.op_type for node in model.graph.node}


def test_operators_that_nobody_knows_yet_are_refused(onnx_files) -> None:
    with pytest.raises(UsageError, match="--opset: 900 is newer"):
        onnx_files(FIXED, opset=900)


@pytest.mark.parametrize("opset", [12, 13, 17])
def test_an_onnx_file_of_an_older_opset_does_what_the_network_does(
    tiny: Model, pictures: list[np.ndarray], onnx_files, opset: int, tmp_path: Path
) -> None:
    """On both sides of opset 14, below which onnx's own converter does not go."""
    onnx = pytest.importorskip("onnx")
    from utils.export.older_opset import to_older_opset

    facts = facts_of(tiny, FIXED)
    written = to_older_opset(onnx.ModelProto.FromString(onnx_files(FIXED)), opset, facts, simplify=True)
    assert [entry.version for entry in written.opset_import] == [opset]
    assert written.ir_version == (7 if opset < 15 else 8)
    network = loaded(tmp_path / "a.onnx", written.SerializeToString())
    assert network.facts == facts
    result = compare(tiny, network, pictures, SIZE_HW, EXACT)
    assert result.predictions > 0


def test_an_export_to_an_older_opset_states_what_the_others_do(tiny: Model, onnx_files) -> None:
    onnx = pytest.importorskip("onnx")
    from utils.export.onnx_file import onnx_content

    facts = facts_of(tiny, FIXED)
    older, usual = (
        onnx.ModelProto.FromString(content)
        for content in (onnx_content(tiny, facts, 12, simplify=True), onnx_files(FIXED))
    )
    assert [entry.version for entry in older.opset_import] == [12]
    assert sorted(map(str, older.metadata_props)) == sorted(map(str, usual.metadata_props))
    assert [side.name for side in (*older.graph.input, *older.graph.output)] == ["images", "output0"]


def test_what_an_older_opset_lacks_is_one_line_that_says_what_to_leave_out(tiny: Model, onnx_files) -> None:
    onnx = pytest.importorskip("onnx")
    from utils.export.older_opset import to_older_opset

    proto = onnx.ModelProto.FromString(onnx_files(FIXED, USUAL))
    with pytest.raises(UsageError) as refusal:
        to_older_opset(proto, 17, facts_of(tiny, FIXED, USUAL), simplify=True)
    said = str(refusal.value)
    assert said.startswith("--opset: this network cannot be converted to 17 (")
    assert said.endswith("; give 18 or newer, or leave out --nms") and "\n" not in said
    proto = onnx.ModelProto.FromString(onnx_files(FREE))
    with pytest.raises(UsageError, match="; give 15 or newer, or leave out --dynamic"):
        to_older_opset(proto, 14, facts_of(tiny, FREE), simplify=True)


@pytest.fixture(scope="module")
def of_rare_blocks() -> Model:
    """A network of the blocks that no shipped one has but published YAML files do."""
    torch.manual_seed(0)
    rows = [
        [-1, 1, "Contract", [2]], [-1, 1, "CrossConv", [16, 3, 2]], [-1, 1, "MixConv2d", [32, [1, 3], 2]],
        [-1, 1, "C3x", [32]], [-1, 1, "C3SPP", [32, [3, 5]]], [-1, 1, "C3TR", [64]], [-1, 1, "Expand", [2]],
        [-1, 1, "DWConvTranspose2d", [16, 2, 2]], [-1, 1, "Conv", [16, 3, 2]],
    ]  # fmt: skip
    head = [[[-1], 1, "Detect", ["nc", "anchors"]]]
    shape = {"nc": 3, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": [[10, 12, 20, 30]]}
    model = Model({**shape, "backbone": rows, "head": head})
    with torch.no_grad():
        model.head.m[0].bias.view(2, -1)[:, 4] = 1
    return model.eval().fuse()


@pytest.mark.parametrize("shape", [FIXED, FREE])
@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_rare_blocks_are_exported_too(
    of_rare_blocks: Model, pictures: list[np.ndarray], shape, kind: str, tmp_path: Path
) -> None:
    facts = facts_of(of_rare_blocks, shape)
    if kind == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason=f"{name} is missing: make dev")
        from utils.export.onnx_file import onnx_content

        content = onnx_content(of_rare_blocks, facts, 18, simplify=False)
    else:
        content = torchscript_content(of_rare_blocks, facts)
    network = loaded(tmp_path / f"a.{kind}", content)
    assert compare(of_rare_blocks, network, pictures, SIZE_HW, EXACT).shapes >= 1


@pytest.mark.slow
def test_an_onnx_file_of_free_shapes_does_what_the_network_does(
    tiny: Model, pictures: list[np.ndarray], onnx_files, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    content = onnx_files(FREE, AGNOSTIC, opset=20)
    network = loaded(tmp_path / "a.onnx", content)
    assert network.facts == facts_of(tiny, FREE, AGNOSTIC)
    assert compare(tiny, network, pictures, SIZE_HW, EXACT).shapes == 3
    model = onnx.ModelProto.FromString(content)
    (taken,) = model.graph.input
    sides = [side.dim_param or side.dim_value for side in taken.type.tensor_type.shape.dim]
    assert sides == ["batch", 3, "height", "width"]
    assert model.opset_import[0].version == 20


@pytest.mark.parametrize("half", [False, True])
def test_an_openvino_folder_does_what_the_network_does(
    tiny: Model, pictures: list[np.ndarray], onnx_files, half: bool, tmp_path: Path
) -> None:
    pytest.importorskip("openvino", reason="openvino is missing: pip install openvino")
    from utils.export.openvino_folder import write_openvino

    facts = facts_of(tiny, FIXED)
    folder = tmp_path / "a_openvino_model"
    write_openvino(folder, onnx_files(FIXED), facts, half)
    assert sorted(path.name for path in folder.iterdir()) == ["a.bin", "a.xml", "a.yaml"]
    assert str(tmp_path) not in (folder / "a.xml").read_text()
    network = load_network(folder, CPU)
    assert isinstance(network, ExportedNetwork)
    assert network.facts == facts
    compare(tiny, network, pictures, SIZE_HW, HALF if half else EXACT)


def test_a_torchscript_file_of_float16_is_close_to_the_network(
    tiny: Model, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    half = halved(copy.deepcopy(tiny))
    content = torchscript_content(half, facts_of(tiny, FIXED))
    network = loaded(tmp_path / "a.torchscript", content)
    assert len(content) < len(torchscript_content(tiny, facts_of(tiny, FIXED)))
    compare(tiny, network, pictures, SIZE_HW, HALF)


@pytest.mark.parametrize("nms", [None, USUAL])
def test_a_file_of_another_network_does_not_pass(
    tiny: Model, pictures: list[np.ndarray], nms, tmp_path: Path
) -> None:
    network = loaded(tmp_path / "a.torchscript", torchscript_content(tiny, facts_of(tiny, FIXED, nms)))
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.head.m[0].bias += 0.05
    with pytest.raises(UserError, match="a.torchscript: differs from PyTorch"):
        compare(other, network, pictures, SIZE_HW, EXACT)


def test_the_config_in_a_torchscript_file_is_what_others_read(tiny: Model) -> None:
    with zipfile.ZipFile(io.BytesIO(torchscript_content(tiny, facts_of(tiny, FIXED)))) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/extra/config.txt")]
        stated = json.loads(archive.read(name))
    assert stated["stride"] == 8 and stated["shape"] == [2, 3, 96, 128]
    assert stated["names"] == {"0": "nut & bolt", "1": "it's", "2": 'a "b"'}


def test_the_decoding_for_export_is_that_of_the_network(tiny: Model) -> None:
    levels = tiny.forward_head(tiny.forward_features(torch.rand(2, 3, 40, 64)))
    got = decode_for_export(levels, tiny.anchors_px, tiny.stride)
    torch.testing.assert_close(got, tiny.decode_levels(levels), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("count", [300, 4000])
@pytest.mark.parametrize("agnostic", [False, True])
def test_the_scripted_suppression_is_that_of_the_project(count: int, agnostic: bool) -> None:
    """On both sides of the thousand boxes from which classes are suppressed one by one."""
    generator = torch.Generator().manual_seed(0)
    predictions = torch.rand(2, count, 9, generator=generator)
    predictions[..., :2] *= 400
    predictions[..., 2:4] = 20 + 60 * predictions[..., 2:4]
    predictions[1, :, 4] = 0  # an image without anything
    got = select_detections(predictions, 0.2, 0.5, 5000, agnostic)
    rules = NmsRules(conf_thres=0.2, iou_thres=0.5, max_det=5000, agnostic=agnostic)
    for kept, rows in zip(suppress(predictions, rules), got, strict=True):
        torch.testing.assert_close(rows[: len(kept.detections)], kept.detections, rtol=0, atol=1e-4)
        assert not rows[len(kept.detections) :].any()


def test_detections_that_suppression_would_not_give_do_not_pass(
    tiny: Model, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    """One missing, one too many, one of another class: each alone."""
    network = loaded(tmp_path / "a.torchscript", torchscript_content(tiny, facts_of(tiny, FREE, USUAL)))
    compare(tiny, network, pictures, SIZE_HW, EXACT)
    honest = network.run

    def without_first(images: torch.Tensor) -> torch.Tensor:
        rows = honest(images)
        return torch.cat((rows[:, 1:], torch.zeros_like(rows[:, :1])), 1)

    def first_twice(images: torch.Tensor) -> torch.Tensor:
        rows = honest(images)
        return torch.cat((rows[:, :1], rows[:, :-1]), 1)

    def other_class(images: torch.Tensor) -> torch.Tensor:
        rows = honest(images).clone()
        rows[:, 0, 5] = (rows[:, 0, 5] + 1) % 3
        return rows

    for wrong in (without_first, first_twice, other_class):
        network.run = wrong  # type: ignore[method-assign]
        with pytest.raises(UserError, match="differs from PyTorch"):
            compare(tiny, network, pictures, SIZE_HW, EXACT)
