"""Small weight files whose parts hold one another: little memory, little time, whatever they unfold to.

Each is read in a fork with limits of its own, which keep the machine alive where a guard fails.
"""

from __future__ import annotations

import copyreg
import io
import os
import pathlib
import pickle
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from models.archive import module_state, plain_value
from models.checkpoint import build_model, read_checkpoint
from models.common import Conv
from models.inert import Inert
from models.yolo import Model
from utils.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))  # importmode importlib knows no neighbours
from corpus import Call, archive, doubled, own_file

MEGABYTES, SECONDS = 400, 20
SCALAR, RECONSTRUCT = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
TWICE = doubled(60)


class Made(Call):
    """Pickles as a call whose result then gets a state."""

    def __init__(self, function, *arguments, state):
        super().__init__(function, *arguments)
        self.state = state

    def __reduce__(self):
        return (*self.call, self.state)


class Stored:
    """Pickles as a storage that the file names."""

    def __init__(self, kind=torch.FloatStorage, key="0", count=4):
        self.name = "storage", kind, key, "cpu", count


class Writer(pickle.Pickler):
    def persistent_id(self, value):
        return value.name if isinstance(value, Stored) else None


def instructions(value: object) -> bytes:
    buffer = io.BytesIO()
    Writer(buffer, 2).dump(value)
    return buffer.getvalue()


def tensor(*size: int, storage: Stored | None = None) -> Call:
    strides = tuple(1 for _ in size)
    return Call(_rebuild_tensor_v2, storage or Stored(), 0, size, strides, False, {})


def module(**attributes: object) -> Made:
    return Made(Conv, state={f"_{name}": value for name, value in attributes.items()})


def network(count: int, child: Callable[[int], object]) -> dict[str, object]:
    names = [f"{number:x}" for number in range(count)]
    return {"model": Made(Model, state={"_modules": {name: child(n) for n, name in enumerate(names)}})}


def beside(value: object) -> dict[str, object]:
    """A file with a network, and one more value."""
    return {"state_dict": {"model.0.conv.weight": tensor(4)}, "x": value}


def array(kind: str, content: bytes, shape: object = (1,)) -> Made:
    state = 1, shape, np.dtype(kind), False, content
    return Made(RECONSTRUCT, np.ndarray, (0,), b"b", state=state)


def shared_parameters() -> dict[str, object]:
    weights = {f"{number:x}": None for number in range(100_000)}
    return network(50_000, lambda _, state={"_parameters": weights}: Made(Conv, state=state))


def shared_weights() -> dict[str, object]:
    child, weight = module(parameters={}), tensor(4)
    child.state["_parameters"] |= {f"{number:x}": weight for number in range(50_000)}
    return network(2_000, lambda _: child)


def shared_children() -> dict[str, object]:
    children = {f"{number:x}": None for number in range(100_000)}
    return network(50_000, lambda _, state={"_modules": children}: Made(Conv, state=state))


def unused_files() -> dict[str, object]:
    names = [f"{number:x}" for number in range(200_000)]
    buffers = dict.fromkeys(names)
    return network(1, lambda _: module(buffers=buffers, non_persistent_buffers_set=[*map(str.upper, names)]))


def repeated(value: object, times: int = 16_000) -> dict[str, object]:
    return beside([value] * times)


def number_as_key() -> bytes:
    """Entries of a dict under one number of 7 MB."""
    number = b"\x8b" + (7 << 20).to_bytes(4, "little") + bytes((7 << 20) - 1) + b"\1"
    return b"\x80\x02" + number + b"q\x000}(" + b"h\x00N" * 300_000 + b"u."


def long_names() -> bytes:
    """One class with a name of 3 MB, over and over."""
    texts = b"".join(
        b"X" + len(text).to_bytes(4, "little") + text + b"q" + bytes([number]) + b"0"
        for number, text in enumerate((b"models." + b"a" * (3 << 20), b"A"))
    )
    return b"\x80\x04" + texts + b"h\x00h\x01\x930" * 800_000 + b"N."


