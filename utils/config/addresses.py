"""Network addresses among file names: recognised, and refused where only a file will do."""

from __future__ import annotations

import re
from pathlib import Path

from utils.errors import UserError

STREAM_SCHEMES = ("rtsp://", "rtsps://", "rtmp://", "http://", "https://", "tcp://", "udp://")


def is_address(source: str) -> bool:
    """Return whether a source is a network address."""
    return source.lower().startswith(STREAM_SCHEMES)


def without_password(source: str) -> str:
    """Return an address without user and password, safe for the console and for file names."""
    return re.sub(r"(?<=//)[^/?#]*@", "", source, count=1) if is_address(source) else source


def refuse_address(given: Path | str, fix: str = "download it and give the path of the file") -> None:
    """Raise UserError if an address is given in place of a file."""
    # pathlib turns the two slashes of an address into one.
    address = re.sub(r"^(\w+):/+", r"\1://", Path(given).as_posix())
    if is_address(address):
        raise UserError("is an address, which is not taken here", without_password(address), fix)
