"""A partial download and its source: `NAME.part` and `NAME.part.json` beside the target."""

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
    """A partially downloaded file."""

    def __init__(self, target: Path) -> None:
        """Load what an earlier attempt has left beside the target."""
        self.path = target.with_name(f"{target.name}.part")
        self._note_path = target.with_name(f"{target.name}.part.json")
        with refusals("cannot be written", target):
            target.parent.mkdir(parents=True, exist_ok=True)
        self.size = self.path.stat().st_size if os.path.isfile(self.path) else 0
        self._note = self._read_note()

    def keep_if_usable(self, url: str, has_checksum: bool, size: int) -> None:
        """Discard the part if it cannot be continued from this address.

        A part from another source or without a validator can be continued only if a checksum verifies at the
        end that the pieces belong together. `size`: of the whole file, 0 if unknown.
        """
        fits = not size or self.size <= size
        if not (fits and (has_checksum or self.validator_of(url))):
            self.forget()

    def validator_of(self, url: str) -> str:
        """Return the validator (ETag or date) of the part's content at that address; empty if unknown."""
        return str(self._note.get("validator", "")) if self._note.get("url") == url else ""

    def begin(self, url: str, answer: Answer, has_checksum: bool) -> None:
        """Prepare for a response: record its source, and start over if it does not continue the part.

        Raises:
            UserError: if the disk is too full for the rest.
        """
        of_this = self._note.get("url") == url or has_checksum
        if answer.start != self.size or not of_this:
            self.forget()
        if answer.total is not None:
            check_room(self.path.parent, answer.total - self.size, self.path.name)
        self._note = {"url": url, "validator": answer.validator}
        write_text_atomically(self._note_path, json.dumps(self._note))

    def open(self) -> BinaryIO:
        """Open the file for appending."""
        with refusals("cannot be written", self.path):
            return open(self.path, "ab")

    def forget(self) -> None:
        """Discard the part."""
        self.path.unlink(missing_ok=True)
        self._note_path.unlink(missing_ok=True)
        self.size, self._note = 0, {}

    def become(self, target: Path) -> None:
        """Sync the completed file and rename it to the target."""
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
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    folder = Path(os.path.abspath(folder))
    there = next(place for place in (folder, *folder.parents) if os.path.isdir(place))
    return shutil.disk_usage(there).free


def check_room(folder: Path, needed: int, what: str) -> None:
    """Check that the disk of a folder has `needed` free bytes.

    Raises:
        UserError: if it has not.
    """
    if (free := free_bytes(folder)) < needed:
        raise UserError(
            f"{what} needs {needed / _GIBI:.1f} GiB and {free / _GIBI:.1f} GiB are free",
            folder,
            "make room, or name another place",
        )
