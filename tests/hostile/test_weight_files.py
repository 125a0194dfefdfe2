"""Weight files made to do harm: refused by name, nothing executed, no more memory than the file has."""

import io
import operator
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from models.archive import load_content, module_state, plain_value
from models.checkpoint import read_checkpoint
from models.inert import Inert
from utils.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))  # importmode importlib knows no neighbours
from corpus import Call, archive


def named(module, name, arguments=b")"):
    """Instructions that call a global by name: proto 4, module, name, STACK_GLOBAL, arguments, REDUCE."""
    parts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + parts + b"\x93" + arguments + b"R."


def marking(marker):
    """Ways to leave a marker, and the name that the refusal must give."""
    touch = f"touch {marker}"
    text = f"open({str(marker)!r}, 'w')"
    return {
        "system": (pickle.dumps(Call(os.system, touch)), "posix.system"),
        "nested": (pickle.dumps({"model": {"ema": [Call(os.system, touch)]}}), "posix.system"),
        "eval": (pickle.dumps(Call(eval, text), 2), "builtins.eval"),
        "exec": (pickle.dumps(Call(exec, text)), "builtins.exec"),
        "open": (pickle.dumps(Call(open, str(marker), "w")), "io.open|_io.open"),
        "getattr": (named("builtins", "getattr"), "builtins.getattr"),
        "import": (named("builtins", "__import__"), "builtins.__import__"),
        "attrgetter": (pickle.dumps(operator.attrgetter("system")), "operator.attrgetter"),
        "global": (b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.", "os.system"),
        "inst": (b"(S'" + touch.encode() + b"'\nios\nsystem\n.", "os.system"),
        "obj": (b"(cos\nsystem\nS'" + touch.encode() + b"'\no.", "os.system"),
        "subprocess": (named("subprocess", "Popen"), "subprocess.Popen"),
        "partial": (named("functools", "partial"), "functools.partial"),
        "load": (named("torch", "load"), "torch.load"),
        "hub": (named("torch.hub", "load"), "torch.hub.load"),
        "jit": (named("torch.jit", "load"), "torch.jit.load"),
        "numpy": (named("numpy", "load"), "numpy.load"),
        "core": (named("numpy.core.multiarray", "fromfile"), "numpy.core.multiarray.fromfile"),
        "through a module": (named("models.yolo", "torch.load"), "models.yolo.torch.load"),
        "a function of ours": (named("models.checkpoint", "load_content"), "models.checkpoint.load_content"),
        "a layer's module": (
            named("torch.nn.modules.module", "torch.load"),
            "torch.nn.modules.module.torch.load",
        ),
        "utils": (named("utils.config.files", "Path"), "utils.config.files.Path"),
        "python 2": (b"c__builtin__\neval\n(S'" + b"1" + b"'\ntR.", "builtins.eval"),
        "path": (named("pathlib", "Path.home"), "pathlib.Path.home"),
    }


@pytest.mark.fault(
    "24 more ways to name a function in weights",
    "refused, naming the function; nothing is executed",
)
@pytest.mark.parametrize("way", marking("x"))
def test_a_file_that_asks_for_anything_else_is_refused_by_name_and_nothing_runs(tmp_path, way):
    marker = tmp_path / "marker"
    instructions, wanted = marking(marker)[way]
    path = archive(tmp_path / "bad.pt", instructions)
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: refused: it asks for ")
    assert any(f"asks for {name}," in message for name in wanted.split("|")), message
    assert not marker.exists()


def test_the_ways_would_leave_their_marker_elsewhere(tmp_path):
    """Else the test above could pass for the wrong reason."""
    for way in ("system", "eval", "exec", "open", "global", "inst", "obj", "nested"):
        marker = tmp_path / way
        found = pickle.loads(marking(marker)[way][0])
        assert marker.exists(), way
        if hasattr(found, "close"):
            found.close()


def test_a_saved_object_with_a_hook_is_refused(tmp_path):
    marker = tmp_path / "marker"
    hook = Call(os.system, f"touch {marker}")
    torch.save({"epoch": 1, "model": nn.Conv2d(1, 1, 1), "extra": hook}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"posix\.system"):
        read_checkpoint(tmp_path / "a.pt")
    assert not marker.exists()


ODD = {
    "extension registry": (b"\x80\x02\x82\x01.", "pickle instruction EXT1"),
    "persistent id as text": (b"Pabc\n.", "pickle instruction PERSID"),
    "out-of-band buffer": (b"\x80\x05\x97.", "pickle instruction NEXT_BUFFER"),
    "call of a value": (b"\x80\x02U\x01a)R.", "it calls something that is not a global"),
    "call of a record": (b"ctorch.nn.modules.conv\nConv2d\n)R)R.", "it calls something that is not a global"),
    "call of a storage": (b"ctorch\nFloatStorage\n)R.", "it calls torch.FloatStorage"),
    "attributes of a global": (b"ccollections\nOrderedDict\n}U\x01aK\x01sb.", "it sets attributes of Name"),
    "attributes of a list": (b"]}b.", "it sets attributes of list"),
    "no stop": (b"\x80\x02]", "not an intact weight file"),
    "empty stack": (b"\x80\x02R.", "not an intact weight file"),
    "no mark": (b"K\x01t.", "not an intact weight file"),
    "unknown memo": (b"h\x07.", "not an intact weight file"),
    "append to nothing": (b"a.", "not an intact weight file"),
    "append to a dict": (b"}K\x01a.", "not an intact weight file"),
    "odd dict": (b"}(K\x01u.", "not an intact weight file"),
    "list as key": (b"}]K\x01s.", "not an intact weight file"),
    "nothing at all": (b"", "not an intact weight file"),
    "no pickle": (b"hello", "not an intact weight file"),
    "numpy objects": (
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(U\x02O8tRC\x0812345678tR.",
        "a numpy array is of type O8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_odd_instructions_are_refused(tmp_path, kind):
    instructions, message = ODD[kind]
    path = archive(tmp_path / "odd.pt", instructions)
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)


def test_cut_or_changed_instructions_end_in_a_clear_error(tmp_path):
    buffer = io.BytesIO()
    torch.save({"model": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "epoch": 1}, buffer)
    with zipfile.ZipFile(buffer) as stream:
        prefix = stream.namelist()[0].split("/")[0]
        good = stream.read(f"{prefix}/data.pkl")
        count = len([name for name in stream.namelist() if f"{prefix}/data/" in name])
        records = {str(i): stream.read(f"{prefix}/data/{i}") for i in range(count)}
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        place, value = torch.randint(0, len(good), (2,), generator=generator).tolist()
        for damaged in (good[:place], good[:place] + bytes([value % 256]) + good[place + 1 :]):
            try:
                load_content(archive(tmp_path / "a.pt", damaged, records))
            except UserError as error:
                assert str(tmp_path / "a.pt") in str(error)


def storage_file(path, size, stride, offset=0, count=4, content=bytes(16), kind=b"FloatStorage"):
    """One tensor over a storage of four float32, described freely; in a module, so torch leaves it to us."""

    def numbers(values):
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\n" + kind + b"\nU\x010U\x03cpu"
        + b"\x8a\x08" + struct.pack("<q", count) + b"tQ" + b"\x8a\x08" + struct.pack("<q", offset)
        + numbers(size) + numbers(stride) + b"I00\n}tR"
    )  # fmt: skip
    module = b"ctorch.nn.modules.conv\nConv2d\n)R}U\x0b_parameters}U\x06weight" + tensor + b"ssb"
    return archive(path, b"\x80\x02}U\x05model" + module + b"s.", {"0": content})


def test_a_tensor_inside_of_its_storage_is_read(tmp_path):
    content = struct.pack("<4f", 1, 2, 3, 4)
    record = load_content(storage_file(tmp_path / "a.pt", (2, 1), (2, 1), 1, content=content))["model"]
    assert module_state(record)["weight"].tolist() == [[2], [4]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (5,), "stride": (1,)},
        {"size": (4,), "stride": (1,), "offset": 1},
        {"size": (2,), "stride": (4,)},
        {"size": (2, 2), "stride": (2, 2)},
        {"size": (1 << 40,), "stride": (0,)},
        {"size": (1 << 40, 1 << 40), "stride": (0, 0)},
        {"size": (-1,), "stride": (1,)},
        {"size": (2,), "stride": (-1,), "offset": 1},
        {"size": (1,), "stride": (1,), "offset": -1},
        {"size": (1,), "stride": (1, 1)},
        {"size": (1,) * 40, "stride": (1,) * 40},
        {"size": (1,), "stride": (1,), "count": 1 << 50},
        {"size": (1,), "stride": (1,), "count": -4},
        {"size": (1,), "stride": (1,), "count": 3},
        {"size": (1,), "stride": (1,), "content": bytes(15)},
        {"size": (1,), "stride": (1,), "kind": b"DoubleStorage"},
    ],
)
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path, wrong):
    with pytest.raises(UserError, match="not an intact weight file"):
        load_content(storage_file(tmp_path / "a.pt", **wrong))


