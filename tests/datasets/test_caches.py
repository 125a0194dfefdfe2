"""Caches of indexes and of images: whatever is wrong with one, it is made anew or gone without."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import utils.datasets.cache_folder as cache_folder_module
import utils.datasets.index_cache as index_cache
import utils.datasets.store as store_module
from utils.datasets.index import build_index
from utils.datasets.index_cache import CheckedImages, read_cache, write_cache
from utils.datasets.packed import PackedRows, PackedTexts
from utils.datasets.store import ImageStore, LostImageError
from utils.errors import UserError

SECONDS = 2
KNOWN = CheckedImages(
    PackedTexts(["a.png", "b.png"]),
    np.array([[3, 4], [5, 6]]),
    PackedRows.of([np.zeros((1, 5), np.float32), np.array([[1, 0.5, 0.5, 0.5, 1]] * 2, np.float32)]),
    ["1 image skipped: c.png"],
)


def assert_known(found: CheckedImages) -> None:
    assert (found.paths, found.problems) == (KNOWN.paths, KNOWN.problems)
    assert np.array_equal(found.sizes_wh, KNOWN.sizes_wh)
    for ours, theirs in zip(found.labels, KNOWN.labels, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.fixture
def remembered(tmp_path: Path) -> Path:
    write_cache("ab", KNOWN, tmp_path)
    assert_known(read_cache("ab", tmp_path, 2))
    return tmp_path / "index/ab.npz"


@pytest.mark.fault(
    "a cached index with a bit flipped in any byte, or with bytes replaced, inserted or removed",
    "discarded, unless its content still reads back identical",
)
def test_any_damage_to_a_remembered_index_is_none_or_harmless(remembered, tmp_path):
    good, dice = remembered.read_bytes(), random.Random(0)
    end, place = time.monotonic() + SECONDS, 0
    while place < len(good) or time.monotonic() < end:
        content = bytearray(good)
        if place < len(good):
            content[place] ^= 1 << dice.randrange(8)
            place += 1
        else:
            start = dice.randrange(len(content))
            content[start : start + dice.randrange(40)] = dice.randbytes(dice.randrange(40))
        remembered.write_bytes(content)
        if (found := read_cache("ab", tmp_path, 2)) is not None:
            assert_known(found)


def rows(*numbers: float) -> np.ndarray:
    return np.array([numbers] * 3, np.float32)


def saved(save=np.savez, **changes: object) -> bytes:
    """A remembered index with other arrays, other entries of its texts, or other texts."""
    texts, other = (
        {"digest": "ab", "problems": KNOWN.problems},
        changes.pop("texts", {}),
    )
    text = other if isinstance(other, str) else json.dumps(texts | other)
    parts = {
        "texts": np.frombuffer(text.encode(), np.uint8),
        "paths": np.frombuffer(b"a.pngb.png", np.uint8),
        "path_ends": np.array([5, 10]),
        "labels": np.concatenate(KNOWN.labels),
        "counts": np.array([1, 2]),
        "sizes_wh": KNOWN.sizes_wh,
    } | changes
    buffer = io.BytesIO()
    save(buffer, **{name: value for name, value in parts.items() if value is not None})
    return buffer.getvalue()


def bare_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def test_what_these_tests_save_is_read(tmp_path, remembered):
    remembered.write_bytes(saved())
    assert_known(read_cache("ab", tmp_path, 2))


@pytest.mark.fault(
    "a cached index with values of the wrong type, shape or range, compressed, or from another dataset",
    "discarded",
)
@pytest.mark.parametrize(
    "content",
    [
        bare_array(),
        saved(counts=None),
        saved(texts={"digest": "cd"}),
        saved(texts={"problems": None}),
        saved(texts={"problems": [1]}),
        saved(paths=None),
        saved(paths=np.zeros(10, np.int8)),
        saved(paths=np.zeros(9, np.uint8)),
        saved(paths=np.zeros((10, 1), np.uint8)),
        saved(path_ends=np.array([5.0, 10.0])),
        saved(path_ends=np.array([12, 10])),
        saved(path_ends=np.array([-1, 10])),
        saved(path_ends=np.array([10])),
        saved(labels=np.zeros((3, 4), np.float32)),
        saved(labels=np.zeros((3, 5))),
        saved(labels=np.full((3, 5), np.nan, np.float32)),
        saved(labels=np.zeros((4, 5), np.float32)),
        saved(labels=rows(2, 0.5, 0.5, 0.5, 0.5)),
        saved(labels=rows(-1, 0.5, 0.5, 0.5, 0.5)),
        saved(labels=rows(0.5, 0.5, 0.5, 0.5, 0.5)),
        saved(labels=rows(1, 0.5, 0.5, 0.5, np.inf)),
        saved(labels=rows(1, 0.5, 0.5, -0.5, 0.5)),
        saved(labels=rows(1, 0.5, 0.9, 0.5, 0.5)),
        saved(labels=rows(1, 0.1, 0.5, 0.5, 0.5)),
        saved(counts=np.array([4, -1])),
        saved(counts=np.array([[1, 2]])),
        saved(counts=np.array([1.0, 2.0])),
        saved(sizes_wh=np.array([[3, 4]])),
        saved(sizes_wh=np.array([[3, 4], [0, 6]])),
        saved(sizes_wh=np.array([[3, 4], [2**20 + 1, 6]])),
        saved(sizes_wh=np.array(["3", "4"])),
        saved(save=np.savez_compressed),
        saved(sizes_wh=np.array([None, "4"], object)),
    ],
)  # fmt: skip
def test_a_remembered_index_of_another_form_is_none(content, tmp_path, remembered):
    remembered.write_bytes(content)
    assert read_cache("ab", tmp_path, 2) is None


@pytest.mark.parametrize("text", ["[]", "3", '"ab"', "null", "{", '{"paths": []}'])
def test_a_remembered_index_with_other_json_is_none(text, tmp_path, remembered):
    remembered.write_bytes(saved(texts=text))
    assert read_cache("ab", tmp_path, 2) is None


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.fault(
    "a folder or named pipe in place of a cached index", "the index is built all the same, without blocking"
)
@pytest.mark.parametrize("put", [put_folder, put_pipe])
def test_what_is_no_file_is_no_remembered_index(put, make_dataset, cache_folder):
    config = make_dataset({"a.png": "0 .5 .5 .4 .4\n"})
    build_index(config, "train", progress=False)
    [path] = (cache_folder / "index").iterdir()
    put(path)
    assert len(build_index(config, "train", progress=False)) == 1


@pytest.mark.fault("a cached index that the user may not read", "the index is rebuilt")
def test_a_remembered_index_of_another_user_is_made_anew(make_dataset, cache_folder, monkeypatch):
    config = make_dataset({"a.png": "0 .5 .5 .4 .4\n"})
    build_index(config, "train", progress=False)

    def refuse(path, most):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(index_cache, "read_regular", refuse)
    assert len(build_index(config, "train", progress=False)) == 1


@pytest.mark.fault("caches written by another version of the program", "ignored; new ones are written")
def test_caches_of_another_version_are_not_looked_at(make_dataset, cache_folder, monkeypatch):
    config = make_dataset({"a.png": "0 .5 .5 .4 .4\n"})
    index = build_index(config, "train", progress=False)
    ImageStore(index, 32).keep_on_disk()
    for module in (index_cache, store_module):
        monkeypatch.setattr(module, "_VERSION", module._VERSION + "+")
    for path in cache_folder.rglob("*.*"):
        path.write_bytes(b"of another version")
    again = build_index(config, "train", progress=False)
    store = ImageStore(again, 32)
    store.keep_on_disk()
    assert len(again) == 1 and len([*cache_folder.rglob("*.*")]) == 4
    assert_cached(store, ImageStore(index, 32))


def test_of_several_processes_one_writes_the_cache_and_the_others_wait_for_it(index, tmp_path, monkeypatch):
    inner = ImageStore._write

    def slow(store: ImageStore, path: Path, digest: str) -> None:
        (tmp_path / f"{os.getpid()} wrote").touch()
        time.sleep(0.5)  # by now the others have found no cache either, and would write their own
        inner(store, path, digest)

    monkeypatch.setattr(ImageStore, "_write", slow)
    forked = multiprocessing.get_context("fork")
    processes = [forked.Process(target=kept, args=(index,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("* wrote"))) == 1
    store, path = kept(index)
    assert_cached(store, ImageStore(index, 32))
    assert len(list(tmp_path.glob("* wrote"))) == 1 and list(path.parent.iterdir()) == [path]


@pytest.fixture
def index(make_dataset):
    files = {f"{number}.png": "0 .5 .5 .4 .4\n" for number in range(3)}
    return build_index(make_dataset(files), "train", progress=False)


def assert_cached(store: ImageStore, plain: ImageStore) -> None:
    assert " cached in" in store.notes[-1]
    assert_same(store, plain)


def assert_same(store: ImageStore, plain: ImageStore) -> None:
    for number in range(len(plain.wh)):
        assert np.array_equal(store.load(number), plain.load(number))


def kept(index) -> tuple[ImageStore, Path]:
    store = ImageStore(index, 32)
    store.keep_on_disk()
    return store, store._file


def damage(path: Path, way: str) -> None:
    content = bytearray(path.read_bytes())
    if way == "zeros":
        content[:] = bytes(len(content))
    elif way == "zero images":
        content[:1000] = bytes(1000)
    elif way == "one bit":
        content[len(content) // 2] ^= 4
    elif way == "cut off":
        del content[-1:]
    elif way == "longer":
        content += b"x"
    elif way == "other set":
        content[-36:-4] = bytes(32)
    path.write_bytes(content)


@pytest.mark.fault(
    "a corrupt or truncated `--cache disk` file, or one of another dataset",
    "detected at the start and rebuilt",
)
@pytest.mark.parametrize("way", ["zeros", "zero images", "one bit", "cut off", "longer", "other set"])
def test_damaged_cached_pictures_are_made_anew(way, index):
    _, path = kept(index)
    damage(path, way)
    again, _ = kept(index)
    assert_cached(again, ImageStore(index, 32))


@pytest.mark.fault(
    "a cache folder that cannot be created or used, with `--cache disk`",
    "a note says so; images are read from their files",
)
@pytest.mark.parametrize("way", ["below a file", "a file", "no home", "folder in the place"])
def test_a_cache_folder_that_cannot_be_used_is_a_note(way, index, tmp_path, monkeypatch):
    if way == "folder in the place":
        _, path = kept(index)
        put_folder(path)
        (path / "x").touch()
    else:
        (tmp_path / "in the way").touch()
        places = {"below a file": tmp_path / "in the way/a/b", "a file": tmp_path / "in the way"}
        monkeypatch.setenv("YOLO_CACHE_DIR", str(places.get(way, "~no-such-user/cache")))
    store, path = kept(index)
    [note] = store.notes
    assert note.startswith("images are not cached on disk: ") and path is None
    assert_same(store, ImageStore(index, 32))
    if way == "no home":
        write_cache("ab", KNOWN, None)
        assert read_cache("ab", None, 2) is None


@pytest.mark.fault(
    "a `--cache disk` file that the user may not read",
    "rebuilt; if it cannot be replaced, a note says so and images are read from their files",
)
@pytest.mark.parametrize("replaceable", [True, False])
def test_cached_pictures_of_another_user_are_made_anew_or_left(replaceable, index, monkeypatch):
    kept(index)

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    def refuse_writing(path, write):
        raise UserError("cannot be written (Permission denied)", path)

    monkeypatch.setattr(store_module, "open", refuse, raising=False)
    if not replaceable:
        monkeypatch.setattr(store_module, "replace_atomically", refuse_writing)
    store, _ = kept(index)
    plain = ImageStore(index, 32)
    if replaceable:
        assert_cached(store, plain)
    else:
        assert "Permission denied" in store.notes[0] and store._file is None
        assert_same(store, plain)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_cached_pictures_without_the_right_to_read_them_are_made_anew(index):
    _, path = kept(index)
    path.chmod(0)
    again, _ = kept(index)
    assert_cached(again, ImageStore(index, 32))


@pytest.mark.fault(
    "the `--cache disk` file is deleted while in use",
    "the same images are still read, from the open mapping or from their files",
)
def test_cached_pictures_that_go_away_are_read_from_their_files(index, cache_folder):
    store, path = kept(index)
    state = store.__getstate__()
    shutil.rmtree(cache_folder)
    assert_same(store, ImageStore(index, 32))  # mapped: the system keeps it
    sent = ImageStore.__new__(ImageStore)
    sent.__dict__.update(state)
    assert sent._file == path and sent._memory is None
    assert_same(sent, ImageStore(index, 32))


def aged(path: Path, days: float) -> Path:
    """A file that was last used so many days ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - days * 86400,) * 2)
    return path


