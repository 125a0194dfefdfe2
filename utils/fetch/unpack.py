"""Safe unpacking of untrusted archives: writes only regular files and folders within the target folder.

The files go into a new folder. The caller renames it when everything is done (`move_in`), so that a killed
process leaves no folder that looks complete.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, cast

from utils.bars import ProgressBar
from utils.config.files import refusals
from utils.fetch.web import SourceError

MAX_MEMBERS = 2_000_000
_MAX_PARTS = 32  # nested folders in the path of a member
_MAX_READ = 16 * 2**20  # bytes of a single read by tarfile: long names and the like are shorter
_MAX_DIRECTORY = 512 * 2**20  # bytes of a zip's central directory
_HEADERS = 2**12  # bytes of a tar's headers and padding a member
_CHUNK = 2**20
_RATIO, _FLOOR = 100, 64 * 2**20  # default limit: this factor of the archive's size, at least this many bytes
_DRIVE = re.compile(r"^[A-Za-z]:")
_JUNK = frozenset({"__MACOSX", ".DS_Store"})
# The exceptions that reading a damaged archive may raise.
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    LookupError,
    OverflowError,
)


@dataclass(frozen=True)
class _Member:
    """A file of an archive: the parts of its path, its declared size, and the archive's handle for it."""

    parts: tuple[str, ...]
    size: int
    handle: Any


def unpack(archive: Path, name: str, folder: Path, take: str = "", limit: int = 0) -> int:
    """Unpack an archive into a new folder and return the number of files.

    name: name of the archive, whose suffix tells a zip from a tar. take: a folder inside, of which only the
    content is unpacked; its parts may be patterns, as in `*/data`. limit: bytes that it may unpack to, 0 for
    a default limit.

    Raises:
        SourceError: if it is damaged or malicious; files unpacked so far are left in place.
        UserError: if the system refuses to write.
    """
    limit = limit or max(archive.stat().st_size * _RATIO, _FLOOR)
    with refusals("cannot be written", folder):
        folder.mkdir(parents=True)
    is_zip = name.lower().endswith(".zip")
    wanted = tuple(take.split("/")) if take else ()
    count = written = 0
    with (
        _damage_told(),
        _members_of_zip(archive) if is_zip else _members_of_tar(archive, limit) as (members, read),
        ProgressBar(None, None, f"unpacking {name}", unit="B") as bar,
    ):
        for member in members:
            inner = _inner_path(member.parts, wanted)
            if inner is None:
                continue
            with read(member) as stream:
                for piece in _pieces(stream, folder.joinpath(*inner)):
                    written += piece
                    bar.update(piece)
                    if written > limit:
                        raise _too_large(limit)
            count += 1
    if not count:
        raise SourceError(f"it holds no file{f' in {take}' if take else ''}")
    return count


def _too_large(limit: int) -> SourceError:
    return SourceError(f"refused: it unfolds to more than {limit:,} bytes")


def move_in(source: Path, target: Path, last: Sequence[Path] = ()) -> None:
    """Move the content of a folder into another one, keeping files that already exist there.

    last: paths in the target that are moved last: if they exist, everything does.

    Raises:
        UserError: if the system refuses.
    """
    with refusals("cannot be written", target):
        _move(source, target, tuple(last))


def _move(source: Path, target: Path, last: tuple[Path, ...]) -> None:
    if not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)
    elif source.is_dir() and target.is_dir():
        waits = {entry for path in last for entry in (path, *path.parents)}
        for child in sorted(source.iterdir(), key=lambda entry: (target / entry.name in waits, entry.name)):
            _move(child, target / child.name, last)


@contextmanager
def _damage_told() -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise SourceError(
            f"it is not an intact archive ({str(error)[:200] or type(error).__name__})"
        ) from error
    except OSError as error:  # from gzip and bz2: the system's own are UserErrors by now
        raise SourceError(f"it is not an intact archive ({error.strerror or error})") from error


