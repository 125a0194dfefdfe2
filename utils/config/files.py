"""Files that are whole or not there, folders that belong to one run, and the user's cache folder."""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from utils.errors import UserError

if sys.platform != "win32":
    import fcntl

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")  # see `replace_atomically`
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
    if sys.platform == "win32" or folder.resolve() in _claims:
        return
    with refusals("the run's folder cannot be written into", folder):
        stream = open(folder / ".lock", "ab")  # noqa: SIM115 - held open: that is the claim
    try:
        # Not flock: processes that this one has forked would hold it on when this one is killed.
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        fix = "wait for it, stop it, or give this run another --name"
        raise UserError("another process is writing into this run's folder", folder, fix) from error
    except OSError:  # a network disk that knows no locks
        stream.close()
        return
    _claims[folder.resolve()] = stream


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


def write_text_atomically(path: Path, text: str) -> None:
    """Writes text as UTF-8, whole or not at all.

    Raises:
        UserError: as `replace_atomically`.
    """

    def write(stream: BinaryIO) -> None:
        stream.write(text.encode("utf-8"))

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
        folder, number = first, 1
        while not _made(folder):
            number += 1
            folder = first.with_name(f"{first.name}{number}")
        return folder


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
