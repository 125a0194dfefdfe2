"""The public weight files of YOLOv5: names, locations and download."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from utils.errors import UserError
from utils.fetch.lock import exclusive_lock
from utils.fetch.transfer import Remote, fetch
from utils.fetch.web import SourceError

NAMES = tuple(f"yolov5{size}{head}.pt" for head in ("", "6") for size in "nsmlx")
# Newest first. Not v5.0: its files have the same names but other networks.
_RELEASES = tuple(
    f"https://github.com/ultralytics/yolov5/releases/download/{tag}"
    for tag in ("v7.0", "v6.2", "v6.1", "v6.0")
)
FOLDER = Path("weights")


def place_of(given: Path, project_folder: Path) -> Path | None:
    """Return the path where a public file belongs; None if it is not public or its folder doesn't exist.

    A bare name belongs in `weights` in the working directory if that exists, else in `project_folder`.
    """
    if given.name not in NAMES:
        return None
    if given.parent in (Path(), FOLDER):
        return (FOLDER if os.path.isdir(FOLDER) else project_folder) / given.name
    return given if os.path.isdir(given.parent) else None


def fetch_public_file(
    target: Path, read: Callable[[Path], object], say: Callable[[str], None] = print
) -> Path:
    """Download a public file; it is moved to `target` only after `read` has accepted it.

    No checksums are published for these files: the zip's own CRCs show whether it is complete, and the
    reader executes nothing in it whatever it contains. Of several processes only one downloads.

    Raises:
        UserError: no source has the file, or it cannot be written.
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
