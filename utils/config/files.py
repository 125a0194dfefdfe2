"""Atomic file writes, locks, exclusive run folders, and the user's cache folder."""

from __future__ import annotations

import atexit
import errno
import os
import re
import shutil
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

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")  # see `replacement`
_MAX_NAME = 200  # bytes of a name that a temporary one contains
_NO_RUN_FOLDER = "the run's folder cannot be made"
CLAIM_NAME = ".lock"  # of the file that is locked in a claimed folder
_claims: dict[Path, BinaryIO] = {}  # held until the process ends


def replace_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Replace a file atomically: `write` fills a temporary one, see `replacement`.

    Raises:
        UserError: if the system refuses to write there (disk full, no permission, no such folder).
    """
    with replacement(path) as stream:
        write(stream)


@contextmanager
def replacement(path: Path, synced: bool = True) -> Iterator[BinaryIO]:
    """Give a temporary file beside another one, which it replaces after the block, synced and renamed.

    A failure before the rename leaves the old file unchanged and removes the temporary one; after a
    SIGKILL that stays, see `remove_unfinished`. A link in its place is replaced, not followed. synced:
    False for one of many files, which a power cut may leave empty.

    Raises:
        UserError: as `replace_atomically`.
    """
    # Not tempfile.mkstemp, whose files are readable only by their owner, whatever the umask.
    beside = _unfinished_name(path)
    with refusals("cannot be written", path):
        try:
            with open(beside, "xb") as stream:
                watched = _ErrorKeepingStream(stream)
                try:
                    yield cast(BinaryIO, watched)
                except Exception as error:
                    # torch.save masks a full disk with an error of its own.
                    raise watched.refused or error from error
                stream.flush()
                if synced:
                    os.fsync(stream.fileno())
            os.replace(beside, path)
            if synced:
                sync_folder(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def _unfinished_name(path: Path) -> Path:
    """Return a new path beside another one; `_UNFINISHED` matches its name."""
    name = os.fsencode(path.name)[:_MAX_NAME].decode(errors="ignore")  # of 255 bytes, with what is added
    return path.with_name(f".{name}.{uuid.uuid4().hex[:12]}.tmp")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Give a new, empty folder beside a path, from which results are renamed; removed after the block.

    Raises:
        OSError: if it cannot be created.
    """
    beside = _unfinished_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        beside.mkdir()
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that a rename survives a power failure; does nothing where it cannot be synced."""
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
    """Remove temporary files left by killed processes.

    Only for a folder that no other process writes into: see `claim_folder`.
    """
    with refusals("cannot be tidied up", folder):
        for path in folder.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)


def claim_folder(folder: Path) -> None:
    """Reserve a run's folder for this process until it exits, for whatever reason; a no-op on Windows.

    Raises:
        UserError: if another process has reserved it, or nothing can be written there.
    """
    if not try_claim(folder):
        fix = "wait for it, stop it, or give this run another --name"
        raise UserError("another process is writing into this run's folder", folder, fix)


def try_claim(folder: Path) -> bool:
    """Reserve a folder like `claim_folder`, but return False if another process has it."""
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


@atexit.register
def _release_all() -> None:
    """Close the locks held to the end: an open file there is a ResourceWarning."""
    while _claims:
        _claims.popitem()[1].close()


def release_folder(folder: Path) -> None:
    """Release a reserved folder before the process exits; a no-op if it is not reserved."""
    stream = _claims.pop(folder.resolve(), None)
    if stream is not None:
        stream.close()


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[bool]:
    """Hold an exclusive lock, waiting for other processes, also on other machines, that hold it.

    Yields False if the system or the file system does not support locks. A process that dies releases
    its lock.

    Raises:
        UserError: if the lock file cannot be written, or is a link or a pipe.
    """
    with refusals("cannot be written", lock):
        stream = open_lock(lock)
    try:
        yield take_lock(stream, waits=True) is True
    finally:
        stream.close()


def open_lock(path: Path) -> BinaryIO:
    """Open a lock file, creating it if necessary; closing it releases the lock.

    Raises:
        OSError: if the system refuses, or the path is not a regular file.
    """
    stream = open(path, "ab", opener=_opened_here)
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(0, "it is not a regular file")
    return stream


def take_lock(stream: BinaryIO, waits: bool = False) -> bool | None:
    """Lock a file from `open_lock`; returns whether this process has the lock, False if another one does.

    None if the system or the file system does not support locks. waits: block until the other process
    releases it.
    """
    if sys.platform == "win32":
        return None
    try:
        # Not flock: forked children would keep the lock when this process is killed.
        fcntl.lockf(stream, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _opened_here(path: str, flags: int) -> int:
    """Open without blocking on a pipe, and without creating a file elsewhere by following a link."""
    beside = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)  # Windows has neither
    return os.open(path, flags | beside, 0o666)


@contextmanager
def refusals(what: str, path: Path) -> Iterator[None]:
    """Convert an OSError within the block to a UserError that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise _refused(what, path, error) from error


