"""Download missing public weights:  python -m models.download yolov5s.pt yolov5m.pt"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from models.places import resolve_weights
from models.public_files import NAMES
from utils.config.cli import exit_code_of
from utils.fetch.transfer import FETCH_INTERRUPTED

_USUAL = tuple(name for name in NAMES if not name.endswith("6.pt"))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.download", description="Fetches public weights into the folder weights."
    )
    usual = " ".join(_USUAL)
    parser.add_argument("names", nargs="*", default=_USUAL, help=f"of {', '.join(NAMES)} (default: {usual})")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    names = _arguments(argv).names

    def fetch() -> None:
        for name in names:
            known = name if name.endswith(".pt") else f"{name}.pt"
            print(f"{resolve_weights(Path(known), download=True)} is there")

    return exit_code_of(fetch, interrupted=FETCH_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
