"""Lookup of weight files by name."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from models.checkpoint import read_checkpoint
from models.config import FOLDER
from models.public_files import FOLDER as PUBLIC_FOLDER
from models.public_files import NAMES, fetch_public_file, place_of
from utils.config.addresses import refuse_address
from utils.config.files import last_written
from utils.config.suggestions import near_files, question
from utils.distributed import main_first
from utils.errors import UserError


def resolve_weights(name: Path | str, download: bool = False) -> Path:
    """Find a weight file: the path as given, else in `weights/`, else downloaded if it is a public one.

    `weights/` is searched for bare names only: a path with a folder means the file in that folder, and one
    of the same name elsewhere may be another network. Raises UserError for an address, or with near matches.
    """
    refuse_address(name)
    given = Path(name)
    folders = [PUBLIC_FOLDER, FOLDER.parent / "weights"]
    is_bare = given.parent in (Path(), PUBLIC_FOLDER)
    places = list(dict.fromkeys([given, *(folder / given.name for folder in folders if is_bare)]))
    public = place_of(given, folders[-1])
    with main_first():
        found = next(filter(os.path.isfile, places), None)
        if found is None and download and public is not None:
            found = fetch_public_file(public, read_checkpoint)
    if found is not None:
        return found
    if os.path.isdir(given):
        raise UserError("is a folder, not a weight file", name, "give a .pt file")
    hint = question(_proposals(given, folders), "put it there or give its path")
    if public is not None:
        hint += " (it is a public file, which is fetched without --no-download and --dry-run)"
    looked = f" (looked for {', '.join(map(str, places))})" if len(places) > 1 else ""
    raise UserError(f"no such weight file{looked}", name, hint)


def _proposals(given: Path, folders: Sequence[Path]) -> list[str]:
    """Return weight files that may have been meant: in the given folder, in `folders`, in runs, public."""
    wanted = given if given.suffix else given.with_name(f"{given.name}.pt")
    known = [path for folder in (given.parent, *folders) for path in _weights_in(folder)]
    # Newest runs first: many have a best.pt.
    trained = sorted(Path("runs").glob("*/*/weights/*.pt"), key=last_written, reverse=True)
    there = {path.name for path in known}
    public = [] if given.name in NAMES else [given.with_name(name) for name in NAMES if name not in there]
    fetched = [path for path in public if place_of(path, folders[-1]) is not None]
    files = [*filter(os.path.isfile, [*known, *trained]), *fetched]
    return near_files(wanted, [path for path in files if path.name == wanted.name] or files)


def _weights_in(folder: Path) -> list[Path]:
    # Not Path.glob, which fails if the folder's name is longer than the file system allows.
    return sorted(map(Path, glob.glob(os.path.join(glob.escape(str(folder)), "*.pt"))))
