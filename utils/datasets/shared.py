"""Images that are trained on and evaluated too, told by their content: scores on them say little."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence

_BLOCK = 1 << 20


def shared_images(
    trained: Mapping[str, Sequence[str]], evaluated: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Yield an evaluated split, a trained one, and each image of the first with the same one of the second.

    Both map the names of splits to paths of images. Copies count like the file itself, whatever their names.
    Only files are read whose size occurs on both sides; those that cannot be read are in neither.
    """
    trained_sizes, evaluated_sizes = _by_size(trained), _by_size(evaluated)
    common = set(trained_sizes.values()) & set(evaluated_sizes.values())
    digests = {path: _digest(path) for path, size in trained_sizes.items() if size in common}
    digests |= {
        path: _digest(path)
        for path, size in evaluated_sizes.items()
        if size in common and path not in digests
    }
    for split, images in evaluated.items():
        for other, others in trained.items():
            known: dict[bytes | None, str] = {digests.get(path): path for path in others}
            known.pop(None, None)
            pairs = ((path, known.get(digests.get(path))) for path in images)
            if shared := [(path, same) for path, same in pairs if same is not None]:
                yield split, other, shared


def _by_size(splits: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return the size of every regular file of the splits that has content."""
    sizes = {}
    for images in splits.values():
        for path in images:
            try:
                status = os.stat(path)
            except (OSError, ValueError):
                continue
            if stat.S_ISREG(status.st_mode) and status.st_size:
                sizes[path] = status.st_size
    return sizes


def _digest(path: str) -> bytes | None:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError:
        return None
    return digest.digest()
