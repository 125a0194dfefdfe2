"""A file from the network: from the first source that has it whole, continued where it broke off.

Only http and https are spoken. What has come so far lies beside the target as `NAME.part`, with a note
of where it came from, and goes on from there at the next attempt, in this process or a later one.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from utils.config.files import refusals, sync_folder
from utils.errors import UsageError, UserError
from utils.fetch.part import Part, free_bytes
from utils.fetch.progress import TransferBar
from utils.fetch.web import Answer, BrokenError, SourceError, open_address

MIRROR = "YOLO_MIRROR"
FETCH_INTERRUPTED = "interrupted; the same command goes on"
_CHUNK = 2**18
_RESERVE = 2**30  # bytes of the disk that a file of unknown size leaves free


@dataclass(frozen=True)
class Remote:
    """A file and where it can be had.

    name: what it is called here. urls: its sources, the best first. size: in bytes, 0 where nobody
    knows it exactly. md5, sha256: hexadecimal, empty where none is known.
    """

    name: str
    urls: tuple[str, ...]
    size: int = 0
    md5: str = ""
    sha256: str = ""

    @property
    def has_checksum(self) -> bool:
        """Whether its bytes can be told from any others."""
        return bool(self.md5 or self.sha256)

    def sources(self) -> tuple[str, ...]:
        """The addresses to ask in turn; the user's own mirror ($YOLO_MIRROR/NAME) goes before all others.

        Raises:
            UsageError: the mirror is no http or https address.
        """
        mirror = os.environ.get(MIRROR, "").strip()
        if not mirror:
            return self.urls
        if urlsplit(mirror).scheme not in ("http", "https") or not urlsplit(mirror).netloc:
            raise UsageError(f"'{mirror}' is no address", f"${MIRROR}", "it starts with http:// or https://")
        return (f"{mirror.rstrip('/')}/{quote(self.name)}", *self.urls)


@dataclass(frozen=True)
class Patience:
    """How long a source may take.

    seconds: for the connection, for the answer to begin, and between two pieces of it. window, least: a
    source that sends fewer than `least` bytes in `window` seconds has stalled. attempts: in a row that
    bring nothing more. pause: seconds before the second attempt, twice as long before each further one.
    """

    seconds: float = 15.0
    window: float = 60.0
    least: int = 2**16
    attempts: int = 3
    pause: float = 1.0


PATIENCE = Patience()


def fetch(
    remote: Remote,
    target: Path,
    accept: Callable[[Path], object],
    by_hand: Path,
    patience: Patience = PATIENCE,
) -> None:
    """Puts a file in its place, whole: complete, with its checksum right, and to the liking of `accept`.

    accept: gets the file under its temporary name; raises SourceError where it is no good, then the next
        source has its turn.
    by_hand: where a person may put the file instead, for the message.

    Raises:
        UserError: no source has it, or the system refuses to write.
    """
    part = Part(target)
    failures = []
    for url in remote.sources():
        try:
            _from_source(remote, url, part, accept, patience)
        except SourceError as error:
            failures.append(f"{urlsplit(url).hostname}: {error}")
            continue
        with refusals("cannot be written", target):
            part.become(target)
        sync_folder(target.parent)
        return
    fix = f"try again, or get it from {remote.urls[0]} by other means and put it at {by_hand}"
    raise UserError(f"cannot be fetched ({'; '.join(dict.fromkeys(failures))})", remote.name, fix)


def check_content(remote: Remote, path: Path) -> None:
    """Passes a file of the right size and with the right checksum, as far as these are known.

    Raises:
        SourceError: it is another one.
    """
    size = path.stat().st_size
    if remote.size and size != remote.size:
        raise SourceError(f"has {size:,} bytes and not {remote.size:,}")
    for kind, wanted in (("md5", remote.md5), ("sha256", remote.sha256)):
        if wanted and (found := _digest(path, kind)) != wanted.lower():
            raise SourceError(f"its {kind} is {found} and not {wanted.lower()}")


def _from_source(
    remote: Remote, url: str, part: Part, accept: Callable[[Path], object], patience: Patience
) -> None:
    """Completes the part from one source; what turns out to be wrong is thrown away.

    Where a piece of an earlier attempt was in it, it is fetched once more from the beginning.
    """
    while True:
        was_there = _complete(remote, url, part, patience)
        try:
            check_content(remote, part.path)
            accept(part.path)
            return
        except SourceError:
            part.forget()
            if not was_there:
                raise


def _complete(remote: Remote, url: str, part: Part, patience: Patience) -> bool:
    """Goes on until all has come; whether anything was there before.

    Raises:
        SourceError: the source has it not, or breaks off again and again.
    """
    part.keep_if_usable(url, remote.has_checksum, remote.size)
    was_there = part.size > 0
    most, failures = part.size, 0
    with TransferBar(remote.size or None, remote.name, part.size) as bar:
        while not (remote.size and part.size == remote.size):
            try:
                with open_address(url, part.size, part.validator_of(url), patience.seconds) as answer:
                    _take(answer, remote, url, part, patience, bar)
                break
            except BrokenError as error:
                if error.anew:
                    part.forget()
                # A source without ranges starts again from nothing: that is no progress.
                failures = 0 if part.size >= most + patience.least else failures + 1
                most = max(most, part.size)
                if failures >= patience.attempts:
                    raise SourceError(f"{error}, after {part.size:,} bytes") from error
                time.sleep(patience.pause * 2 ** max(failures - 1, 0))
    return was_there


def _take(answer: Answer, remote: Remote, url: str, part: Part, patience: Patience, bar: TransferBar) -> None:
    """Adds what an answer brings to the part.

    Raises:
        BrokenError: it ended too early or came too slowly.
        SourceError: it is another file.
    """
    if answer.is_complete:
        return
    if remote.size and answer.total not in (None, remote.size):
        raise SourceError(f"has {answer.total:,} bytes and not {remote.size:,}")
    part.begin(url, answer, remote.has_checksum)
    limit = answer.total or remote.size or max(free_bytes(part.path.parent) - _RESERVE, 0)
    bar.reset(total=remote.size or answer.total)
    bar.update(part.size)
    with part.open() as stream:
        since, came = time.monotonic(), 0
        while piece := answer.read(_CHUNK):
            if part.size + len(piece) > limit:
                raise SourceError(f"sends more than {limit:,} bytes")
            with refusals("cannot be written", part.path):
                stream.write(piece)
                stream.flush()
            part.size += len(piece)
            came += len(piece)
            bar.update(len(piece))
            if (now := time.monotonic()) - since > patience.window:
                if came < patience.least:
                    raise BrokenError(f"sends fewer than {patience.least:,} bytes in {patience.window:g} s")
                since, came = now, 0
    if answer.total is not None and part.size < answer.total:
        raise BrokenError(f"the connection ended {answer.total - part.size:,} bytes too early")


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as stream, TransferBar(path.stat().st_size, f"checking {path.stem}") as bar:
        while piece := stream.read(2**20):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()
