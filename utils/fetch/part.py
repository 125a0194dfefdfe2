"""What has come of a file so far, and where from: `NAME.part` and `NAME.part.json` beside the target."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

from utils.config.files import refusals, write_text_atomically
from utils.errors import UserError
from utils.fetch.web import Answer

_GIBI = 2**30


class Part:
    """The beginning of a file."""

    def __init__(self, target: Path) -> None:
        """Takes up what an earlier attempt has left beside the target."""
        self.path = target.with_name(f"{target.name}.part")
        self._note_path = target.with_name(f"{target.name}.part.json")
        with refusals("cannot be written", target):
            target.parent.mkdir(parents=True, exist_ok=True)
        self.size = self.path.stat().st_size if os.path.isfile(self.path) else 0
        self._note = self._read_note()

    def keep_if_usable(self, url: str, has_checksum: bool, size: int) -> None:
        """Throws away what cannot be gone on with from this address.

        Of another source, or without anything that stands for its content, it can only where a checksum
        tells in the end whether the pieces belong together.
        """
        fits = not size or self.size <= size
        if not (fits and (has_checksum or self.validator_of(url))):
            self.forget()

    def validator_of(self, url: str) -> str:
        """What stands for the content that the piece is of, at that address; empty where nothing does."""
        return str(self._note.get("validator", "")) if self._note.get("url") == url else ""

    def begin(self, url: str, answer: Answer, has_checksum: bool) -> None:
        """Makes ready for an answer: notes its source, and starts anew where it brings the whole.

        Raises:
            UserError: there is no room for the rest.
        """
        of_this = self._note.get("url") == url or has_checksum
        if answer.start != self.size or not of_this:
            self.forget()
        if answer.total is not None:
            check_room(self.path.parent, answer.total - self.size, self.path.name)
        self._note = {"url": url, "validator": answer.validator}
        write_text_atomically(self._note_path, json.dumps(self._note))

    def open(self) -> BinaryIO:
        """The file, to be added to."""
        with refusals("cannot be written", self.path):
            return open(self.path, "ab")

    def forget(self) -> None:
        """Throws everything away."""
        self.path.unlink(missing_ok=True)
        self._note_path.unlink(missing_ok=True)
        self.size, self._note = 0, {}

    def become(self, target: Path) -> None:
        """Gives the whole file its name."""
        with open(self.path, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(self.path, target)
        self._note_path.unlink(missing_ok=True)

    def _read_note(self) -> dict[str, Any]:
        try:
            note = json.loads(self._note_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}


def free_bytes(folder: Path) -> int:
    """The room on the disk of a folder, which need not be there yet."""
    folder = Path(os.path.abspath(folder))
    there = next(place for place in (folder, *folder.parents) if os.path.isdir(place))
    return shutil.disk_usage(there).free


def check_room(folder: Path, needed: int, what: str) -> None:
    """Passes where a disk has room for so many bytes.

    Raises:
        UserError: it has not.
    """
    if (free := free_bytes(folder)) < needed:
        raise UserError(
            f"{what} needs {needed / _GIBI:.1f} GiB and {free / _GIBI:.1f} GiB are free",
            folder,
            "make room, or name another place",
        )
