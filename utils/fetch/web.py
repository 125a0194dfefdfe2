"""Requests to web servers: only http and https, with timeouts and byte ranges."""

from __future__ import annotations

import http.client
import re
import string
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from typing import IO, Any
from urllib.parse import quote, urlsplit

from utils.config.version import VERSION

AGENT = {"User-Agent": f"yolov5-distillation/{VERSION}"}  # some servers reject that of urllib
SCHEMES = ("http", "https")
_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
# Temporary errors; a server would repeat all others.
_BUSY = (408, 429, 500, 502, 503, 504)


class SourceError(Exception):
    """A source that cannot provide a file; another one may. The message says why."""


class BrokenError(Exception):
    """A failed transfer that may be retried with the same source.

    anew: the part received so far cannot be continued.
    """

    def __init__(self, what: str, anew: bool = False) -> None:
        super().__init__(what)
        self.anew = anew


@dataclass
class Answer:
    """The response of a server.

    start: offset of its first byte in the whole file. total: size of the whole file in bytes, None if
    unknown. validator: ETag or modification date of the content, empty if there is none. is_complete: the
    requested range starts at the end of the file, so there is no content.
    """

    stream: Any
    start: int
    total: int | None
    validator: str
    is_complete: bool = False

    def read(self, count: int) -> bytes:
        """Read at most `count` bytes; empty at the end.

        Raises:
            BrokenError: if the connection breaks or stalls.
        """
        try:
            return bytes(self.stream.read1(count))
        except TimeoutError as error:
            raise BrokenError("stalled") from error
        except (OSError, http.client.HTTPException) as error:
            raise BrokenError(f"the connection broke ({_words(error)})") from error


@contextmanager
def open_address(url: str, start: int, validator: str, seconds: float) -> Iterator[Answer]:
    """Request a file from byte `start` on, if it still matches the validator.

    A server without range support, or whose file has changed, sends all of it. seconds: timeout of the
    connection, the start of the response and each read.

    Raises:
        SourceError: if the source cannot be reached or does not have the file.
        BrokenError: if it is busy, or its file has changed.
    """
    answer = _ask(url, start, validator, seconds)
    try:
        yield answer
    finally:
        if answer.stream is not None:
            answer.stream.close()


def _ask(url: str, start: int, validator: str, seconds: float) -> Answer:
    headers = {**AGENT, "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator:
            headers["If-Range"] = validator
    try:
        address = quote(url, safe=string.punctuation)
        response = opener().open(urllib.request.Request(address, headers=headers), timeout=seconds)
        assert response is not None, "errors are raised"
        try:
            return _read_headers(response, start)
        except BaseException:
            response.close()
            raise
    except urllib.error.HTTPError as error:
        with error:
            return _refusal(error, start)
    except ConnectionError as error:  # of an established connection; earlier ones come as URLError
        raise BrokenError(f"the connection broke ({_words(error)})") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SourceError(_words(error)) from error


def _read_headers(response: Any, start: int) -> Answer:
    headers = response.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        raise SourceError("sends it compressed, unasked")
    if headers.get_content_type() == "text/html":
        raise SourceError("answers with a web page")
    tag = headers.get("ETag", "")
    validator = tag if tag.startswith('"') else headers.get("Last-Modified", "")
    if response.status == http.client.PARTIAL_CONTENT:
        found = _RANGE.fullmatch(headers.get("Content-Range", "").strip())
        if found is None or found[1] is None or int(found[1]) != start:
            raise BrokenError("sends another part of it than was asked for", anew=True)
        return Answer(response, start, None if found[3] == "*" else int(found[3]), validator)
    if response.status != http.client.OK:
        raise SourceError(f"answers {response.status}")
    length = headers.get("Content-Length", "")
    return Answer(response, 0, int(length) if length.isdecimal() else None, validator)


def _refusal(error: urllib.error.HTTPError, start: int) -> Answer:
    """Interpret an HTTP error: return that the file is already complete, or raise."""
    if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
        found = _RANGE.fullmatch(error.headers.get("Content-Range", "").strip())
        if found is not None and found[3] == str(start):
            return Answer(None, start, start, "", is_complete=True)
        raise BrokenError("has fewer bytes than came before", anew=True)
    if error.code in _BUSY:
        raise BrokenError(f"answers {error.code} {error.reason}")
    if 300 <= error.code < 400:
        raise SourceError("leads to an address that is not followed")
    raise SourceError(f"answers {error.code} {error.reason}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects only to http and https, and never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme not in SCHEMES or (req.type == "https" and scheme == "http"):
            raise SourceError(f"leads from {req.type} to {scheme}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def opener() -> urllib.request.OpenerDirector:
    """Return an opener restricted to http and https, also for redirects; the default one opens files and FTP.

    It raises SourceError if a redirect leads elsewhere, or from https to http.
    """
    director = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        director.add_handler(handler)
    return director


def _words(error: Exception) -> str:
    """Return a short description of a library's error."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError):
        return "does not answer in time"
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)
