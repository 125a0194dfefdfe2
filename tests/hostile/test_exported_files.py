"""Exported files made to do harm: refused in one line, nothing runs, memory stays bounded."""

from __future__ import annotations

import io
import json
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from models.script_code import checked_code
from models.torchscript import read_torchscript
from utils.errors import UserError
from utils.inference.facts import facts_from_texts
from utils.inference.openvino_backend import OpenVinoNetwork
from utils.inference.torchscript_backend import TorchScriptNetwork

CPU = torch.device("cpu")
LAST = b"    return "


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor(2.0)


def honest(config: str = "{}") -> bytes:
    """A TorchScript file whose code is known to the letter."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Doubling(), torch.zeros(1, 3, 8, 8))
        torch.jit.save(traced, stream, _extra_files={"config.txt": config})
    return stream.getvalue()


def changed(content: bytes, change: Callable[[str, bytes], bytes | None]) -> bytes:
    """The archive with records changed; None leaves one out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            record = change(name, old.read(name))
            if record is not None:
                new.writestr(name, record)
    return out.getvalue()


def with_code(line: str) -> bytes:
    """The archive with further lines at the start of `forward`."""

    def change(name: str, record: bytes) -> bytes | None:
        if name.endswith(".debug_pkl"):
            return None
        if name.endswith(".py"):
            assert record.count(LAST) == 1
            return record.replace(LAST, f"    {line}\n".encode() + LAST)
        return record

    return changed(honest(), change)


def read(tmp_path: Path, content: bytes) -> io.BytesIO:
    path = tmp_path / "net.torchscript"
    path.write_bytes(content)
    return read_torchscript(path)[0]


def test_an_honest_file_passes_with_what_it_says_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "net.torchscript"
    path.write_bytes(honest('{"stride": 16, "names": {"0": "a", "1": "b"}, "shape": [1, 3, 64, 32]}'))
    network = TorchScriptNetwork(path, CPU)
    assert network.names == ["a", "b"] and network.facts.stride == 16
    assert network.facts.shape == (1, 64, 32)
    assert torch.equal(network.run(torch.ones(1, 3, 64, 32)), torch.full((1, 3, 64, 32), 2.0))


@pytest.mark.parametrize(
    "names", ['{"%s": "a"}' % ("1" * 5000), "{0x%s: 'a'}" % ("f" * 5000), "{0: 0x%s}" % ("f" * 5000)]
)
def test_names_with_numbers_that_python_refuses_to_write_are_no_names(names: str) -> None:
    assert facts_from_texts({"names": names, "stride": "16"}).names == ("",)


ATTACKS = {
    "saves": 'torch.save(x, "MARKER")',
    "saves as a method": 'x.save("MARKER")',
    "saves by getattr": 'getattr(x, "save")("MARKER")',
    "saves by another name": '_0 = torch\n    _0.save(x, "MARKER")',
    "saves by an alias": '_0 = torch.save\n    _0(x, "MARKER")',
    "saves by the operators": 'ops.aten.save(x, "MARKER")',
    "maps a file": 'y = torch.from_file("MARKER", True, 8)',
    "writes an image": 'ops.image.write_file("MARKER", x)',
    "reads a file": 'y = ops.image.read_file("/etc/hostname")',
    "prints": 'print("MARKER")',
    "warns": 'torch.warn("MARKER")',
    "a class of C++": "y = __torch__.torch.classes._nnapi.Compilation()",
    "imports": "import os",
    "a lambda": "y = lambda z: z",
    "a comprehension": "y = [z for z in range(3)]",
    "calls an argument": 'x("MARKER")',
    "calls what an index gives": 'x[0]("MARKER")',
    "an escape": 'y = "\\x41"',
    "depth": f"y = {'[' * 190}x{']' * 190}",
    "a row of operators": f"y = {'-' * 5000}x",
    "no code": "y = = 3",
}


