"""Generate the demo set: six kinds of shapes among clutter, in YOLO layout.

    python -m utils.datasets.demo --out datasets/demo

The images and labels are identical on every machine. A complete set is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2

from utils.config.cli import exit_code_of
from utils.config.files import temporary_folder
from utils.config.signals import sigterm_as_interrupt
from utils.datasets.demo_scene import Scene, make_scene
from utils.errors import UsageError, UserError
from utils.reporting.console import Console

VERSION = 1  # increment with every change to a pixel or a label
COUNTS = {"train": 480, "val": 100, "test": 120}
_SEED = 20
_MANIFEST = "manifest.json"
_FOLDER = Path("datasets/demo")


def write_demo_set(out: Path, counts: Mapping[str, int], *, progress: bool = True) -> bool:
    """Write the demo set to the folder `out`; returns False if it was already complete.

    counts: images of the splits train, val and test. An image depends only on its split and number, so
    the first ones are the same whatever the counts.

    The set is built beside `out` and then renamed, so `out` is never incomplete. An older or damaged
    demo set is replaced.

    Raises:
        UserError: if `out` holds files that do not belong to a demo set, or cannot be written.
    """
    if _is_complete(out, counts):
        return False
    _refuse_foreign(out)
    try:
        with temporary_folder(out) as folder:
            _build(folder / "new", counts, progress)
            if os.path.exists(out):
                out.rename(folder / "old")
            (folder / "new").rename(out)
    except OSError as error:
        problem = error.strerror or str(error)
        raise UserError(f"cannot be written ({problem})", out, "make room or choose another --out") from error
    return True


def label_text(scene: Scene) -> str:
    """Return the label file of a scene: lines of class, centre x, centre y, width, height, normalised."""
    height, width = scene.image.shape[:2]
    lines = []
    for class_id, (left, top, right, bottom) in zip(
        scene.class_ids.tolist(), scene.boxes_xyxy_px.tolist(), strict=True
    ):
        centre = f"{(left + right) / (2 * width):.6f} {(top + bottom) / (2 * height):.6f}"
        lines.append(f"{class_id} {centre} {(right - left) / width:.6f} {(bottom - top) / height:.6f}\n")
    return "".join(lines)


def demo_scene(split: str, number: int) -> Scene:
    """Return the scene of an image of the set."""
    return make_scene(_SEED, list(COUNTS).index(split), number)


def _pictures(counts: Mapping[str, int]) -> Iterator[tuple[str, int, str]]:
    """Yield split, number and name of every image of the set."""
    for split, count in counts.items():
        for number in range(count):
            yield split, number, f"{split}_{number:05d}"


def _build(folder: Path, counts: Mapping[str, int], progress: bool) -> None:
    for kind in ("images", "labels"):
        for split in counts:
            (folder / kind / split).mkdir(parents=True)
    total = sum(counts.values())
    console = Console(quiet=not progress)
    pictures = console.progress(_pictures(counts), total, "drawing the demo set", unit=" images")
    for split, number, name in pictures:
        scene = demo_scene(split, number)
        done, encoded = cv2.imencode(".png", scene.image)
        assert done, "OpenCV writes PNG in every build"
        (folder / "images" / split / f"{name}.png").write_bytes(encoded.tobytes())
        (folder / "labels" / split / f"{name}.txt").write_bytes(label_text(scene).encode())
    manifest = {"version": VERSION, "counts": dict(counts), "digest": _digest(folder, counts)}
    (folder / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _digest(folder: Path, counts: Mapping[str, int]) -> str:
    """Return a digest of all labels and of the file size of every image.

    Raises:
        FileNotFoundError: if a file is missing.
    """
    digest = hashlib.sha256()
    for split, _, name in _pictures(counts):
        size = (folder / "images" / split / f"{name}.png").stat().st_size
        digest.update(f"{name} {size}\n".encode())
        digest.update((folder / "labels" / split / f"{name}.txt").read_bytes())
    return digest.hexdigest()


def _is_complete(out: Path, counts: Mapping[str, int]) -> bool:
    try:
        manifest = json.loads((out / _MANIFEST).read_text(encoding="utf-8"))
        expected = {"version": VERSION, "counts": dict(counts), "digest": _digest(out, counts)}
    except (OSError, ValueError):
        return False
    return bool(manifest == expected)


def _refuse_foreign(out: Path) -> None:
    """Raise UserError if replacing `out` would delete anything but a demo set."""
    if not os.path.exists(out):
        return
    fix = "choose another folder with --out, or move it away"
    if not os.path.isdir(out):
        raise UserError("is a file", out, fix)
    files = [path for path in out.rglob("*") if not os.path.isdir(path)]
    if files and not os.path.isfile(out / _MANIFEST):
        raise UserError(f"exists and is not a demo set (it holds {files[0].relative_to(out)})", out, fix)
    for path in files:
        if not _is_ours(path.relative_to(out)):
            raise UserError(f"would be replaced, but holds a file of yours ({path.name})", out, fix)


def _is_ours(path: Path) -> bool:
    if path == Path(_MANIFEST):
        return True
    ending = {"images": ".png", "labels": ".txt"}.get(path.parts[0])
    known = len(path.parts) == 3 and path.parts[1] in COUNTS and path.suffix == ending
    return known and path.stem.startswith(f"{path.parts[1]}_")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m utils.datasets.demo", description="Draws the demo set.")
    parser.add_argument("--out", type=Path, default=_FOLDER, help="the folder (default %(default)s)")
    for split, count in COUNTS.items():
        parser.add_argument(
            f"--{split}", type=int, default=count, metavar="N", help=f"{split} images (default {count})"
        )
    arguments = parser.parse_args(argv)
    for split in COUNTS:
        if getattr(arguments, split) < 1:
            given = f"--{split} {getattr(arguments, split)}"
            raise UsageError("each split needs an image", given, "give a number from 1 on")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""

    def draw() -> None:
        arguments = _arguments(argv)
        counts = {split: getattr(arguments, split) for split in COUNTS}
        with sigterm_as_interrupt():
            written = write_demo_set(arguments.out, counts)
        print(f"demo set {'written to' if written else 'is complete in'} {arguments.out}")

    return exit_code_of(draw)


if __name__ == "__main__":
    sys.exit(main())
