"""Pictures from the network."""

from __future__ import annotations

import base64
import http.client
import string
import time
import urllib.error
import urllib.request
from urllib.parse import quote, unquote, urlsplit

from utils.datasets.images import UnreadableImageError
from utils.fetch.web import AGENT, SourceError, opener
from utils.inference.frames import without_password

MAX_BYTES = 100 * 2**20
SECONDS_BETWEEN_BYTES, SECONDS_IN_ALL = 20.0, 120.0
_CHUNK = 2**18


def fetch(address: str) -> bytes:
    """The content at an http or https address; a user and password in it are sent along.

    Raises:
        UnreadableImageError: it cannot be had, takes too long or has more than `MAX_BYTES`.
    """
    end = time.monotonic() + SECONDS_IN_ALL
    content = bytearray()
    try:
        answer = opener().open(_request(address), timeout=SECONDS_BETWEEN_BYTES)
        assert answer is not None, "errors are raised"
        with answer:
            while chunk := answer.read1(_CHUNK):
                content += chunk
                if len(content) > MAX_BYTES:
                    raise UnreadableImageError(f"has more than {MAX_BYTES // 2**20} MiB")
                if time.monotonic() > end:
                    raise UnreadableImageError(f"did not come within {SECONDS_IN_ALL:.0f} s")
            expected = answer.length
    except urllib.error.HTTPError as error:
        raise UnreadableImageError(f"the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError, SourceError) as error:
        reason = getattr(error, "reason", None) or error
        raise UnreadableImageError(f"cannot be fetched ({reason})") from error
    if expected:
        raise UnreadableImageError(f"the connection ended {expected} bytes too early")
    return bytes(content)


def _request(address: str) -> urllib.request.Request:
    # Addresses from a browser's bar have blanks and letters that HTTP wants escaped.
    request = urllib.request.Request(quote(without_password(address), safe=string.punctuation), headers=AGENT)
    parts = urlsplit(address)
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header(
            "Authorization", f"Basic {base64.b64encode(secret.encode()).decode()}"
        )
    return request
