"""Download of images and videos for detection."""

from __future__ import annotations

import base64
import http.client
import math
import string
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from utils.config.addresses import without_password
from utils.datasets.images import UnreadableImageError
from utils.fetch.web import AGENT, SourceError, opener

MAX_BYTES = 100 * 2**20
MAX_VIDEO_BYTES = 2**33
SECONDS_BETWEEN_BYTES, SECONDS_IN_ALL = 20.0, 120.0
_CHUNK = 2**18


def fetch(address: str) -> bytes:
    """Download the content of an http or https address; user and password in it are sent as basic auth.

    Raises:
        UnreadableImageError: if it cannot be fetched, takes more than `SECONDS_IN_ALL` or has more than
            `MAX_BYTES`.
    """
    return b"".join(_pieces(address, MAX_BYTES, SECONDS_IN_ALL))


def fetch_video(address: str, target: Path) -> None:
    """Download a video that cannot be streamed as its index is at its end; takes as long as necessary.

    Raises:
        UnreadableImageError: if it cannot be fetched or written, or has more than `MAX_VIDEO_BYTES`.
    """
    try:
        with target.open("wb") as file:
            for piece in _pieces(address, MAX_VIDEO_BYTES, math.inf):
                file.write(piece)
    except OSError as error:
        raise UnreadableImageError(f"cannot be kept in {target.parent} ({error.strerror})") from error


def _pieces(address: str, most: int, seconds: float) -> Iterator[bytes]:
    """Yield the content of an address; raises UnreadableImageError above `most` bytes or after `seconds`."""
    end, count = time.monotonic() + seconds, 0
    try:
        answer = opener().open(_request(address), timeout=SECONDS_BETWEEN_BYTES)
        assert answer is not None, "errors are raised"
        with answer:
            while chunk := answer.read1(_CHUNK):
                count += len(chunk)
                if count > most:
                    raise UnreadableImageError(f"has more than {most // 2**20} MiB")
                if time.monotonic() > end:
                    raise UnreadableImageError(f"did not come within {seconds:.0f} s")
                yield chunk
            expected = answer.length
    except urllib.error.HTTPError as error:
        raise UnreadableImageError(f"the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError, SourceError) as error:
        reason = getattr(error, "reason", None) or error
        raise UnreadableImageError(f"the server cannot be reached: {reason}") from error
    if expected:
        raise UnreadableImageError(f"the connection ended {expected} bytes too early")


def _request(address: str) -> urllib.request.Request:
    # Addresses copied from a browser may contain blanks and letters that HTTP requires to be escaped.
    request = urllib.request.Request(quote(without_password(address), safe=string.punctuation), headers=AGENT)
    parts = urlsplit(address)
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header(
            "Authorization", f"Basic {base64.b64encode(secret.encode()).decode()}"
        )
    return request
