"""Files made to do harm, and the command that meets each: written into a folder, nothing is kept.

The only payload is a file `marker`, which must not be there afterwards.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PosixPath

import cv2
import numpy as np
import torch

from utils.training.state import VERSION

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "data/images/generated0.jpg"
NETWORK = ROOT / "models/yolov5n.yaml"
HEAD = "path: set\ntrain: images/train\nval: images/val\n"


@dataclass(frozen=True)
class Case:
    """A hostile input.

    what, happens: for docs/reliability.md. make: writes the files into a folder and gives the command
    line. words: stand in the one line that the command ends with.
    """

    what: str
    happens: str
    make: Callable[[Path], list[str]]
    words: tuple[str, ...]


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(path: Path, instructions: bytes, records=None, compression=zipfile.ZIP_STORED) -> Path:
    """A zip as torch.save lays it out, around any instructions."""
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("archive/data.pkl", instructions)
        for name, content in (records or {}).items():
            out.writestr(name if "/" in name else f"archive/data/{name}", content)
        out.writestr("archive/version", "3\n")
    return path


def touch(folder: Path) -> str:
    return f"touch {folder / 'marker'}"


def own_file(path: Path, **changes: object) -> Path:
    """The demo student's weights with some of the file's values replaced."""
    content = torch.load(ROOT / "weights/demo_student.pt", weights_only=True)
    torch.save({**content, **changes}, path)
    return path


def laughs(depth: int) -> list[object]:
    """Ten lists of ten lists of ... : 10 ** depth values of a few bytes."""
    value: list[object] = ["ha"] * 10
    for _ in range(depth):
        value = [value] * 10
    return value


def doubled(depth: int) -> list[object]:
    """A list of a list twice, and so on: 2 ** depth values in a few bytes."""
    value: list[object] = []
    for _ in range(depth):
        value = [value, value]
    return value


def tensor_over(size: int, stride: int, count: int = 4) -> bytes:
    """Instructions for a float32 tensor over a storage of 16 bytes, described freely."""

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    return (
        b"\x80\x02}U\x11model.conv.weightctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\n"
        b"U\x010U\x03cpu" + number(count) + b"tQ" + number(0) + number(size) + b"\x85" + number(stride)
        + b"\x85I00\n}tRs."
    )  # fmt: skip


def png(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(100_000), 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


def small_set(folder: Path, names: str = "[a, b]") -> Path:
    """Two images in each split, each with a box; gives the YAML."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / "set" / kind / split).mkdir(parents=True)
        for number in range(2):
            cv2.imwrite(str(folder / f"set/images/{split}/{number}.png"), np.full((64, 64, 3), 90, np.uint8))
            (folder / f"set/labels/{split}/{number}.txt").write_text("1 .5 .5 .4 .4\n")
    yaml = folder / "set.yaml"
    yaml.write_text(HEAD + f"names: {names}\n", encoding="utf-8")
    return yaml


def detect(weights: Path, source: Path = PICTURE) -> list[str]:
    return ["detect.py", "--weights", str(weights), "--source", str(source)]


def train(data: Path, *more: str, cfg: Path = NETWORK) -> list[str]:
    words = ["--data", str(data), "--cfg", str(cfg), "--weights", "", "--workers", "0", "--img", "64"]
    return ["train.py", *words, "--epochs", "1", "--noplots", *more]


def weights_of(instructions: Callable[[Path], bytes], **records: bytes) -> Callable[[Path], list[str]]:
    return lambda folder: detect(archive(folder / "w.pt", instructions(folder), records))


def nested(folder: Path) -> bytes:
    inner = Call(dict, [("x", Call(os.system, touch(folder)))])
    return pickle.dumps({"ema": None, "model": {"a": [({"b": inner},)]}})


def legacy(folder: Path) -> list[str]:
    (folder / "w.pt").write_bytes(pickle.dumps({"model": Call(os.system, touch(folder))}, 2))
    return detect(folder / "w.pt")