@pytest.mark.parametrize("kind", ["index", "pictures"])
def test_a_new_cache_sends_away_what_nobody_has_used_for_a_month(kind, index, make_dataset, cache_folder):
    digest, outside = "5a" * 32, cache_folder.parent / "outside"
    old = [
        aged(cache_folder / "index" / f"{digest}.npz", 31),
        aged(cache_folder / "pictures" / f"{digest}.raw", 31),
        aged(cache_folder / "pictures" / f".{digest}.raw.0123456789ab.tmp", 31),
    ]
    others = [
        aged(cache_folder / "index" / f"{'6b' * 32}.npz", 29),
        aged(cache_folder / "pictures" / f"{'6b' * 32}.raw", 29),
        aged(cache_folder / "pictures" / f".{'6b' * 32}.raw.0123456789ab.tmp", 0),
        aged(cache_folder / "index" / f"{digest}.raw", 99),
        aged(cache_folder / "pictures" / "mine.raw", 99),
        aged(cache_folder / "pictures" / f"{digest[:-1]}.raw", 99),
        aged(cache_folder / f"{digest}.raw", 99),
        aged(outside / f"{digest}.raw", 99),
    ]
    folder = aged(cache_folder / "pictures" / f"{'7c' * 32}.raw" / "in it", 99).parent
    os.utime(folder, (0, 0))
    link = cache_folder / "pictures" / f"{'8d' * 32}.raw"
    link.symlink_to(others[-1])
    os.utime(link, (0, 0), follow_symlinks=False)
    if kind == "pictures":
        ImageStore(index, 32).keep_on_disk()
    else:
        build_index(make_dataset({"new.png": "0 .5 .5 .4 .4\n"}), "train", progress=False)
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in [*others, folder / "in it", link])


def test_a_cache_that_is_in_use_is_not_sent_away(index, make_dataset):
    store, path = kept(index)
    (remembered,) = path.parents[1].glob("index/*.npz")
    for used in (path, remembered):
        aged(used, 40)
    build_index(make_dataset({}), "train", progress=False)
    kept(index)
    cache_folder_module.remove_unused()
    assert path.exists() and remembered.exists()
    aged(path, 40)
    cache_folder_module.remove_unused()
    assert not path.exists()
    assert_same(store, ImageStore(index, 32))  # mapped: the system keeps it


def test_a_cache_that_cannot_be_removed_stays(index, cache_folder, monkeypatch):
    old = [aged(cache_folder / "pictures" / f"{name * 32}.raw", 99) for name in ("5a", "6b")]
    asked = []

    def refuse(path):
        asked.append(path)
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache_folder_module.os, "unlink", refuse)
    cache_folder_module.remove_unused()
    assert len(asked) == 2 and all(path.exists() for path in old)


def test_a_lost_picture_is_still_an_error_of_its_own(index):
    Path(index.paths[1]).unlink()
    with pytest.raises(LostImageError):
        ImageStore(index, 32).keep_on_disk()