def _inner_path(parts: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the target path of a member, None if it is not wanted."""
    if not _JUNK.isdisjoint(parts) or len(parts) <= len(wanted):
        return None
    if not all(fnmatchcase(part, pattern) for part, pattern in zip(parts, wanted, strict=False)):
        return None
    return parts[len(wanted) :]


def _parts_of(name: str) -> tuple[str, ...]:
    """Split the name of a member into its folders and its file name.

    Raises:
        SourceError: if it leads out of the folder or is nested too deep.
    """
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or "\\" in name or "\0" in name or _DRIVE.match(name) or ".." in parts:
        raise SourceError(f"refused: member {name[:200]!r} leads out of the folder")
    if len(parts) > _MAX_PARTS:
        raise SourceError(f"refused: a member lies {len(parts)} folders deep")
    return parts


def _pieces(stream: IO[bytes], path: Path) -> Iterator[int]:
    """Write a stream to a file, yielding the size of each chunk before it is written."""
    with refusals("cannot be written", path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            out = open(path, "wb")  # noqa: SIM115 - closed below; errors of reading are other errors
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise SourceError(f"refused: {path.name!r} is a file and a folder in it") from error
    with out:
        while piece := stream.read(_CHUNK):
            yield len(piece)
            with refusals("cannot be written", path):
                out.write(piece)
        with refusals("cannot be written", path):
            out.flush()


@contextmanager
def _members_of_zip(path: Path) -> Iterator[tuple[Iterator[_Member], Any]]:
    _check_directory(path)
    with zipfile.ZipFile(path) as archive:
        yield _listed_zip(archive), lambda member: archive.open(member.handle)


def _listed_zip(archive: zipfile.ZipFile) -> Iterator[_Member]:
    entries = archive.infolist()
    if len(entries) > MAX_MEMBERS:
        raise SourceError(f"refused: it has more than {MAX_MEMBERS:,} members")
    for entry in entries:
        parts = _parts_of(entry.filename)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise SourceError(f"refused: member {entry.filename[:200]!r} is a link or a device")
        if entry.flag_bits & 1:
            raise SourceError(f"member {entry.filename[:200]!r} is encrypted")
        if parts and not entry.is_dir() and kind != stat.S_IFDIR:
            yield _Member(parts, entry.file_size, entry)


def _check_directory(path: Path) -> None:
    """Check that the central directory of a zip is small enough to read.

    Raises:
        SourceError: if it is implausibly large, or missing.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        stream.seek(max(size - 2**16 - 22, 0))
        tail = stream.read()
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) < place + 22:
        raise SourceError("it is not an intact archive (the end of a zip is missing)")
    (length,) = struct.unpack("<L", tail[place + 12 : place + 16])
    large = tail.rfind(b"PK\6\6", 0, place)  # the zip64 end record precedes the usual one
    if large >= 0 and len(tail) >= large + 48:
        (length,) = struct.unpack("<Q", tail[large + 40 : large + 48])
    if length != 2**32 - 1 and length > _MAX_DIRECTORY:
        raise SourceError(f"refused: its list of members has {length:,} bytes")


@contextmanager
def _members_of_tar(path: Path, limit: int) -> Iterator[tuple[Iterator[_Member], Any]]:
    with _decompressed(path) as stream:
        reader = _LimitedReader(stream, max(limit, path.stat().st_size))
        with tarfile.open(fileobj=cast(Any, reader), mode="r:") as archive:
            yield _listed_tar(archive, reader), lambda member: archive.extractfile(member.handle)


def _listed_tar(archive: tarfile.TarFile, stream: _LimitedReader) -> Iterator[_Member]:
    for number, entry in enumerate(archive):
        if number >= MAX_MEMBERS:
            raise SourceError(f"refused: it has more than {MAX_MEMBERS:,} members")
        stream.headers += _HEADERS
        cast(Any, archive).members = []  # tarfile keeps all members: gigabytes for a malicious archive
        parts = _parts_of(entry.name)
        if entry.isdir():
            continue
        if not entry.isreg() or entry.issparse():
            raise SourceError(f"refused: member {entry.name[:200]!r} is a link, a device or full of holes")
        if parts:
            yield _Member(parts, entry.size, entry)
    # tarfile takes a damaged header, and the end of the file, for the end of the archive.
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise SourceError("it is not an intact archive (it ends in the middle)")
    # Read the padding: the checksum of a compressed stream comes after it.
    if len(stream.read(_MAX_READ)) == _MAX_READ:
        raise SourceError("refused: it goes on behind its end")


def _decompressed(path: Path) -> IO[bytes]:
    with open(path, "rb") as stream:
        start = stream.read(6)
    if start.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(path))
    if start.startswith(b"BZh"):
        return cast(IO[bytes], bz2.open(path))
    if start.startswith(b"\xfd7zXZ\0"):
        return cast(IO[bytes], lzma.open(path))
    return open(path, "rb")


class _LimitedReader:
    """A stream of a tar that limits single reads and how far it is read.

    tarfile reads a long name at once, whatever length the tar declares, and decompresses members that
    nobody reads, to get past them.
    """

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        """`limit`: bytes in all, without headers; room for those of members is added to `headers`."""
        self._stream, self._limit = stream, limit
        self.headers = _MAX_READ

    def read(self, count: int = -1) -> bytes:
        """Read the next bytes.

        Raises:
            SourceError: if `count` is implausibly large, as from a malicious tar, or the limit is reached.
        """
        if not 0 <= count <= _MAX_READ:
            raise SourceError(f"refused: it announces a name of {count:,} bytes")
        content = self._stream.read(count)
        self._check(self._stream.tell())
        return content

    def seek(self, place: int) -> int:
        """Go to a place, counted from the start.

        Raises:
            SourceError: if it is behind the limit.
        """
        self._check(place)
        return self._stream.seek(place)

    def _check(self, place: int) -> None:
        if place > self._limit + self.headers:
            raise _too_large(self._limit)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
