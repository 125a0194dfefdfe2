"""Archives, honest and otherwise, and folders that take in what was unpacked."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.fetch import unpack as module
from utils.fetch.unpack import move_in, unpack
from utils.fetch.web import SourceError

FILES = {"top/a/1.txt": b"one", "top/a/ü 2.txt": b"two" * 1000, "top/b/3.txt": b"", "README": b"read me"}


def make_zip(path: Path, files: dict[str, bytes] = FILES) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return path


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.linkname, entry.mode = len(content), kind, link, 0o4777
    return entry, io.BytesIO(content)


def make_tar(path: Path, files: dict[str, bytes] = FILES, members=(), mode: str = "w") -> Path:
    with tarfile.open(path, mode) as out:
        for name, content in files.items():
            out.addfile(*member(name, content))
        for entry in members:
            out.addfile(*entry)
    return path


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make(kind: str, path: Path) -> Path:
    modes = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}
    return make_zip(path) if kind == ".zip" else make_tar(path, mode=modes[kind])


@pytest.mark.parametrize("kind", [".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tgz"])
def test_an_archive_becomes_its_files_and_no_more(tmp_path, kind):
    path = make(kind, tmp_path / f"x{kind}.part")
    assert unpack(path, f"x{kind}", tmp_path / "out") == 4
    assert state_of(tmp_path / "out") == FILES
    assert not any(file.stat().st_mode & 0o7111 for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert unpack(path, f"x{kind}", tmp_path / "part", "to?/a") == 2
    assert state_of(tmp_path / "part") == {"1.txt": b"one", "ü 2.txt": b"two" * 1000}


def test_leftovers_of_other_systems_are_left_out_and_an_empty_taking_is_an_error(tmp_path):
    path = make_zip(
        tmp_path / "x.zip", {"__MACOSX/a": b"x", "a/.DS_Store": b"x", "a/b": b"x", "./c/./d": b""}
    )
    assert unpack(path, "x.zip", tmp_path / "out") == 2
    assert set(state_of(tmp_path / "out")) == {"a/b", "c/d"}
    with pytest.raises(SourceError, match="holds no file in z"):
        unpack(path, "x.zip", tmp_path / "none", "z")


ABSOLUTE = "/tmp/written by a hostile archive.txt"
OUTSIDE = ["../out.txt", "a/../../out.txt", ABSOLUTE, "a\\..\\..\\out.txt", "C:out.txt", "..", "/"]


@pytest.mark.fault(
    "an archive member with a path outside its folder (`../`, absolute)",
    "refused; nothing is written outside",
)
@pytest.mark.parametrize("name", OUTSIDE[:-2])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_no_member_leads_out_of_the_folder(tmp_path, kind, name):
    write = make_zip if kind == "zip" else make_tar
    path = write(tmp_path / "x", {"fine": b"x", name: b"harm"})
    before = state_of(tmp_path)
    with pytest.raises(SourceError, match="leads out of the folder"):
        unpack(path, f"x.{kind}", tmp_path / "in" / "out")
    shutil.rmtree(tmp_path / "in")
    assert state_of(tmp_path) == before and not Path(ABSOLUTE).exists()


KINDS = {
    "symlink": (tarfile.SYMTYPE, "/etc"), "hard link": (tarfile.LNKTYPE, "top/a/1.txt"),
    "pipe": (tarfile.FIFOTYPE, ""), "character device": (tarfile.CHRTYPE, ""),
    "block device": (tarfile.BLKTYPE, ""), "sparse file": (tarfile.GNUTYPE_SPARSE, ""),
}  # fmt: skip


@pytest.mark.fault("a tar archive with links, devices, named pipes or sparse files", "refused")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_files_and_folders_is_made(tmp_path, kind):
    path = make_tar(tmp_path / "x.tar", members=[member("top/c", b"", *KINDS[kind]), member("top/c/d", b"x")])
    with pytest.raises(SourceError, match="refused|not an intact archive"):
        unpack(path, "x.tar", tmp_path / "out")
    assert not os.path.lexists(tmp_path / "out/top/c")


def test_a_link_in_a_zip_and_an_encrypted_member_are_refused(tmp_path):
    for changes, words in (({"external_attr": (stat.S_IFLNK | 0o777) << 16}, "a link"), ({}, "encrypted")):
        path = tmp_path / "x.zip"
        entry = zipfile.ZipInfo("a")
        for key, value in changes.items():
            setattr(entry, key, value)
        with zipfile.ZipFile(path, "w") as out:
            out.writestr(entry, b"/etc/passwd")
        if not changes:
            content = bytearray(path.read_bytes())
            content[content.rfind(b"PK\1\2") + 8] |= 1
            path.write_bytes(content)
        with pytest.raises(SourceError, match=words):
            unpack(path, "x.zip", tmp_path / "out")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.fault(
    "an archive that expands beyond its size limit", "refused; no more than the limit is written"
)
@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_that_unfolds_to_too_much_is_stopped(tmp_path, kind):
    files = {"zeros": bytes(3_000_000), "b": b"x"}
    path = make_zip(tmp_path / "x", files) if kind == "zip" else make_tar(tmp_path / "x", files, mode="w:gz")
    with pytest.raises(SourceError, match="unfolds to more than 2,000,000 bytes"):
        unpack(path, f"x.{kind}", tmp_path / "out", limit=2_000_000)
    assert sum(map(len, state_of(tmp_path / "out").values())) <= 2_000_000


@pytest.mark.fault(
    "a compressed tar archive with members that nobody wants and that expand beyond its size limit",
    "refused before they are decompressed",
)
@pytest.mark.parametrize("way", ["gz", "bz2", "xz"])
def test_members_that_are_passed_over_count_too(tmp_path, way):
    files = {"__MACOSX/x": bytes(40_000_000), "other/x": bytes(40_000_000), "data/a": b"x"}
    path = make_tar(tmp_path / "x", files, mode=f"w:{way}")
    assert unpack(path, f"x.tar.{way}", tmp_path / "all", "data", limit=80_000_000) == 1
    with pytest.raises(SourceError, match="unfolds to more than 50,000,000 bytes"):
        unpack(path, f"x.tar.{way}", tmp_path / "out", "data", limit=50_000_000)
    path = make_tar(tmp_path / "y", files)
    assert unpack(path, "y.tar", tmp_path / "plain", "data", limit=1) == 1  # its bytes cost nothing


def test_headers_do_not_count_as_content(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_READ", 100_000)
    path = make_tar(tmp_path / "x", {f"{number}": b"x" for number in range(500)}, mode="w:gz")
    assert unpack(path, "x.tar.gz", tmp_path / "out", limit=500) == 500


def test_without_a_limit_the_size_of_the_archive_sets_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FLOOR", 100_000)
    path = make_zip(tmp_path / "x.zip", {"zeros": bytes(3_000_000)})
    with pytest.raises(SourceError, match="unfolds to more than"):
        unpack(path, "x.zip", tmp_path / "out")


def test_a_tar_cannot_make_the_reader_take_a_name_of_gigabytes(tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**31
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(header.tobuf() + bytes(10_000)))
    with pytest.raises(SourceError, match="announces a name of 2,147,483"):
        unpack(path, "x.tar.gz", tmp_path / "out")


def test_lists_of_members_without_end_are_refused(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "x.zip")
    monkeypatch.setattr(module, "MAX_MEMBERS", 3)
    for made, name in ((path, "x.zip"), (make_tar(tmp_path / "x.tar"), "x.tar")):
        with pytest.raises(SourceError, match="more than 3 members"):
            unpack(made, name, tmp_path / f"out {name}")
    content = bytearray(path.read_bytes())
    place = content.rfind(b"PK\5\6") + 12
    content[place : place + 4] = struct.pack("<L", 2**30)
    path.write_bytes(content)
    with pytest.raises(SourceError, match="list of members has 1,073,741,824 bytes"):
        unpack(path, "x.zip", tmp_path / "large")


def test_a_file_and_a_folder_of_one_name_and_too_many_folders_are_refused(tmp_path):
    with pytest.raises(SourceError, match="a file and a folder"):
        unpack(make_tar(tmp_path / "a", {"x": b"", "x/y": b""}), "a.tar", tmp_path / "one")
    with pytest.raises(SourceError, match="40 folders deep"):
        unpack(make_tar(tmp_path / "b", {"x/" * 39 + "y": b""}), "b.tar", tmp_path / "two")


@pytest.mark.fault("a truncated or corrupt archive", "refused when it is unpacked")
@pytest.mark.parametrize("kind", [".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz"])
def test_what_is_damaged_is_noticed(tmp_path, kind):
    whole = make(kind, tmp_path / "x").read_bytes()
    end = (
        len(whole.rstrip(b"\0")) if kind == ".tar" else len(whole)
    )  # a tar ends in zeros, the more the better
    cuts = [whole[:number] for number in (*range(0, end, max(end // 40, 1)), end - 1)]
    flipped = bytearray(whole)
    flipped[whole.find(b"two") if kind == ".tar" else len(whole) // 3] ^= 0xFF
    if kind == ".tar":  # a tar has sums of its headers alone
        flipped[1024 + 100] ^= 0xFF
    for number, content in enumerate([*cuts, bytes(flipped), b"", b"no archive"]):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(SourceError, match="not an intact archive"):
            unpack(tmp_path / "x", f"x{kind}", tmp_path / f"out {number}")


def test_what_the_system_refuses_is_told_as_such(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        unpack(make_zip(tmp_path / "x.zip"), "x.zip", tmp_path / "file" / "out")


def test_a_folder_takes_in_what_is_new_and_keeps_what_it_has(tmp_path):
    made, target = tmp_path / "made", tmp_path / "data"
    for name in ("a/1", "a/2", "b/c/3", "done"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text("new")
    (target / "a").mkdir(parents=True)
    (target / "a" / "1").write_text("own")
    move_in(made, target)
    assert state_of(target) == {"a/1": b"own", "a/2": b"new", "b/c/3": b"new", "done": b"new"}


@pytest.mark.fault(
    "an interruption while unpacked files are moved into their folder",
    "the file that marks them as complete is moved last",
)
def test_what_tells_that_all_is_there_comes_last(tmp_path, monkeypatch):
    names = ("A/z", "lists/a", "lists/done", "lists/z", "z")
    order = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: (order.append(Path(new).name), rename(old, new)))
    for name in names:
        for root in ("made", "data"):
            (tmp_path / root / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / name).write_text("new")
    move_in(tmp_path / "made", tmp_path / "data", [tmp_path / "data" / "lists" / "done"])
    assert order == ["z", "z", "a", "z", "done"]
