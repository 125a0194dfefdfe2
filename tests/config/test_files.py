"""Files that are whole or not there, and run folders that nobody shares."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.config.files import (
    claim_folder,
    last_written,
    next_run_folder,
    one_at_a_time,
    remove_unfinished,
    replace_atomically,
    run_folder_to_come,
    user_cache_dir,
    write_text_atomically,
)
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.fault(
    "writing a file fails halfway",
    "the previous file is intact; no temporary file is left",
)
def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"old")

    def break_off(stream):
        stream.write(b"half of the n")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        replace_atomically(path, break_off)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["weights.pt"]


def test_a_written_file_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text_atomically(tmp_path / "opt.yaml", "name: größer\n")
    finally:
        os.umask(before)
    assert (tmp_path / "opt.yaml").read_text(encoding="utf-8") == "name: größer\n"
    assert stat.S_IMODE((tmp_path / "opt.yaml").stat().st_mode) == 0o644


WRITER = """
import sys
from itertools import count
from pathlib import Path
from utils.config.files import replace_atomically

def fill(stream):
    for _ in range(64):  # in pieces, so that most kills come in the middle
        stream.write(bytes([number % 256]) * 4096)

for number in count():
    replace_atomically(Path(sys.argv[1]), fill)
    if number == 0:
        print("written", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
@pytest.mark.fault(
    "SIGKILL while a file is written",
    "the file is the old or the new one, complete; the temporary file is removed when the run goes on",
)
def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path, left = tmp_path / "weights.pt", 0
    for number in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == b"written\n"
            time.sleep(0.003 * number)
            writer.kill()
        content = path.read_bytes()
        assert len(content) == 64 * 4096 and len(set(content)) == 1
        left += len(list(tmp_path.iterdir())) - 1
        remove_unfinished(tmp_path)
        assert list(tmp_path.iterdir()) == [path]
    assert left  # some were killed in the middle


@pytest.mark.fault(
    "disk full, or missing folder, when a file is written",
    "one-line error with the reason; no partial file is left",
)
def test_a_full_disk_or_missing_folder_is_the_users_to_mend(tmp_path: Path) -> None:
    def full(stream):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"a\.pt: cannot be written \(No space left on device\)"):
        replace_atomically(tmp_path / "a.pt", full)
    with pytest.raises(UserError, match="No such file or directory"):
        write_text_atomically(tmp_path / "gone" / "a.txt", "")
    assert os.listdir(tmp_path) == []


TAKE = """
import sys
from pathlib import Path
from utils.config.files import next_run_folder
print("ready", flush=True)
sys.stdin.readline()
print(*(next_run_folder(Path(sys.argv[1]), "exp").name for _ in range(20)))
"""
CLAIM = """
import sys
from pathlib import Path
from utils.config.files import claim_folder
claim_folder(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
"""


def started(code: str, folder: Path) -> subprocess.Popen[str]:
    """A process that has come to where it waits for a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.fault("several runs start at the same moment", "each gets a folder of its own")
def test_runs_that_begin_together_get_a_folder_each(tmp_path: Path) -> None:
    processes = [started(TAKE, tmp_path / "runs") for _ in range(3)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    names = [name for process in processes for name in process.communicate()[0].split()]
    assert sorted(names) == sorted({"exp", *(f"exp{number}" for number in range(2, 61))})


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
@pytest.mark.fault(
    "two runs use the same folder (`--exist-ok` and the same `--name`)",
    "the second is refused; the lock of a killed run is released",
)
def test_a_folder_belongs_to_one_process_until_that_ends(tmp_path: Path) -> None:
    process = started(CLAIM, tmp_path)
    with pytest.raises(UserError, match="another process is writing"):
        claim_folder(tmp_path)
    process.kill()
    process.communicate()
    claim_folder(tmp_path)
    claim_folder(tmp_path)  # it is this process's own now


@pytest.mark.fault("a named pipe in place of a run's lock file", "refused without blocking")
def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match="cannot be written into"):
        claim_folder(tmp_path)


@pytest.mark.fault(
    "a named pipe or symlink in place of an evolution's lock file",
    "refused without blocking; nothing is created at the link's target",
)
@pytest.mark.parametrize("kind", ["pipe", "read pipe", "link"])
def test_an_odd_lock_for_one_at_a_time_is_refused(kind: str, tmp_path: Path) -> None:
    lock, elsewhere = tmp_path / ".evolve.lock", tmp_path / "elsewhere"
    lock.symlink_to(elsewhere) if kind == "link" else os.mkfifo(lock)
    reader = os.open(lock, os.O_RDONLY | os.O_NONBLOCK) if kind == "read pipe" else None
    with pytest.raises(UserError, match=r"\.evolve\.lock: cannot be written"), one_at_a_time(lock):
        pass
    if reader is not None:
        os.close(reader)
    assert os.path.lexists(lock) and not elsewhere.exists()


def test_one_at_a_time_waits_for_the_other_and_keeps_the_file(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    process = started(CLAIM, tmp_path)
    process.stdin.close()  # it ends
    with one_at_a_time(lock) as is_locked:
        assert is_locked == (sys.platform != "win32")
    assert process.wait() == 0 and lock.exists()


def test_when_a_file_was_written_is_known_where_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "file").touch()
    os.utime(tmp_path / "file", ns=(0, 5))
    assert [last_written(tmp_path / name) for name in ("file", "link", "gone", "x" * 300)] == [5, 0, 0, 0]


def test_exist_ok_takes_the_folder_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "kept.txt").write_text("kept")
    assert next_run_folder(tmp_path, "exp", exist_ok=True) == tmp_path / "exp"
    assert next_run_folder(tmp_path, "exp", exist_ok=False) == tmp_path / "exp2"
    assert (tmp_path / "exp" / "kept.txt").read_text() == "kept"


def test_a_name_may_hold_folders(tmp_path: Path) -> None:
    assert next_run_folder(tmp_path, "bccd/small") == tmp_path / "bccd" / "small"
    assert next_run_folder(tmp_path, "bccd/small") == tmp_path / "bccd" / "small2"


def test_a_file_where_the_runs_should_go_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(UserError, match=r"runs/exp: the run's folder cannot be made"):
        next_run_folder(tmp_path / "runs", "exp")


@pytest.mark.parametrize("exist_ok", [False, True])
def test_a_folder_to_come_that_cannot_be_made_is_refused_and_no_other_is_made(
    tmp_path: Path, exist_ok: bool
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"file/a/exp: the run's folder cannot be made \(Not a directory\)"):
        run_folder_to_come(tmp_path / "file" / "a", "exp", exist_ok)
    assert run_folder_to_come(tmp_path / "new" / "er", "exp", exist_ok) == tmp_path / "new" / "er" / "exp"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_folder_to_come_where_nothing_may_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # the superuser may all
    with pytest.raises(UserError, match="exp: the run's folder cannot be made"):
        run_folder_to_come(tmp_path, "exp")


def test_a_relative_folder_to_come_is_looked_up_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder_to_come(Path("runs"), "exp") == Path("runs/exp")


def test_the_cache_folder_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_CACHE_DIR", "/some/where")
    assert user_cache_dir() == Path("/some/where")
    monkeypatch.delenv("YOLO_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert user_cache_dir() == Path("/caches/yolov5-distillation")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache_dir() == Path.home() / ".cache" / "yolov5-distillation"


def test_a_process_that_holds_a_folder_ends_without_a_warning(tmp_path: Path) -> None:
    code = f"from utils.config.files import Path, claim_folder; claim_folder(Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "") and list(tmp_path.iterdir())