@pytest.mark.fault(
    "TorchScript code that does more than compute (file access, imports, printing and more)",
    "refused before it runs",
)
@pytest.mark.parametrize("attack", ATTACKS)
def test_code_that_does_more_than_compute_is_refused(attack: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(UserError, match="net.torchscript: refused: its code"):
        read(tmp_path, with_code(ATTACKS[attack].replace("MARKER", str(marker))))
    assert not marker.exists()


def test_such_code_would_have_run(tmp_path: Path) -> None:
    """Without the check the first attack writes its file: the tests above can fail."""
    marker = tmp_path / "marker"
    content = with_code(ATTACKS["saves"].replace("MARKER", str(marker)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(io.BytesIO(content))(torch.zeros(1))
    assert marker.exists()


def test_what_pytorch_reads_is_written_anew() -> None:
    """No byte of the code that was checked is what is loaded: two parsers cannot see two things."""
    text = "class  A(Module):\n  def forward(self: A, x: Tensor):\n    return   torch.abs( x, )\n"
    written = "class A(Module):\n\n    def forward(self: A, x: Tensor):\n        return torch.abs(x)\n"
    assert checked_code(text, "a.py") == written


@pytest.mark.fault("a TorchScript archive with duplicate, tampered, truncated or missing records", "refused")
def test_archives_that_are_not_what_they_seem_are_refused(tmp_path: Path) -> None:
    double = io.BytesIO(honest())
    with zipfile.ZipFile(double, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(next(name for name in archive.namelist() if name.endswith(".py")), b"")
    with pytest.raises(UserError, match="same name"):
        read(tmp_path, double.getvalue())

    def named(name: str, record: bytes) -> bytes:
        return (
            record.replace(b"torch._utils\n_rebuild_tensor_v2", b"os\nsystem")
            if name.endswith(".pkl")
            else record
        )

    with pytest.raises(UserError, match="refused: it asks for os.system"):
        read(tmp_path, changed(honest(), named))

    def short(name: str, record: bytes) -> bytes:
        return record[:2] if name.endswith("/constants/0") else record

    with pytest.raises(UserError, match="not an intact TorchScript file"):
        read(tmp_path, changed(honest(), short))
    with pytest.raises(UserError, match="not a TorchScript file"):
        read(tmp_path, b"PK no")
    with pytest.raises(UserError, match="no TorchScript network"):
        read(tmp_path, changed(honest(), lambda name, record: None if "constants" in name else record))


@pytest.mark.fault(
    "a TorchScript archive whose code expands to 30 MB", "refused, using less than 16 MiB of memory"
)
def test_code_that_unfolds_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("version", "data.pkl", "constants.pkl"):
            archive.writestr(f"a/{name}", b"3\n" if name == "version" else b"\x80\x02).")
        archive.writestr("a/code/__torch__.py", b"x = 1\n" * 5_000_000)
    tracemalloc.start()
    with pytest.raises(UserError, match="too long"):
        read(tmp_path, bomb.getvalue())
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


class Stating(nn.Module):
    """A network with NMS inside whose detections are known."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor([rows]))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows + 0 * x.sum()


def stating(path: Path, *rows: list[float]) -> TorchScriptNetwork:
    facts = {"names": ["a", "b"], "shape": [1, 3, 32, 32]}
    facts["nms"] = {"conf_thres": 0.1, "iou_thres": 0.5, "max_det": len(rows)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Stating(list(rows)), torch.zeros(1, 3, 32, 32))
        torch.jit.save(traced, str(path), _extra_files={"config.txt": json.dumps(facts)})
    return TorchScriptNetwork(path, CPU)


@pytest.mark.fault(
    "an exported network that outputs a class id without a name", "refused, naming the class id"
)
@pytest.mark.parametrize("label", [2.0, 5.0, -1.0, float("nan"), float("inf")])
def test_classes_without_a_name_are_refused(label: float, tmp_path: Path) -> None:
    network = stating(tmp_path / "net.torchscript", [1, 2, 3, 4, 0.9, 1], [1, 2, 3, 4, 0.8, label])
    with pytest.raises(UserError, match=rf"net.torchscript: gives class {label:g} and has names for 0 to 1"):
        network.probe()
    network.keep_classes([1], ["b"])  # then only known ones are left
    assert network(torch.zeros(1, 3, 32, 32))[0, :, 4:].tolist()[1][0] == 0


def test_padding_has_any_class(tmp_path: Path) -> None:
    network = stating(tmp_path / "net.torchscript", [1, 2, 3, 4, 0.9, 1], [0, 0, 0, 0, 0, -1])
    network.probe()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 2, 6)


XML = '<?xml version="1.0"?>\n<net name="a" version="11"></net>'


@pytest.fixture
def openvino(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for the package: knows what it was given to read, and gives a network of a fixed shape."""
    sides = [SimpleNamespace(is_static=True, get_length=lambda side=side: side) for side in (1, 3, 64, 32)]
    stub = SimpleNamespace(given=[])

    class Core:
        def read_model(self, model: bytes, weights: bytes) -> SimpleNamespace:
            stub.given.append((model, weights))
            return SimpleNamespace(inputs=[SimpleNamespace(partial_shape=sides)])

        def compile_model(self, model: object, device: str, config: object) -> object:
            return model

    stub.Core = Core
    monkeypatch.setitem(sys.modules, "openvino", stub)
    return stub


def openvino_folder(folder: Path, xml: bytes) -> Path:
    (folder / "a.xml").write_bytes(xml)
    (folder / "a.bin").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("xml", [XML, XML.replace("?>", ' encoding="UTF-8"?>'), XML[22:], "\ufeff" + XML])
def test_openvino_gets_the_very_bytes_that_were_checked(
    xml: str, tmp_path: Path, openvino: SimpleNamespace
) -> None:
    network = OpenVinoNetwork(openvino_folder(tmp_path, xml.encode()))
    assert openvino.given == [(xml.encode(), b"weights")]
    assert network.facts.shape == (1, 64, 32)


ENTITIES = XML.replace("?>", '?><!DOCTYPE net [<!ENTITY a "b">]>')


@pytest.mark.fault(
    "an OpenVINO XML file that defines entities, is not in UTF-8 or is no network",
    "refused before OpenVINO reads it",
)
@pytest.mark.parametrize(
    ("xml", "words"),
    [
        (ENTITIES.encode(), "it defines entities"),
        (ENTITIES.replace("<!D", "<!\n d").encode(), "it defines entities"),
        *((ENTITIES.encode(name), "its text is not UTF-8") for name in ("utf-16", "utf-16-le", "utf-32-be")),
        (XML.replace("?>", " encoding='utf-7'?>").encode(), "its text is not UTF-8"),
        (b"\x08\x07" + XML.encode(), "it is not an OpenVINO network"),
        (b"", "it is not an OpenVINO network"),
    ],
)
def test_xml_with_entities_in_any_encoding_is_refused(
    xml: bytes, words: str, tmp_path: Path, openvino: SimpleNamespace
) -> None:
    with pytest.raises(UserError, match=f"a.xml: refused: {words}; export it again"):
        OpenVinoNetwork(openvino_folder(tmp_path, xml))
    assert not openvino.given


def test_an_openvino_network_without_its_weights_is_named(tmp_path: Path, openvino: SimpleNamespace) -> None:
    (openvino_folder(tmp_path, XML.encode()) / "a.bin").unlink()
    with pytest.raises(UserError, match=r"a\.bin: cannot be read \(No such file"):
        OpenVinoNetwork(tmp_path)


def onnx_model(**changes):
    """A small ONNX network as onnx's own object: one node, one weight."""
    onnx = pytest.importorskip("onnx", reason="onnx is missing: make dev")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(
        changes.get("operator", "Mul"), ["images", "w"], ["output0"], domain=changes.get("domain", "")
    )
    weight = helper.make_tensor("w", kind, [1], [2.0])
    if "location" in changes:
        weight.ClearField("float_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=changes["location"])
    shape = ["batch", 3, "height", "width"]
    values = [helper.make_tensor_value_info(name, kind, shape) for name in ("images", "output0")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [weight])
    if changes.get("nested"):
        inner = helper.make_graph(
            [helper.make_node("PyOp", [], ["y"], domain="ai.onnx.contrib")], "i", [], []
        )
        graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
    imports = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


@pytest.mark.fault(
    "an ONNX file with custom operators, or with external data outside its folder",
    "refused, naming the operator or the path",
)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"domain": "ai.onnx.contrib", "operator": "PyOp"}, "operator ai.onnx.contrib.PyOp"),
        ({"domain": "com.microsoft", "operator": "EPContext"}, "operator com.microsoft.EPContext"),
        ({"nested": True}, "operator ai.onnx.contrib.PyOp"),
        ({"location": "/etc/hostname"}, "'/etc/hostname', which is not a file beside it"),
        ({"location": "../secret.bin"}, "'../secret.bin', which is not a file beside it"),
        ({"location": "link.bin"}, "'link.bin', which is not a file beside it"),
        ({"location": ""}, "which is not a file beside it"),
    ],
)
def test_onnx_files_that_ask_for_more_than_computing_are_refused(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    from utils.inference.onnx_backend import checked_onnx

    (tmp_path / "secret.bin").write_bytes(bytes(4))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = folder / "net.onnx"
    path.write_bytes(onnx_model(**changes).SerializeToString())
    with pytest.raises(UserError, match="net.onnx: refused") as refusal:
        checked_onnx(path)
    assert words in str(refusal.value)


def test_an_onnx_file_with_weights_beside_it_runs(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is missing: make dev")
    from utils.inference.onnx_backend import OnnxNetwork, checked_onnx

    path = tmp_path / "net.onnx"
    path.write_bytes(onnx_model(location="w.bin").SerializeToString())
    (tmp_path / "w.bin").write_bytes(b"\0\0\0\x40")
    assert checked_onnx(path) is None
    network = OnnxNetwork(path, CPU)
    assert torch.equal(network.run(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 2.0))
    path.write_bytes(b"no protobuf at all")
    with pytest.raises(UserError, match="not an intact ONNX file"):
        checked_onnx(path)


@pytest.mark.parametrize(
    "stated",
    [
        {"names": "__import__('os').system('x')", "stride": "10**10**10"},
        {"names": [["a"]] * 3, "stride": -1, "shape": [1, 3, 10**9, "x"], "nms": {"conf_thres": "a"}},
        {"names": {"0": 1, "x": []}, "stride": True, "shape": 7, "nms": []},
        [1, 2],
    ],
)
def test_metadata_are_plain_values_or_nothing(stated: object, tmp_path: Path) -> None:
    path = tmp_path / "net.torchscript"
    path.write_bytes(honest(json.dumps(stated)))
    facts = TorchScriptNetwork(path, CPU).facts
    assert facts.stride == 32 and facts.nms is None and facts.size_hw is None
    assert all(isinstance(name, str) for name in facts.names)