def test_records_that_could_unfold_are_refused(tmp_path):
    path = archive(tmp_path / "bomb.pt", b"N.", {"0": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="refused: its records are compressed"):
        read_checkpoint(path)
    path = archive(tmp_path / "shared.pt", b"N.", {"0": bytes(1 << 16)})
    content = bytearray(path.read_bytes())
    # The directory at the end says where records lie: all of them at the large one, with its size.
    place, entries = content.index(b"PK\x01\x02"), []
    while content[place : place + 4] == b"PK\x01\x02":
        entries.append(place)
        place += 46 + sum(struct.unpack("<HHH", content[place + 28 : place + 34]))
    large = entries[1]
    for entry in entries:
        content[entry + 16 : entry + 28] = content[large + 16 : large + 28]
    path.write_bytes(content)
    with pytest.raises(UserError, match="larger than the file|damaged"):
        read_checkpoint(path)


@pytest.mark.fault("a TorchScript export, which contains code, used as weights", "refused for that reason")
def test_a_torchscript_export_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as out:
        for name in ("data.pkl", "constants.pkl", "code/x.py"):
            out.writestr(f"archive/{name}", b"N.")
    with pytest.raises(UserError, match="TorchScript export, which holds code"):
        read_checkpoint(tmp_path / "a.pt")


def test_an_exported_file_is_answered_with_where_to_go_from(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    with pytest.raises(UserError, match="it is an exported network.*give the .pt that it was made from"):
        read_checkpoint(tmp_path / "a.onnx")
    with zipfile.ZipFile(tmp_path / "a.torchscript", "w") as out:
        for name in ("data.pkl", "constants.pkl"):
            out.writestr(f"archive/{name}", b"N.")
    with pytest.raises(UserError, match="TorchScript export.*give the .pt that it was made from"):
        read_checkpoint(tmp_path / "a.torchscript")


def test_tensors_that_repeat_one_storage_are_refused(tmp_path):
    block = torch.zeros(1000)
    torch.save({f"model.{i}.conv.weight": block for i in range(50)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="its tensors repeat one another"):
        read_checkpoint(tmp_path / "a.pt")
    torch.save({"model.0.conv.weight": torch.zeros(1).expand(1 << 20)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a tensor reaches outside of its storage"):
        read_checkpoint(tmp_path / "a.pt")


def test_values_that_repeat_one_another_take_little_memory():
    laughs = ["ha"] * 10
    for _ in range(40):
        laughs = [laughs] * 10
    endless = {}
    endless["self"] = endless
    tracemalloc.start()
    for value in (laughs, endless):
        plain_value(value)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.fault(
    "weights that copy a list of 100,000 values 1,000 times",
    "refused for the repeated copying",
)
def test_copies_without_end_are_refused(tmp_path):
    # A set of a long list, made again and again from the list in the memo.
    numbers = b"](" + b"".join(b"J" + struct.pack("<i", i) for i in range(100_000)) + b"eq\x00"
    again = b"c__builtin__\nlist\nh\x00\x85R"
    path = archive(tmp_path / "a.pt", b"\x80\x02" + numbers + again * 1000 + b".")
    with pytest.raises(UserError, match="it copies its values over and over"):
        read_checkpoint(path)


@pytest.mark.fault("weights with 200,000 nested tuples", "refused")
def test_deep_nesting_is_no_danger(tmp_path):
    deep = b"\x80\x02)" + b"\x85" * 200_000
    for instructions in (deep + b".", b"\x80\x02}" + deep[2:] + b"K\x01s."):
        with pytest.raises(UserError):
            read_checkpoint(archive(tmp_path / "deep.pt", instructions))


@pytest.mark.fault("weights whose modules contain one another in a cycle", "reading them still ends")
def test_modules_that_contain_one_another_end(tmp_path):
    first, second = Inert("models.yolo.Model"), Inert("models.common.Conv")
    first.attributes = {"_modules": {"a": second, "b": second}, "_parameters": {"w": torch.zeros(1)}}
    second.attributes = {"_modules": {"a": first, "b": first}}
    assert len(module_state(first)) > 0


def test_attributes_of_the_wrong_kind_are_passed_over(tmp_path):
    odd = Inert("models.yolo.Model", (), {"_modules": 3, "_parameters": [1], "_buffers": {"a": "b", 3: 4}})
    assert module_state(odd) == {}
    module = b"cmodels.yolo\nModel\n)R}(U\x04yamlK\x03U\x05namesK\x04U\x08_modulesNub"
    path = archive(tmp_path / "a.pt", b"\x80\x02}U\x05model" + module + b"s.")
    saved = read_checkpoint(path)
    assert (saved.cfg, saved.names, saved.state) == ({}, [], {})
