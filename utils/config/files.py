"""Files that are whole or not there, folders that belong to one run, and the user's cache folder."""

from __future__ import annotations

import os
import re
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, cast

from utils.errors import UserError

if sys.platform != "win32":
    import fcntl

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")  # see `replace_atomically`
CLAIM_NAME = ".lock"  # of the file that is locked in a claimed folder
_claims: dict[Path, BinaryIO] = {}  # held until the process ends


def replace_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Puts a file in its place at once: `write` fills one beside it, which is synced and renamed.

    Whatever goes wrong before the renaming leaves the old file as it was and nothing beside it; after a
    SIGKILL there is, see `remove_unfinished`.

    Raises:
        UserError: the system refuses to write there (no room, no permission, no such folder).
    """
    # Not tempfile.mkstemp, which gives files that only their owner may read, whatever the umask.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with refusals("cannot be written", path):
        try:
            with open(beside, "xb") as stream:
                remembering = _Remembering(stream)
                try:
                    write(cast(BinaryIO, remembering))
                except Exception as error:
                    # torch.save hides a full disk behind an error of its own.
                    raise remembering.refused or error from error
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(beside, path)
            sync_folder(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes a renaming last through a power cut; where a system does not sync folders, it needs no help."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(opened)
    except OSError:
        pass
    finally:
        os.close(opened)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes have left of files they were writing.

    For a folder that nobody else is writing into: see `claim_folder`.
    """
    with refusals("cannot be tidied up", folder):
        for path in folder.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)


def claim_folder(folder: Path) -> None:
    """Reserves a run's folder for this process until it ends, however it ends; on Windows does nothing.

    Raises:
        UserError: another process has it, or nothing can be written there.
    """
    if not try_claim(folder):
        fix = "wait for it, stop it, or give this run another --name"
        raise UserError("another process is writing into this run's folder", folder, fix)


def try_claim(folder: Path) -> bool:
    """As `claim_folder`, but says False where another process has the folder."""
    if sys.platform == "win32" or folder.resolve() in _claims:
        return True
    with refusals("the run's folder cannot be written into", folder):
        stream = open_lock(folder / CLAIM_NAME)
    is_locked = take_lock(stream)
    if is_locked:
        _claims[folder.resolve()] = stream
    else:
        stream.close()
    return is_locked is not False


def release_folder(folder: Path) -> None:
    """Gives up a claim before the process ends; nothing where there is none."""
    stream = _claims.pop(folder.resolve(), None)
    if stream is not None:
        stream.close()


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[bool]:
    """Within it no other process is within it with the same lock file, on whatever machine; waits for that.

    Gives False where the system or the disk knows no locks. A process that dies lets go of it.

    Raises:
        UserError: the lock file cannot be written, or is a link or a pipe.
    """
    with refusals("cannot be written", lock):
        stream = open_lock(lock)
    try:
        yield take_lock(stream, waits=True) is True
    finally:
        stream.close()


def open_lock(path: Path) -> BinaryIO:
    """Opens a lock file, which is made where there is none; closing it unlocks it.

    Raises:
        OSError: the system refuses, or something of that name is no regular file.
    """
    stream = open(path, "ab", opener=_opened_here)
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(0, "it is no regular file")
    return stream


def take_lock(stream: BinaryIO, waits: bool = False) -> bool | None:
    """Locks a file of `open_lock` for this process: True when it has it, False while another one does.

    None where the system or the disk knows no locks. waits: until the other process lets go of it.
    """
    if sys.platform == "win32":
        return None
    try:
        # Not flock: processes that this one has forked would hold it on when this one is killed.
        fcntl.lockf(stream, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _opened_here(path: str, flags: int) -> int:
    """Opens no pipe that waits for somebody, and makes no file elsewhere through a link."""
    beside = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)  # Windows has neither
    return os.open(path, flags | beside, 0o666)


@contextmanager
def refusals(what: str, path: Path) -> Iterator[None]:
    """Turns what the system refuses within it into a UserError that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise _refused(what, path, error) from error


class _Remembering:
    """A stream that keeps the error with which the system refused a write."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.refused: OSError | None = None

    def write(self, content: bytes) -> int:
        """Writes and gives the number of bytes."""
        try:
            return self._stream.write(content)
        except OSError as error:
            self.refused = self.refused or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def read_regular(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file; a pipe of the same name would be waited for without end.

    Raises:
        OSError, ValueError: it cannot be read, is no regular file, or has more than `most` bytes.
    """
    with open(path, "rb", buffering=0, opener=_opened_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is no regular file")
        if status.st_size > most:
            raise OSError(0, f"it has more than {most >> 20} MiB")
        return file.readall()


def _opened_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def last_written(path: Path) -> int:
    """When a file was written last, in nanoseconds; 0 where it has gone or is a link to nothing."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def write_text_atomically(path: Path, text: str) -> None:
    """Writes text as UTF-8, whole or not at all.

    Raises:
        UserError: as `replace_atomically`.
    """
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all.

    Raises:
        UserError: as `replace_atomically`.
    """

    def write(stream: BinaryIO) -> None:
        stream.write(content)

    replace_atomically(path, write)


def next_run_folder(project: Path, name: str, exist_ok: bool = False) -> Path:
    """Makes a run's folder and gives it: project/name, else name2, name3, ...

    With `exist_ok` it is project/name, new or not. The folder is claimed by making it, so that two
    runs that begin at the same moment never share one.

    Raises:
        UserError: the system refuses to make it.
    """
    first = project / name
    with refusals("the run's folder cannot be made", first):
        first.parent.mkdir(parents=True, exist_ok=True)
        if exist_ok:
            first.mkdir(exist_ok=True)
            return first
        return next(folder for folder in _numbered(first) if _made(folder))


def run_folder_to_come(project: Path, name: str, exist_ok: bool = False) -> Path:
    """The folder that `next_run_folder` would give now; makes nothing."""
    first = project / name
    return first if exist_ok else next(folder for folder in _numbered(first) if not os.path.lexists(folder))


def _numbered(first: Path) -> Iterator[Path]:
    """exp, exp2, exp3, ..."""
    yield first
    yield from (first.with_name(f"{first.name}{number}") for number in count(2))


def user_cache_dir() -> Path:
    """Where indexes and disk caches go: $YOLO_CACHE_DIR, else yolov5-distillation in the cache folder."""
    chosen = os.environ.get("YOLO_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "yolov5-distillation"


def _made(folder: Path) -> bool:
    """Makes a folder; False where there is something of that name."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _refused(what: str, path: Path, error: OSError) -> UserError:
    return UserError(f"{what} ({error.strerror or error})", path, "make room, mend it or name another place")