def getattr_chain(folder: Path) -> bytes:
    """getattr(__import__("os"), "system")("touch ...")."""
    found = b"c__builtin__\ngetattr\nc__builtin__\n__import__\nU\x02os\x85RU\x06system\x86R"
    command = touch(folder).encode()
    return b"\x80\x02" + found + b"X" + struct.pack("<I", len(command)) + command + b"\x85R."


def shared_records(folder: Path) -> list[str]:
    """All records of the directory point at the largest one."""
    path = archive(folder / "w.pt", b"N.", {"0": bytes(1 << 16)})
    content = bytearray(path.read_bytes())
    place, entries = content.index(b"PK\x01\x02"), []
    while content[place : place + 4] == b"PK\x01\x02":
        entries.append(place)
        place += 46 + sum(struct.unpack("<HHH", content[place + 28 : place + 34]))
    for entry in entries:
        content[entry + 16 : entry + 28] = content[entries[1] + 16 : entries[1] + 28]
    path.write_bytes(content)
    return detect(path)


def traversing(folder: Path) -> list[str]:
    records = {f"../{'../' * up}escaped": b"x" for up in range(3)} | {f"{folder}/absolute": b"x"}
    return detect(archive(folder / "w.pt", b"}.", records))


def compressed(folder: Path) -> list[str]:
    return detect(archive(folder / "w.pt", b"N.", {"0": bytes(1 << 30)}, zipfile.ZIP_DEFLATED))


def many_lists(folder: Path) -> list[str]:
    return detect(archive(folder / "w.pt", b"\x80\x02" + b"]" * (60 << 20) + b"."))


def hostile_state(folder: Path) -> list[str]:
    (folder / "run/weights").mkdir(parents=True)
    torch.save({"run": Call(os.system, touch(folder))}, folder / "run/weights/state.pt")
    return ["train.py", "--resume", str(folder / "run")]


def stretched_state(folder: Path) -> list[str]:
    (folder / "run/weights").mkdir(parents=True)
    archive(folder / "run/weights/state.pt", tensor_over(1 << 20, 1 << 20), {"0": bytes(16)})
    return ["train.py", "--resume", str(folder / "run")]


def state_of_numbers(folder: Path) -> list[str]:
    (folder / "run/weights").mkdir(parents=True)
    parts = dict.fromkeys(("model", "losses", "ema", "optimizer", "scaler", "pending", "done", "meters"), 1)
    torch.save({"version": VERSION, "run": {"epoch": "many"}, **parts}, folder / "run/weights/state.pt")
    return ["train.py", "--resume", str(folder / "run")]


HUGE = {
    "nc": 2,
    "anchors": 3,
    "backbone": [[-1, 1, "Conv", [8, 3, 4]], *([-1, 1, "Conv", [8192, 1, 2 - n % 2]] for n in range(15))],
    "head": [[[15], 1, "Detect", ["nc", "anchors"]]],
}


def huge_student(folder: Path) -> list[str]:
    plain = train(small_set(folder), "--weights", str(own_file(folder / "w.pt", cfg=HUGE)))
    return [word for word in plain if word not in ("--cfg", str(NETWORK))]


def huge_state(folder: Path) -> list[str]:
    """A state of the right form; all that is wrong is the description of its network."""
    (folder / "run/weights").mkdir(parents=True)
    run = {
        "epoch": 0, "best_fitness": -1.0, "best_epoch": 0, "class_scores": [0.0, 0.0], "kind": "TrainOptions",
        "options": {"data": str(small_set(folder)), "imgsz": 64, "workers": 0}, "network": HUGE,
        "names": ["a", "b"], "hyp": {}, "data": "",
    }  # fmt: skip
    content = {"version": VERSION, "run": run, "done": 0, "pending": 0, "ema_updates": 0, "meters": []}
    torch.save({**content, "model": {"model.0.conv.weight": torch.ones(1)}}, folder / "run/weights/state.pt")
    return ["train.py", "--resume", str(folder / "run")]