BOMBS: dict[str, Callable[[], object]] = {
    "a path's part": lambda: Call(pathlib.PosixPath, TWICE),
    "an object's class": lambda: Call(copyreg._reconstructor, TWICE),
    "a numpy type": lambda: Call(SCALAR, Call(np.dtype, TWICE), bytes(8)),
    "a numpy type's order": lambda: Call(SCALAR, Made(np.dtype, "f8", state=(3, TWICE)), bytes(8)),
    "a storage's key": lambda: Stored(key=TWICE),
    "a storage's kind": lambda: Stored(kind=TWICE, key=TWICE),
    "a weight's name": lambda: {Made(Model, TWICE, state={"x": TWICE}): tensor(4)},
    "the key of a value": lambda: {**beside(1), Made(Model, TWICE, state={"x": TWICE}): 1},
    "a tensor of nothing": lambda: {**beside(1), "names": tensor(1 << 40, 0)},
    "a head of nothing": lambda: {"model.0.m.0.weight": tensor(1 << 40, 0)},
    "arrays": lambda: repeated(array("u1", bytes(60_000))),
    "tensors": lambda: repeated(tensor(16_000, storage=Stored(key="1", count=16_000))),
    "keys that are passed over": lambda: repeated({float(number): None for number in range(200_000)}),
    "parameters of many": shared_parameters,
    "weights of many": shared_weights,
    "children of many": shared_children,
    "buffers that are passed over": unused_files,
    "a number as a key": number_as_key,
    "long names": long_names,
    "sets": lambda: b"\x80\x04" + b"\x8f" * (7 << 20) + b".",
}


def read_in_a_fork(path: Path) -> tuple[int, int]:
    """The exit code, 0 for files that are read or refused, and how much the process grew, in bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = os.fork()
    if child == 0:
        code = 1
        try:
            room = 3 << 30
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            build_model(read_checkpoint(path))
            code = 0
        except UserError as error:
            code = 0 if len(str(error)) < 2000 else 3
        except BaseException as error:
            print(f"{type(error).__name__}: {error}"[:500], file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), max(usage.ru_maxrss - before, 0) * 1024


@pytest.mark.fault(
    "small weight files with shared or nested values that expand enormously, in 20 places: "
    "paths, types, keys, sizes, modules and more",
    "read or refused, within 20 s of CPU time and 400 MiB of memory",
)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_takes_little_memory_and_time(name, tmp_path):
    made = BOMBS[name]()
    content = made if isinstance(made, bytes) else instructions(made)
    path = archive(tmp_path / "w.pt", content, {"0": bytes(16), "1": bytes(64_000)})
    code, grown = read_in_a_fork(path)
    assert code == 0 and grown < MEGABYTES << 20, f"{code}, {grown >> 20} MiB"


def test_text_that_is_repeated_is_taken_over_up_to_a_million_characters():
    page = "x" * 50_000
    found = plain_value({"notes": [page] * 16_000, page * 40: 1})
    assert found["notes"][0] == page and len(found) == 1
    assert sum(len(text) for text in found["notes"] if text) <= 1 << 20


def test_a_long_name_neither_becomes_longer_nor_hides_others():
    weight = torch.zeros(1)
    child = Inert("models.common.Conv", (), {"_parameters": {"w" * 5000: weight, "w": weight}})
    assert list(module_state(Inert("models.yolo.Model", (), {"_modules": {"m": child}}))) == ["m.w"]


@pytest.mark.fault(
    "weights with out-of-range numbers, values of the wrong type, or a head weight without dimensions",
    "refused with a short error (under 1,000 characters)",
)
@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": float("inf")},
        {"best_fitness": 10**400},
        {"best_fitness": "x" * 5000},
        {"model": 3},
        {"model": {"model.0.m.0.weight": torch.tensor(1.0)}},
        {"model": {"y" * 5000: torch.tensor(float("nan"))}},
        {"model": {"y" * 5000: torch.tensor(1.0)}},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_values_of_the_wrong_size_are_refused_in_one_short_line(changes, tmp_path):
    with pytest.raises(UserError) as caught:
        build_model(read_checkpoint(own_file(tmp_path / "w.pt", **changes)))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "value",
    [
        array("O", b"12345678"),
        array("u1", b"12", (2,)),
        array("f8", b"123"),
        tensor(2, 0),
        Call(SCALAR, np.dtype("f4"), b"\0\0\x80?"),
    ],
    ids=["objects", "bytes", "cut off", "nothing", "a number"],
)
def test_what_has_no_plain_form_is_left_out(value, tmp_path):
    path = archive(tmp_path / "w.pt", instructions({**beside(value), "names": value}), {"0": bytes(16)})
    found = read_checkpoint(path)
    assert found.meta["x"] in (None, [], 1.0, [1.0], [49, 50]) and len(found.names) in (0, 2)


def test_a_parameter_without_dimensions_is_read(tmp_path):
    model = torch.nn.Module()
    model.gain = torch.nn.Parameter(torch.tensor(2.0))
    torch.save({"model": model}, tmp_path / "w.pt")
    assert read_checkpoint(tmp_path / "w.pt").state["model.gain"] == 2
