"""Questions to web servers: http and https alone, with limits of time, and from any byte on."""

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

AGENT = {"User-Agent": f"yolov5-distillation/{VERSION}"}  # some servers refuse that of Python's library
SCHEMES = ("http", "https")
_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
# What a server says when it is busy; everything else it would say again.
_BUSY = (408, 429, 500, 502, 503, 504)


class SourceError(Exception):
    """Why a source is of no use for a file, in words; another one may be."""


class BrokenError(Exception):
    """What went wrong on the way; the same source may do better at the next attempt.

    anew: what has come so far is of no use for that.
    """

    def __init__(self, what: str, anew: bool = False) -> None:
        super().__init__(what)
        self.anew = anew


@dataclass
class Answer:
    """What a server sends.

    start: the first byte that comes, counted in the whole file. total: bytes of the whole file, None where
    the server does not say. validator: stands for this very content; empty without one. is_complete: all
    was there already, nothing comes.
    """

    stream: Any
    start: int
    total: int | None
    validator: str
    is_complete: bool = False

    def read(self, count: int) -> bytes:
        """The next bytes, at most `count`; empty at the end.

        Raises:
            BrokenError: the connection has broken.
        """
        try:
            return bytes(self.stream.read1(count))
        except TimeoutError as error:
            raise BrokenError("stalled") from error
        except (OSError, http.client.HTTPException) as error:
            raise BrokenError(f"the connection broke ({_words(error)})") from error


@contextmanager
def open_address(url: str, start: int, validator: str, seconds: float) -> Iterator[Answer]:
    """Asks for a file from a byte on, if it still is the one that the validator stands for.

    A server that cannot give a part of it, or has another file by now, gives all of it. seconds: for the
    connection, the beginning of the answer, and between two pieces of it.

    Raises:
        SourceError: the source cannot be reached or has no such file.
        BrokenError: it is busy, or has another file by now.
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
    except ConnectionError as error:  # after the connection stood; before, it comes wrapped
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
    """What an answer that is none means: all is there, or an error."""
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
    """Follows to http and https alone, and never from a protected connection to an open one."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme not in SCHEMES or (req.type == "https" and scheme == "http"):
            raise SourceError(f"leads from {req.type} to {scheme}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def opener() -> urllib.request.OpenerDirector:
    """One that knows http and https alone, redirects included. The usual one opens files and FTP too.

    It raises SourceError where a redirect leads to what is not followed.
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
    """What a library says of an error, in short."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError):
        return "does not answer in time"
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)