class _ErrorKeepingStream:
    """A stream that remembers the first OSError raised by a write."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.refused: OSError | None = None

    def write(self, content: bytes) -> int:
        """Write and return the number of bytes written."""
        try:
            return self._stream.write(content)
        except OSError as error:
            self.refused = self.refused or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def read_regular(path: str | Path, most: int) -> bytes:
    """Read a regular file; other kinds are rejected, as reading a pipe could block forever.

    Raises:
        OSError, ValueError: if it cannot be read, is not a regular file, or has more than `most` bytes.
    """
    with open(path, "rb", buffering=0, opener=_opened_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is not a regular file")
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most >> 20} MiB")
        return file.readall()


def _opened_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def last_written(path: Path) -> int:
    """Return a file's modification time in nanoseconds, 0 if it is missing or a dangling link."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def write_text_atomically(path: Path, text: str) -> None:
    """Write text as UTF-8 atomically.

    Raises:
        UserError: see `replace_atomically`.
    """
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        UserError: see `replace_atomically`.
    """

    def write(stream: BinaryIO) -> None:
        stream.write(content)

    replace_atomically(path, write)


def next_run_folder(project: Path, name: str, exist_ok: bool = False) -> Path:
    """Create a run's folder and return it: project/name, or if taken name2, name3, ...

    With `exist_ok` it is project/name, new or not. Creating the folder also claims it, so that two runs
    started at the same moment never share one.

    Raises:
        UserError: if the folder cannot be created.
    """
    first = project / name
    with refusals(_NO_RUN_FOLDER, first):
        first.parent.mkdir(parents=True, exist_ok=True)
        if exist_ok:
            first.mkdir(exist_ok=True)
            return first
        return next(folder for folder in _numbered(first) if _made(folder))


def run_folder_to_come(project: Path, name: str, exist_ok: bool = False) -> Path:
    """Return the folder that `next_run_folder` would create now, without creating it.

    Raises:
        UserError: if it could not be created.
    """
    first = project / name
    folder = first if exist_ok else next(path for path in _numbered(first) if not os.path.lexists(path))
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    with refusals(_NO_RUN_FOLDER, folder):
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return folder


def _numbered(first: Path) -> Iterator[Path]:
    """Yield exp, exp2, exp3, ..."""
    yield first
    yield from (first.with_name(f"{first.name}{number}") for number in count(2))


def user_cache_dir() -> Path:
    """Return the folder for indexes and disk caches: $YOLO_CACHE_DIR, or one in the user's cache folder.

    Raises:
        RuntimeError: if there is no home folder.
    """
    chosen = os.environ.get("YOLO_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "yolov5-distillation"


def _made(folder: Path) -> bool:
    """Create a folder; returns False if the path already exists."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _refused(what: str, path: Path, error: OSError) -> UserError:
    return UserError(f"{what} ({error.strerror or error})", path, "make room, fix it or name another place")
