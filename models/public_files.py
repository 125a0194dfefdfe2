"""The public weight files of YOLOv5: their names, where they lie, and how one is fetched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from utils.errors import UserError
from utils.fetch.lock import exclusive_lock
from utils.fetch.transfer import Remote, fetch
from utils.fetch.web import SourceError

NAMES = tuple(f"yolov5{size}{head}.pt" for head in ("", "6") for size in "nsmlx")
# The newest first; files of the v5.0 release have the same names and other networks.
_RELEASES = tuple(
    f"https://github.com/ultralytics/yolov5/releases/download/{tag}"
    for tag in ("v7.0", "v6.2", "v6.1", "v6.0")
)
FOLDER = Path("weights")


def place_of(given: Path, project_folder: Path) -> Path | None:
    """Where a public file of that name belongs; None where it is no public one or there is no such folder.

    A name alone goes to `weights` in the working folder where that is there, else to the project's.
    """
    if given.name not in NAMES:
        return None
    if given.parent in (Path(), FOLDER):
        return (FOLDER if os.path.isdir(FOLDER) else project_folder) / given.name
    return given if os.path.isdir(given.parent) else None


def fetch_public_file(
    target: Path, read: Callable[[Path], object], say: Callable[[str], None] = print
) -> Path:
    """Fetches a public file to its place, where it comes only after `read` has read it.

    No checksums of them are published: the zip's own tell whether it came whole, and the reader runs
    nothing from it whatever it holds. Of several processes one fetches.

    Raises:
        UserError: no source has it, or the system refuses to write.
    """

    def accept(part: Path) -> None:
        try:
            read(part)
        except UserError as error:
            raise SourceError(f"sends no weights: {error.what}") from error

    remote = Remote(target.name, tuple(f"{release}/{target.name}" for release in _RELEASES))
    wait = f"another process is fetching {target}: waiting for it"
    with exclusive_lock(target.with_name(f".{target.name}.lock"), lambda: say(wait)):
        if not target.is_file():
            say(f"fetching {target.name} into {target.parent}")
            fetch(remote, target, accept, target)
    return target
