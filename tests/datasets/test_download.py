"""Datasets that fetch themselves, from archives laid out as the public ones are."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from utils.config.dataset import load_dataset_config
from utils.datasets import download as module
from utils.datasets.download import fetch_dataset, get_dataset, main
from utils.datasets.index import build_index
from utils.errors import UserError
from utils.fetch.transfer import Patience

SHIPPED = Path(__file__).resolve().parents[2] / "data"
BOTH = ("train", "val")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(
        "utils.fetch.transfer.fetch.__defaults__", (Patience(seconds=1, window=5, attempts=2, pause=0.01),)
    )


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def thing(name: str, box, difficult: str = "<difficult>0</difficult>", more: str = "") -> str:
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{difficult}<bndbox>{sides}</bndbox>{more}</object>"


def annotation(*things: str) -> bytes:
    size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
    head = f"<folder>VOC</folder>{size}<segmented>0</segmented>"
    return f"<annotation>{head}{''.join(things)}</annotation>".encode()


def packed(files: dict[str, bytes], kind: str = "tar") -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def voc(year: int, objects: dict[str, bytes], **lists: str) -> bytes:
    """A year of the VOC as its archives have it."""
    base = f"VOCdevkit/VOC{year}"
    files = {f"{base}/JPEGImages/{name}.jpg": picture(number) for number, name in enumerate(objects)}
    files |= {f"{base}/Annotations/{name}.xml": content for name, content in objects.items()}
    files |= {f"{base}/ImageSets/Main/{name}.txt": text.encode() for name, text in lists.items()}
    for kind, ending in (("Layout", ".txt"), ("Segmentation", ".txt")):
        files |= {f"{base}/ImageSets/{kind}/{name}{ending}": text.encode() for name, text in lists.items()}
    files |= {f"{base}/SegmentationClass/{name}.png": b"no image" for name in objects}
    return packed(files)


CAT, DOG = thing("cat", (8, 8, 20, 30)), thing("dog", (30, 5, 64, 48))
HARD = thing("person", (1, 1, 9, 9), "<difficult>1</difficult>")
PARTS = (
    "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part>"
)
VOC = {
    "VOCtrainval_06-Nov-2007.tar": voc(
        2007,
        {"000005": annotation(CAT, HARD), "000007": annotation(DOG, CAT)},
        trainval="000005\n000007\n", train="000005\n", val="000007\n", cat_trainval="000005  1\n000007 -1\n",
    ),
    "VOCtest_06-Nov-2007.tar": voc(
        2007, {"000001": annotation(DOG)}, test="000001\n", cat_test="000001 -1\n"
    ),
    "VOCtrainval_11-May-2012.tar": voc(
        2012,
        {"2008_000008": annotation(thing("tvmonitor", (45.70000076293945, 1, 60.5, 40), "", PARTS))},
        trainval="2008_000008\n", train="2008_000008\n", val="\n",
    ),
}  # fmt: skip


def coco_json(names, images, boxes) -> bytes:
    ids = (1, 4, 90)  # with gaps, as COCO's
    categories = [{"id": ids[number], "name": name} for number, name in enumerate(names)]
    pictures = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 64, "height": 48} for i in images]
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": list(box), "iscrowd": crowd}
        for n, (i, c, box, crowd) in enumerate(boxes)
    ]
    return json.dumps({"images": pictures, "categories": categories, "annotations": annotations}).encode()


COCO_NAMES = ["person", "airplane", "toothbrush"]
INSTANCES = {
    "val": coco_json(
        COCO_NAMES[::-1][::-1], [139, 285], [(139, 90, (32, 24, 16, 12), 0), (139, 1, (0, 0, 64, 48), 1)]
    ),
    "train": coco_json(COCO_NAMES, [9], [(9, 4, (-4, 10, 36, 50), 0), (9, 1, (5, 5, 0, 9), 0)]),
}
COCO = {
    "annotations_trainval2017.zip": packed(
        {f"annotations/instances_{part}2017.json": content for part, content in INSTANCES.items()}
        | {"annotations/captions_val2017.json": b"{}"}, "zip",
    ),
    "val2017.zip": packed({f"val2017/{i:012d}.jpg": picture(i) for i in (139, 285)}, "zip"),
    "train2017.zip": packed({"train2017/000000000009.jpg": picture(9)}, "zip"),
}  # fmt: skip
COCO128 = {
    "coco128.zip": packed(
        {"coco128/images/train2017/000000000009.jpg": picture(9), "coco128/LICENSE": b"x",
         "coco128/labels/train2017/000000000009.txt": b"45 .5 .5 .2 .2\n"}, "zip",
    )
}  # fmt: skip
BCCD = {
    "BCCD_Dataset-1.0.zip": packed(
        {"BCCD_Dataset-1.0/README.md": b"x", "BCCD_Dataset-1.0/BCCD/JPEGImages/a.jpg": picture(1),
         "BCCD_Dataset-1.0/BCCD/Annotations/a.xml": annotation(thing("RBC", (1, 1, 9, 9))),
         **{f"BCCD_Dataset-1.0/BCCD/ImageSets/Main/{split}.txt": b"a\n" for split in (*BOTH, "test")}}, "zip",
    )
}  # fmt: skip
PUBLIC = {"voc": VOC, "voc2007": VOC, "coco": COCO, "coco128": COCO128, "bccd": BCCD}


@pytest.fixture
def shipped(serving, tmp_path):
    """Writes a shipped YAML with this server's addresses, sizes and checksums; gives its path.

    The first of the sources is one that has nothing.
    """

    def write(name: str) -> Path:
        settings = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
        for step in settings["download"]:
            if "url" not in step:
                continue
            file = step.get("file") or step["url"][0].rsplit("/", 1)[1]
            content = PUBLIC[name][file]
            serving.files[f"/{file}"] = content
            step["url"] = [f"{serving.url}/gone/{file}", f"{serving.url}/{file}"]
            for kind in {"md5", "sha256"} & set(step):
                step[kind] = hashlib.new(kind, content).hexdigest()
            if "size" in step:
                step["size"] = len(content)
        if name == "coco":
            settings["names"] = ["toothbrush", "airplane", "person"]
        path = tmp_path / "project" / "data" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def fetched(path: Path, splits=BOTH, said=None):
    return get_dataset(path, None, splits, True, (said if said is not None else []).append)


def boxes_of(config, split):
    index = build_index(config, split, progress=False)
    return {
        Path(path).stem: labels[:, 0].astype(int).tolist()
        for path, labels in zip(index.paths, index.labels, strict=True)
    }


def files_of(serving) -> Counter:
    return Counter(path for path, _ in serving.asked if not path.startswith("/gone/"))


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_voc_fetches_itself_and_is_read_as_it_is(shipped, serving, tmp_path):
    said = []
    config = fetched(shipped("voc"), said=said)
    assert config.root == tmp_path / "project/datasets/VOCdevkit"
    assert boxes_of(config, "train") == {"000005": [7], "000007": [7, 11], "2008_000008": [19]} or boxes_of(
        config, "train"
    ) == {"000005": [7], "000007": [11, 7], "2008_000008": [19]}
    assert boxes_of(config, "val") == boxes_of(config, "test") == {"000001": [11]}
    index = build_index(config, "train", progress=False)
    np.testing.assert_allclose(index.labels[0], [[7, 13.5 / 64, 18.5 / 48, 13 / 64, 23 / 48]], atol=1e-6)
    np.testing.assert_allclose(index.labels[2][0, 3], (60.5 - 44.7) / 64, atol=1e-6)
    assert sorted(entry.name for entry in (tmp_path / "project/datasets").iterdir()) == ["VOCdevkit"]
    assert (config.root / "VOC2007/SegmentationClass/000001.png").is_file()
    assert said == [f"{config.yaml_path}: fetching what is missing into {config.root}: 3 archives, 0 MB"]
    assert files_of(serving) == Counter({f"/{name}": 1 for name in VOC})


def test_data_that_is_there_is_never_fetched_again(shipped, serving, tmp_path):
    path = shipped("voc")
    fetched(path)
    serving.asked.clear()
    fetched(path)
    fetched(path, ("train", "val", "test"))
    elsewhere = tmp_path / "datasets" / "VOC" / "images" / "VOCdevkit"
    elsewhere.parent.mkdir(parents=True)
    os.rename(path.parent.parent / "datasets/VOCdevkit", elsewhere)
    assert fetched(path).root == elsewhere
    (path.parent.parent / "datasets/VOCdevkit/VOC2007").mkdir(parents=True)
    assert fetched(path).root == elsewhere
    assert fetched(path, ("test",)).root == elsewhere
    assert serving.asked == []


def test_of_data_that_is_there_in_part_the_rest_is_fetched_and_nothing_is_changed(shipped, serving):
    fetched(shipped("voc2007"))
    path = shipped("voc")
    own = path.parent.parent / "datasets/VOCdevkit/VOC2007/JPEGImages/000005.jpg"
    own.write_bytes(picture(77))
    serving.asked.clear()
    assert set(boxes_of(fetched(path), "train")) == {"000005", "000007", "2008_000008"}
    assert files_of(serving) == Counter({"/VOCtrainval_11-May-2012.tar": 1})
    (own.parents[1] / "ImageSets/Main/trainval.txt").unlink()
    fetched(path)
    assert own.read_bytes() == picture(77)


def test_only_what_the_splits_need_is_fetched(shipped, serving):
    path = shipped("voc")
    assert boxes_of(fetched(path, ("test",)), "test") == {"000001": [11]}
    assert files_of(serving) == Counter({"/VOCtest_06-Nov-2007.tar": 1})
    fetched(path)
    assert files_of(serving) == Counter({f"/{name}": 1 for name in VOC})


def test_coco_gets_its_labels_from_the_official_annotations(shipped, serving):
    path = shipped("coco")
    config = fetched(path, ("val",))
    assert files_of(serving) == Counter({"/annotations_trainval2017.zip": 1, "/val2017.zip": 1})
    assert boxes_of(config, "val") == {"000000000139": [0], "000000000285": []}
    config = fetched(path)
    index = build_index(config, "train", progress=False)
    np.testing.assert_allclose(index.labels[0], [[1, 16 / 64, 29 / 48, 32 / 64, 38 / 48]], atol=1e-5)
    assert listed(config.root) == {
        "train2017.txt", "val2017.txt", "images/val2017/000000000139.jpg", "images/val2017/000000000285.jpg",
        "images/train2017/000000000009.jpg",
        "labels/val2017/000000000139.txt", "labels/val2017/000000000285.txt",
        "labels/train2017/000000000009.txt", "annotations/instances_val2017.json",
        "annotations/instances_train2017.json", "annotations/captions_val2017.json",
    }  # fmt: skip
    assert (config.root / "val2017.txt").read_text().splitlines()[0] == "./images/val2017/000000000139.jpg"


def test_an_image_list_of_the_users_is_kept_when_labels_are_made(shipped):
    config = fetched(shipped("coco"), ("val",))
    own = "./images/val2017/000000000139.jpg\n"
    (config.root / "val2017.txt").write_text(own)
    shutil.rmtree(config.root / "labels")
    shutil.rmtree(config.root / "images")  # else nothing is missing
    config = fetched(config.yaml_path, ("val",))
    assert (config.root / "val2017.txt").read_text() == own
    assert boxes_of(config, "val") == {"000000000139": [0]}


def test_annotations_whose_labels_would_not_be_found_are_refused(shipped, serving, monkeypatch):
    inner = {"val": coco_json(COCO_NAMES, [139], []).replace(b"000000000139.", b"images/000000000139.")}
    files = {f"annotations/instances_{part}2017.json": text for part, text in {**INSTANCES, **inner}.items()}
    archive = packed(files, "zip")
    monkeypatch.setitem(COCO, "annotations_trainval2017.zip", archive)
    with pytest.raises(UserError, match="has a folder 'images' in its name: its label would not be found"):
        fetched(shipped("coco"), ("val",))


def test_lists_and_labels_without_the_pictures_are_not_taken_for_the_data(shipped, serving):
    path = shipped("coco")
    config = fetched(path)
    shutil.rmtree(config.root / "images" / "train2017")
    serving.asked.clear()
    fetched(path)
    assert files_of(serving) == Counter({"/train2017.zip": 1})


@pytest.mark.parametrize(("name", "boxes"), [("coco128", {"000000000009": [45]}), ("bccd", {"a": [0]})])
def test_the_small_sets_fetch_themselves(shipped, name, boxes):
    config = fetched(shipped(name))
    assert boxes_of(config, "train") == boxes_of(config, "val") == boxes
    assert config.root.name == {"coco128": "coco128", "bccd": "BCCD"}[name]
    assert "README.md" not in listed(config.root)


def simple(tmp_path: Path, download, **more) -> Path:
    path = tmp_path / "project" / "set.yaml"
    path.parent.mkdir(exist_ok=True)
    settings = {"path": "data/set", "train": "images/a", "val": "images/a", "names": ["x"]}
    path.write_text(yaml.safe_dump({**settings, "download": download, **more}))
    return path


SMALL = {"images/a/1.jpg": picture(1), "labels/a/1.txt": b"0 .5 .5 .2 .2\n"}


@pytest.mark.parametrize("top", ["", "set/", "anything/"])
def test_the_bare_address_of_an_archive_will_do(serving, tmp_path, top):
    serving.files["/set.zip"] = packed({f"{top}{name}": content for name, content in SMALL.items()}, "zip")
    config = fetched(simple(tmp_path, f"{serving.url}/set.zip"))
    assert boxes_of(config, "train") == {"1": [0]}
    assert listed(config.root) == set(SMALL)
    assert sorted(entry.name for entry in config.root.parent.iterdir()) == ["set"]


def test_of_processes_that_wait_for_each_other_none_fetches_again(serving, tmp_path):
    serving.files["/set.zip"] = packed(SMALL, "zip")
    path = simple(tmp_path, f"{serving.url}/set.zip")
    config = load_dataset_config(path, may_be_absent=True)
    fetched(path)  # by another process, after this one has seen that the data is missing
    fetch_dataset(config, BOTH, str)
    assert files_of(serving) == {"/set.zip": 1}


def refused(path: Path, splits=BOTH, may_fetch: bool = True, data_dir=None) -> str:
    with pytest.raises(UserError) as caught:
        get_dataset(path, data_dir, splits, may_fetch, print)
    return str(caught.value)


CODE = "import os\nos.system('touch marker')\n"


@pytest.mark.fault(
    "a command or code under `download:` in a dataset YAML", "shown in a one-line error and never executed"
)
@pytest.mark.parametrize(
    "words", ["bash data/scripts/get_coco.sh", CODE, "touch marker; https://x/a.zip", "wget a"]
)
def test_a_command_is_shown_and_never_run(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    message = refused(simple(tmp_path, words))
    assert "its 'download:' is a text, which is shown and never run: " + " ".join(words.split()) in message
    assert "--data-dir" in message and "\n" not in message
    assert not list(tmp_path.rglob("marker"))


def test_nothing_is_fetched_where_that_is_forbidden_or_the_data_is_said_to_lie_elsewhere(
    shipped, serving, tmp_path
):
    path = shipped("voc")
    message = refused(path, may_fetch=False)
    assert (
        "split 'train' is not there" in message
        and "leave out what forbids to fetch it (--no-download or --dry-run), or fetch it (python -m "
        in message
    )
    (tmp_path / "mine").mkdir()
    assert f"did you mean {tmp_path / 'mine'}? Else correct" in refused(path, data_dir=tmp_path / "mien")
    message = refused(path, data_dir=tmp_path / "mine")
    assert (
        f"correct --data-dir, or fetch it there: python -m utils.datasets.download {path} --data-dir"
        in message
    )
    assert serving.asked == [] and not (path.parent.parent / "datasets").exists()
    assert main([str(path), "--data-dir", str(tmp_path / "mine"), "--splits", "val"]) == 0
    assert set(boxes_of(get_dataset(path, tmp_path / "mine", ["val"], False, print), "val")) == {"000001"}


def test_an_archive_that_somebody_has_put_there_is_taken_and_kept(shipped, serving, tmp_path):
    path = shipped("voc2007")
    folder = tmp_path / "project" / "datasets"
    folder.mkdir()
    for name in ("VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"):
        (folder / name).write_bytes(VOC[name])
    said = []
    assert set(boxes_of(fetched(path, said=said), "train")) == {"000005", "000007"}
    assert serving.asked == [] and said[0] == f"taking {folder / 'VOCtrainval_06-Nov-2007.tar'}"
    assert {entry.name for entry in folder.iterdir()} == {"VOCdevkit", *list(VOC)[:2]}
    shutil.rmtree(folder / "VOCdevkit")
    (folder / "VOCtest_06-Nov-2007.tar").write_bytes(b"half")
    message = refused(path)
    assert message.startswith(str(folder / "VOCtest_06-Nov-2007.tar")) and "remove it" in message


def test_archives_are_kept_where_that_is_asked_for(shipped, tmp_path, capsys):
    path = shipped("coco128")
    assert main([str(path), "--keep"]) == 0
    folder = tmp_path / "project" / "datasets"
    assert sorted(entry.name for entry in folder.iterdir()) == ["coco128", "coco128.zip"]
    assert (folder / "coco128.zip").read_bytes() == COCO128["coco128.zip"]
    assert main([str(path)]) == 0
    assert f"train, val is there in {folder / 'coco128'}" in capsys.readouterr().out


HARM = {
    "outside": packed({**SMALL, "../../../escaped": b"x"}, "zip"),
    "damaged": packed(SMALL, "zip")[:-30],
    "other": packed({"readme": b"x"}, "zip"),
}


@pytest.mark.fault(
    "a downloaded archive is truncated, has a member outside its folder (`../`), or lacks the expected files",
    "rejected with nothing left behind; the next source is tried",
)
@pytest.mark.parametrize("harm", HARM)
def test_a_bad_archive_leaves_nothing_and_the_next_source_has_its_turn(serving, tmp_path, harm):
    serving.files |= {"/bad/set.zip": HARM[harm], "/set.zip": packed(SMALL, "zip")}
    step = {"url": [f"{serving.url}/bad/set.zip"], "gives": ["images/a"]}
    path = simple(tmp_path, [step])
    assert "set.zip: cannot be fetched (127.0.0.1: " in refused(path)
    assert not (tmp_path / "project/data").exists()
    step["url"].append(f"{serving.url}/set.zip")
    assert boxes_of(fetched(simple(tmp_path, [step])), "train") == {"1": [0]}
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.fault(
    "too little disk space for a dataset that has to be downloaded", "refused before anything is downloaded"
)
def test_room_for_all_archives_and_their_content_is_looked_for_first(shipped, serving, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=2_800_000_000))
    message = refused(shipped("voc"))
    assert "needs 2.7 GiB and 2.6 GiB are free; make room" in message
    assert serving.asked == []


def stop_in(path: Path, name: str, number: int) -> None:
    """Fetches in a process that is killed when it has renamed so many times."""
    rename, count = getattr(os, name), Counter()

    def counted(*arguments):
        count["calls"] += 1
        if count["calls"] > number:
            os.kill(os.getpid(), 9)
        return rename(*arguments)

    setattr(os, name, counted)
    fetched(path)


@pytest.mark.fault(
    "SIGKILL while an unpacked dataset is moved into its folder",
    "a partial split never passes for complete; the next command completes the dataset",
)
def test_a_killed_process_leaves_nothing_that_looks_complete(shipped, serving):
    path, context = shipped("voc"), multiprocessing.get_context("fork")
    for number in (0, 4, 7):
        child = context.Process(target=stop_in, args=(path, "rename", number))
        child.start()
        child.join()
        assert child.exitcode == -9
        config = load_dataset_config(path, may_be_absent=True)
        if not module.missing_splits(config, ["val"]):
            assert set(boxes_of(config, "val")) == {"000001"}
        fetched(path)
        assert set(boxes_of(load_dataset_config(path), "train")) == {"000005", "000007", "2008_000008"}
        assert [entry.name for entry in config.root.parent.iterdir()] == ["VOCdevkit"]
        shutil.rmtree(config.root)


def test_of_several_processes_one_fetches(shipped, serving):
    path, context = shipped("voc2007"), multiprocessing.get_context("fork")
    serving.stalls["/VOCtest_06-Nov-2007.tar"] = 1000, 0.5
    children = [context.Process(target=fetched, args=(path,)) for _ in range(3)]
    for child in children:
        child.start()
        time.sleep(0.05)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert files_of(serving) == Counter({f"/{name}": 1 for name in list(VOC)[:2]})


def test_archives_that_do_not_make_up_the_data_are_named(serving, tmp_path):
    serving.files["/set.zip"] = packed({"images/b/1.jpg": b"x"}, "zip")
    message = refused(simple(tmp_path, f"{serving.url}/set.zip"))
    assert "split 'train' is not what the YAML says" in message and "images/a" in message


def test_a_link_to_a_folder_on_another_disk_stays_a_link(serving, tmp_path):
    serving.files["/set.zip"] = packed(SMALL, "zip")
    path = simple(tmp_path, [{"url": f"{serving.url}/set.zip", "gives": "images/a"}])
    (tmp_path / "big").mkdir()
    (tmp_path / "project" / "data").mkdir()
    (tmp_path / "project" / "data" / "set").symlink_to(tmp_path / "big")
    config = fetched(path)
    assert config.root.is_symlink() and listed(tmp_path / "big") == set(SMALL)


def test_fetching_splits_that_are_there_does_nothing(shipped, serving):
    path = shipped("coco128")
    config = fetched(path)
    serving.asked.clear()
    fetch_dataset(config, BOTH, print)
    assert serving.asked == []


def test_a_split_that_is_missing_is_told_before_others_are_read(tmp_path):
    """Wrong labels of `train` would be told first, and take long to find."""
    for folder in ("images/train", "labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "images/train/a.jpg").write_bytes(b"")
    (tmp_path / "labels/train/a.txt").write_text("wrong")
    path = tmp_path / "mine.yaml"
    path.write_text("path: .\ntrain: images/train\nval: images/vall\nnames: [a]\n")
    told = refused(path)
    assert "split 'val' is not there" in told and "images/vall" in told
    assert get_dataset(path, None, ["train"], False, print).names == ["a"]
