"""Download of a file from the first source that provides all of it, resuming interrupted transfers.

Only http and https are supported. A partial download is kept beside the target as `NAME.part`, with a
note of its source, and continued at the next attempt, in this process or a later one.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from utils.bars import ProgressBar
from utils.config.files import refusals, sync_folder
from utils.errors import UsageError, UserError
from utils.fetch.part import Part, free_bytes
from utils.fetch.web import Answer, BrokenError, SourceError, open_address

MIRROR = "YOLO_MIRROR"
FETCH_INTERRUPTED = "interrupted; the same command goes on"
_CHUNK = 2**18
_RESERVE = 2**30  # bytes of the disk that a download of unknown size leaves free


@dataclass(frozen=True)
class Remote:
    """A file to download.

    name: its local name. urls: its sources, in order of preference. size: exact size in bytes, 0 if unknown.
    md5, sha256: hexadecimal, empty if unknown.
    """

    name: str
    urls: tuple[str, ...]
    size: int = 0
    md5: str = ""
    sha256: str = ""

    @property
    def has_checksum(self) -> bool:
        """Whether a checksum of the content is known."""
        return bool(self.md5 or self.sha256)

    def sources(self) -> tuple[str, ...]:
        """Return the addresses to try in turn, starting with the user's mirror ($YOLO_MIRROR/NAME), if set.

        Raises:
            UsageError: if the mirror is not an http or https address.
        """
        mirror = os.environ.get(MIRROR, "").strip()
        if not mirror:
            return self.urls
        if urlsplit(mirror).scheme not in ("http", "https") or not urlsplit(mirror).netloc:
            raise UsageError(
                f"'{mirror}' is not an address", f"${MIRROR}", "it starts with http:// or https://"
            )
        return (f"{mirror.rstrip('/')}/{quote(self.name)}", *self.urls)


@dataclass(frozen=True)
class Patience:
    """Timeouts and retries.

    seconds: timeout of the connection, the start of the response and each read. window, least: a source
    that sends fewer than `least` bytes in `window` seconds has stalled. attempts: failures in a row without
    progress before giving up. pause: seconds before the second attempt, doubled before each further one.
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
    """Download a file to `target`, once it is complete, its checksum matches, and `accept` passes.

    accept: called with the file under its temporary name; raises SourceError to reject it, after which the
        next source is tried.
    by_hand: where the user may put the file instead, for the message.

    Raises:
        UserError: if no source provides it, or the system refuses to write.
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
    """Check the size and checksums of a file, as far as they are known.

    Raises:
        SourceError: if they do not match.
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
    """Complete the part from one source; discards it if its content is rejected.

    If it contained a piece from an earlier attempt, it is downloaded once more from the beginning.
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
    """Download the rest of the part, with retries; returns whether there was anything before.

    Raises:
        SourceError: if the source does not have the file, or fails repeatedly.
    """
    part.keep_if_usable(url, remote.has_checksum, remote.size)
    was_there = part.size > 0
    most, failures = part.size, 0
    with ProgressBar(None, remote.size or None, remote.name, initial=part.size, unit="B") as bar:
        while not (remote.size and part.size == remote.size):
            try:
                with open_address(url, part.size, part.validator_of(url), patience.seconds) as answer:
                    _take(answer, remote, url, part, patience, bar)
                break
            except BrokenError as error:
                if error.anew:
                    part.forget()
                # A source without range requests starts over each time: compare with the largest size so far.
                failures = 0 if part.size >= most + patience.least else failures + 1
                most = max(most, part.size)
                if failures >= patience.attempts:
                    raise SourceError(f"{error}, after {part.size:,} bytes") from error
                time.sleep(patience.pause * 2 ** max(failures - 1, 0))
    return was_there


def _take(answer: Answer, remote: Remote, url: str, part: Part, patience: Patience, bar: ProgressBar) -> None:
    """Append the content of a response to the part.

    Raises:
        BrokenError: if it ends too early or arrives too slowly.
        SourceError: if its size differs from the expected one.
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
    with (
        open(path, "rb") as stream,
        ProgressBar(None, path.stat().st_size, f"checking {path.stem}", unit="B") as bar,
    ):
        while piece := stream.read(2**20):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()
