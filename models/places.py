"""Where the weight files that people name are."""

from __future__ import annotations

from pathlib import Path

from models.checkpoint import read_checkpoint
from models.config import FOLDER
from models.public_files import NAMES, fetch_public_file, place_of
from utils.config.suggestions import near_files, question
from utils.distributed import main_first
from utils.errors import UserError


def resolve_weights(name: Path | str, download: bool = False) -> Path:
    """The weight file of that name: as given, else in `weights/`, else fetched where it is a public one.

    Raises UserError with near matches.
    """
    given = Path(name)
    folders = [Path("weights"), FOLDER.parent / "weights"]
    places = list(dict.fromkeys([given, *(folder / given.name for folder in folders)]))
    public = place_of(given, folders[-1])
    with main_first():
        found = next((place for place in places if place.is_file()), None)
        if found is None and download and public is not None:
            found = fetch_public_file(public, read_checkpoint)
    if found is not None:
        return found
    known = [path for folder in (given.parent, *folders) for path in sorted(folder.glob("*.pt"))]
    # Of runs the newest first: many have a best.pt.
    trained = sorted(Path("runs").glob("*/*/weights/*.pt"), key=lambda path: -path.stat().st_mtime)
    public_names = [] if public else [given.with_name(name) for name in NAMES]
    hint = question(near_files(given, [*known, *trained, *public_names]), "put it there or give its path")
    if public is not None:
        hint += " (it is a public file, which is fetched without --no-download and --dry-run)"
    raise UserError(f"no such weight file (looked for {', '.join(map(str, places))})", name, hint)