def one_hash(folder: Path) -> bytes:
    """A dict of 100,000 numbers that all have the hash 0: each is compared with all before it."""
    numbers = (number * ((1 << 61) - 1) for number in range(1, 100_001))
    listed = (b"\x8a\x0b" + number.to_bytes(11, "little") + b"N" for number in numbers)
    return b"\x80\x02}(" + b"".join(listed) + b"u."


def list_of(make: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """A set whose training split is a list that is none."""

    def made(folder: Path) -> list[str]:
        data = small_set(folder)
        make(folder / "set/list.txt")
        data.write_text(data.read_text().replace("train: images/train", "train: list.txt"))
        return train(data)

    return made


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terabyte(path: Path) -> None:
    with open(path, "wb") as stream:
        stream.truncate(1 << 40)


def claimed_elsewhere(folder: Path) -> list[str]:
    """A run whose lock is a link to a file that is not there, outside of the folder."""
    (folder / "run/weights").mkdir(parents=True)
    (folder / "run/.lock").symlink_to(folder / "marker")
    (folder / "run/weights/state.pt").write_bytes(b"PK")
    return ["train.py", "--resume", str(folder / "run")]


def with_system(script: str, option: str) -> Callable[[Path], list[str]]:
    """The weights that call os.system, where another script reads weights."""

    def make(folder: Path) -> list[str]:
        weights = archive(folder / "w.pt", pickle.dumps({"model": Call(os.system, touch(folder))}))
        data = small_set(folder)
        if script == "test.py":
            return [script, "--data", str(data), option, str(weights)]
        plain = train(data, option, str(weights))
        return [script, *plain[1:]]

    return make


def tag(folder: Path) -> str:
    return f"!!python/object/apply:os.system ['{touch(folder)}']"


def data_yaml(text: Callable[[Path], str]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        path = small_set(folder)
        path.write_text(HEAD + text(folder))
        return train(path)

    return make


def other_yaml(option: str, text: Callable[[Path], str]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        path = folder / "other.yaml"
        path.write_text(text(folder))
        return train(small_set(folder), option, str(path))

    return make


def bomb(line: str, last: str) -> str:
    """Aliases of aliases; `line` has the name and the ten words that stand for the one before."""
    lines = ["a0: &a0 {x: [lol, lol]}"]
    for number in range(1, 10):
        name = last if number == 9 else f"a{number}"
        words = ", ".join([f"*a{number - 1}"] * 10)
        lines.append(line.format(name=name, number=number, words=words))
    return "\n".join(lines) + "\n"


def labels_of(change: Callable[[Path, Path], None]) -> Callable[[Path], list[str]]:
    """A set in which one image or label file of the training split was changed."""

    def make(folder: Path) -> list[str]:
        data = small_set(folder)
        change(folder / "set/images/train/0.png", folder / "set/labels/train/0.txt")
        return train(data)

    return make


def pipe_as_label(_image: Path, label: Path) -> None:
    label.unlink()
    os.mkfifo(label)


def list_outside(folder: Path) -> list[str]:
    data = small_set(folder)
    lines = "/dev/zero", "/etc/passwd", "../../../../../../../../../etc/hostname", "images/train/0.png"
    (folder / "set/list.txt").write_text("\n".join(lines))
    data.write_text(data.read_text().replace("train: images/train", "train: list.txt"))
    return train(data, "--check-data")


def splits_outside(folder: Path) -> list[str]:
    data = small_set(folder, "[a]")
    (folder / "outside").mkdir()
    for kind in ("images", "labels"):
        (folder / "set" / kind / "train").rename(folder / "outside" / kind)
    data.write_text(data.read_text().replace("train: images/train", f"train: {folder}/outside/images"))
    return train(data)


def voc_with(start: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        base = folder / "set"
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (base / name).mkdir(parents=True)
        cv2.imwrite(str(base / "JPEGImages/a.jpg"), np.full((64, 64, 3), 90, np.uint8))
        text = f"{start}<annotation><object><name>&b;</name></object></annotation>"
        (base / "Annotations/a.xml").write_text(text)
        (base / "ImageSets/Main/all.txt").write_text("a\n")
        data = folder / "set.yaml"
        every = "ImageSets/Main/all.txt"
        data.write_text(f"path: set\nlayout: voc\ntrain: {every}\nval: {every}\nnames: [a]\n")
        return train(data)

    return make


def claiming_picture(folder: Path) -> list[str]:
    (folder / "a.png").write_bytes(png(60_000, 20_000))
    return detect(ROOT / "weights/demo_student.pt", folder / "a.png")


ENTITIES = (
    "<!DOCTYPE a [<!ENTITY b0 'ha'>"
    + "".join(f"<!ENTITY b{n} '{f'&b{n - 1};' * 10}'>" for n in range(1, 10))
    + "<!ENTITY b '&b9;'>]>"
)
REFUSED = "refused, naming the function; nothing is executed"
NO_MEMORY = "refused before memory is allocated"
CASES = {
    "weights: os.system": Case(
        "weights that call `os.system`",
        REFUSED,
        weights_of(lambda folder: pickle.dumps(Call(os.system, touch(folder)))),
        ("refused", "posix.system"),
    ),
    "weights: eval": Case(
        "weights that call `eval`",
        REFUSED,
        weights_of(lambda folder: pickle.dumps(Call(eval, f"open({str(folder / 'marker')!r}, 'w')"))),
        ("refused", "builtins.eval"),
    ),
    "weights: getattr": Case(
        "weights that reach `os.system` through `builtins.getattr`",
        REFUSED,
        weights_of(getattr_chain),
        ("refused", "builtins.getattr"),
    ),
    "weights: nested": Case(
        "weights with a function call nested in containers and other calls",
        REFUSED,
        weights_of(nested),
        ("refused", "posix.system"),
    ),
    "weights: bare pickle": Case(
        "weights that are a bare pickle",
        "refused outright; nothing is executed",
        legacy,
        ("bare pickle",),
    ),
    "test.py": Case(
        "weights that call `os.system`, given to `test.py`",
        REFUSED,
        with_system("test.py", "--weights"),
        ("posix.system",),
    ),
    "train.py": Case(
        "weights that call `os.system`, given to `train.py`",
        REFUSED,
        with_system("train.py", "--weights"),
        ("posix.system",),
    ),
    "train_distill.py": Case(
        "weights that call `os.system`, given to `train_distill.py` as the teacher",
        REFUSED,
        with_system("train_distill.py", "--teacher"),
        ("posix.system",),
    ),
    "state": Case(
        "a run's `state.pt` that calls `os.system`, given to `--resume`",
        "refused, naming the function; nothing is executed",
        hostile_state,
        ("state.pt", "posix.system"),
    ),
    "state: stride": Case(
        "a `state.pt` with strides beyond its storage",
        NO_MEMORY,
        stretched_state,
        ("state.pt", "not an intact weight file"),
    ),
    "state: wrong parts": Case(
        "a `state.pt` whose parts are of the wrong type",
        "one-line error; the run folder is unchanged",
        state_of_numbers,
        ("state.pt", "not an intact run state"),
    ),
    "weights: oversize tensor": Case(
        "weights with a tensor of 4 PB over 16 bytes of data",
        NO_MEMORY,
        weights_of(lambda _: tensor_over(1 << 50, 1, 1 << 50), **{"0": bytes(16)}),
        ("not an intact weight file",),
    ),
    "weights: stride": Case(
        "weights with strides beyond the storage",
        NO_MEMORY,
        weights_of(lambda _: tensor_over(4, 1 << 40), **{"0": bytes(16)}),
        ("reaches outside of its storage",),
    ),
    "weights: repeated": Case(
        "weights with a stride-0 tensor: 4 TB from a single number",
        NO_MEMORY,
        weights_of(lambda _: tensor_over(1 << 40, 0), **{"0": bytes(16)}),
        ("reaches outside of its storage",),
    ),
    "weights: zip bomb": Case(
        "weights with compressed records, 1 GB in 1 MB",
        NO_MEMORY,
        compressed,
        ("its records are compressed",),
    ),
    "weights: shared records": Case(
        "weights whose records overlap",
        "refused",
        shared_records,
        ("w.pt",),
    ),
    "weights: traversal": Case(
        "weights with records named `../../x` or `/x`",
        "refused as no network; no file is written",
        traversing,
        ("holds no network",),
    ),
    "weights: instructions": Case(
        "weights with 60 MB of pickle instructions that create lists",
        NO_MEMORY,
        many_lists,
        ("instructions are longer",),
    ),
    "weights: names": Case(
        "weights whose class names are nested shared lists of 10^31 values",
        "refused, using less than 400 MiB of memory",
        lambda folder: detect(own_file(folder / "w.pt", cfg={"nc": laughs(30)}, names=laughs(30))),
        ("w.pt",),
    ),
    "weights: path": Case(
        "weights of 700 bytes with a path object that expands to 10^18 values",
        NO_MEMORY,
        weights_of(lambda _: pickle.dumps(Call(PosixPath, doubled(60)), 2)),
        ("not an intact weight file", "a path is made of what is not text"),
    ),
    "weights: network": Case(
        "weights whose network has a billion layers",
        "refused before the network is built",
        lambda folder: detect(
            own_file(
                folder / "w.pt",
                cfg={
                    "nc": 2,
                    "depth_multiple": 1.0,
                    "width_multiple": 1.0,
                    "anchors": 3,
                    "backbone": [[-1, 10**9, "Conv", [8, 3, 2]]],
                    "head": [[[0], 1, "Detect", ["nc", "anchors"]]],
                },
            )
        ),
        ("repeats are more than",),
    ),
    "weights: one hash": Case(
        "weights with 100,000 integer keys that all have the same hash",
        "refused instead of taking hours",
        weights_of(one_hash),
        ("bits is a key",),
    ),
    "weights: huge network": Case(
        "weights of 1 MB whose network would take gigabytes, given to `train.py`",
        "refused before the network is built: the weights do not match it",
        huge_student,
        ("w.pt", "not those of its network"),
    ),
    "state: huge network": Case(
        "a run's `state.pt` whose network would take gigabytes",
        "refused before the network is built: the weights do not match it",
        huge_state,
        ("state.pt", "not those of its network"),
    ),
    "state: lock": Case(
        "a run folder whose lock file is a symlink to a path outside",
        "refused; no file is created there",
        claimed_elsewhere,
        ("cannot be written into",),
    ),
    "cfg: parameters": Case(
        "a network YAML with more than a billion parameters",
        NO_MEMORY,
        other_yaml("--cfg", lambda _: str({**HUGE, "backbone": [[-1, 1, "Conv", [16384, 999, 2]]] * 16})),
        ("layer 0", "more than 1,073,741,824 parameters"),
    ),
    "data: one hash": Case(
        "a dataset YAML with integer keys that all have the same hash",
        "refused with the line number instead of taking hours",
        data_yaml(
            lambda _: f"names: {{{', '.join(f'{n * ((1 << 61) - 1)}: a' for n in range(1, 12_000))}}}\n"
        ),
        ("line 4", "digits"),
    ),
    "list: pipe": Case(
        "a named pipe without a writer in place of an image list",
        "refused by file name, without blocking",
        list_of(os.mkfifo),
        ("list.txt", "it is not a regular file"),
    ),
    "list: endless": Case(
        "an image list that is a symlink to `/dev/zero`",
        "refused by file name, without being read",
        list_of(endless),
        ("list.txt", "it is not a regular file"),
    ),
    "list: sparse": Case(
        "an image list of 1 TB",
        "refused as larger than 256 MiB, before memory is allocated",
        list_of(terabyte),
        ("list.txt", "it has more than 256 MiB"),
    ),
    "data: tag": Case(
        "a dataset YAML with `!!python/object/apply:os.system`",
        "refused with the line number; nothing is executed",
        data_yaml(lambda folder: f"names: {tag(folder)}\n"),
        ("line 4", "python/object/apply"),
    ),
    "cfg: tag": Case(
        "a network YAML with `!!python/object/apply:os.system`",
        "refused with the line number; nothing is executed",
        other_yaml("--cfg", lambda folder: f"nc: {tag(folder)}\n"),
        ("line 1", "python/object/apply"),
    ),
    "hyp: tag": Case(
        "a hyperparameter YAML with `!!python/object/apply:os.system`",
        "refused with the line number; nothing is executed",
        other_yaml("--hyp", lambda folder: f"lr0: {tag(folder)}\n"),
        ("line 1", "python/object/apply"),
    ),
    "data: laughs": Case(
        'a dataset YAML whose aliases expand to a billion names ("billion laughs")',
        NO_MEMORY,
        data_yaml(lambda _: bomb("{name}: &a{number} [{words}]", "names")),
        ("unfold to more than",),
    ),
    "hyp: merges": Case(
        "a hyperparameter YAML whose merge keys (`<<`) expand to a billion keys",
        NO_MEMORY,
        other_yaml("--hyp", lambda _: bomb("{name}: &a{number} {{<<: [{words}]}}", "lr0")),
        ("unfold to more than",),
    ),
    "cfg: laughs": Case(
        "a network YAML whose aliases expand to a billion layers",
        NO_MEMORY,
        other_yaml("--cfg", lambda _: bomb("{name}: &a{number} [{words}]", "backbone")),
        ("unfold to more than",),
    ),
    "cfg: deep": Case(
        "a network YAML nested 200,000 levels deep",
        "refused before the parser's stack overflows",
        other_yaml("--cfg", lambda _: "backbone: " + "[" * 200_000 + "]" * 200_000),
        ("nested too deep",),
    ),
    "cfg: deep with brackets in strings": Case(
        "a network YAML nested 60,000 levels deep, each with a closing bracket in a string",
        "refused before the parser's stack overflows",
        other_yaml("--cfg", lambda _: "backbone: " + '["]", ' * 60_000 + "1" + "]" * 60_000),
        ("nested too deep",),
    ),
    "data: digits": Case(
        "a number of a million digits in a dataset YAML",
        "refused with the line number",
        data_yaml(lambda _: f"names: [a, b]\nnc: 0x{'f' * 1_000_000}\n"),
        ("line 5", "digits"),
    ),
    "list: outside": Case(
        "an image list with `/dev/zero`, `/etc/passwd` and a file outside the dataset",
        "`--check-data` counts them as unusable; nothing is written",
        list_outside,
        ("3 images unusable",),
    ),
    "data: outside": Case(
        "a dataset YAML whose splits lie outside its folder",
        "labels are read from there; nothing is written next to the data",
        splits_outside,
        ("2 wrong label lines", "outside/labels/0.txt:1", "class 1 is not one of 0..0"),
    ),
    "label: pipe": Case(
        "a named pipe without a writer in place of a label file",
        "refused by file name, without blocking",
        labels_of(pipe_as_label),
        ("0.txt", "it is not a regular file"),
    ),
    "voc: entities": Case(
        "a VOC annotation whose entities expand to a billion words",
        "refused with file and line: it has a DTD",
        voc_with(ENTITIES),
        ("a.xml:1", "DTD"),
    ),
    "voc: external": Case(
        "a VOC annotation that includes `/etc/passwd` through an external entity",
        "refused with file and line: it has a DTD",
        voc_with('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>'),
        ("a.xml:1", "DTD"),
    ),
    "image: claims": Case(
        "a PNG of under 300 bytes that claims 60,000 x 20,000 px",
        "refused before it is decoded",
        claiming_picture,
        ("60000 x 20000 px are more than",),
    ),
}
