"""Files from a web server that fails in all the ways it can."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest

from utils.errors import UsageError, UserError
from utils.fetch.lock import exclusive_lock
from utils.fetch.transfer import Patience, Remote, fetch
from utils.fetch.web import SourceError

CONTENT = bytes(range(256)) * 4000
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()
QUICK = Patience(seconds=0.4, window=0.2, least=1000, attempts=2, pause=0.01)


@pytest.fixture
def good(serving):
    """The server, with the file at /file.bin."""
    serving.files["/file.bin"] = CONTENT
    return serving


def get(tmp_path: Path, *urls: str, accept=lambda path: None, **facts) -> bytes:
    target = tmp_path / "data" / "file.bin"
    fetch(Remote("file.bin", urls, **facts), target, accept, target, QUICK)
    assert sorted(path.name for path in target.parent.iterdir()) == ["file.bin"]
    return target.read_bytes()


def message_of(tmp_path: Path, *urls: str, **facts) -> str:
    with pytest.raises(UserError) as caught:
        get(tmp_path, *urls, **facts)
    return str(caught.value)


def test_a_file_comes_whole_and_nothing_else_stays(good, tmp_path):
    url = f"{good.url}/file.bin"
    assert get(tmp_path, url, size=len(CONTENT), sha256=SHA256.upper(), md5=MD5) == CONTENT
    assert good.asked == [("/file.bin", 0)]


@pytest.mark.fault(
    "the connection drops repeatedly during a download", "each time the download resumes where it stopped"
)
def test_a_broken_connection_goes_on_where_it_was(good, tmp_path):
    good.breaks["/file.bin"] = 300_000
    assert get(tmp_path, f"{good.url}/file.bin") == CONTENT
    assert [start for _, start in good.asked] == [0, 300_000, 600_000, 900_000]


@pytest.mark.fault("a download fails partway and is started again", "it resumes from the partial file")
def test_another_process_goes_on_with_what_has_come(good, tmp_path):
    url = f"{good.url}/file.bin"
    good.breaks["/file.bin"] = 700_000
    with pytest.raises(UserError):
        target = tmp_path / "data" / "file.bin"
        fetch(Remote("file.bin", (url,)), target, print, target, Patience(attempts=1, least=2**30, pause=0))
    assert (tmp_path / "data" / "file.bin.part").stat().st_size == 700_000
    good.breaks.clear()
    assert get(tmp_path, url) == CONTENT
    assert good.asked == [("/file.bin", 0), ("/file.bin", 700_000)]


def leave(tmp_path: Path, content: bytes, note: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file.bin.part").write_bytes(content)
    (tmp_path / "data" / "file.bin.part.json").write_text(note)


@pytest.mark.fault(
    "a partial download of another version or URL, or with a corrupt record", "the file is downloaded afresh"
)
@pytest.mark.parametrize(
    "note", ['{"url": "URL", "validator": "\\"old\\""}', "{", "[]", '{"url": "http://x/"}']
)
def test_a_piece_of_another_file_is_thrown_away(good, tmp_path, note):
    leave(tmp_path, b"other" * 1000, note.replace("URL", f"{good.url}/file.bin"))
    assert get(tmp_path, f"{good.url}/file.bin") == CONTENT


def test_a_piece_of_unknown_origin_is_gone_on_with_where_a_checksum_tells_in_the_end(good, tmp_path):
    leave(tmp_path, CONTENT[:5000], "")
    assert get(tmp_path, f"{good.url}/file.bin", sha256=SHA256) == CONTENT
    assert good.asked == [("/file.bin", 5000)]


def test_a_piece_that_turns_out_wrong_costs_one_more_attempt_at_the_same_source(good, tmp_path):
    leave(tmp_path, b"wrong" * 1000, "")
    assert get(tmp_path, f"{good.url}/file.bin", sha256=SHA256) == CONTENT
    assert good.asked == [("/file.bin", 5000), ("/file.bin", 0)]


@pytest.mark.parametrize("facts", [{"sha256": SHA256}, {"sha256": SHA256, "size": len(CONTENT)}])
def test_all_that_is_there_already_is_not_fetched_again(good, tmp_path, facts):
    leave(tmp_path, CONTENT, "")
    assert get(tmp_path, f"{good.url}/file.bin", **facts) == CONTENT
    assert [start for _, start in good.asked] in ([], [len(CONTENT)])


def test_a_piece_longer_than_the_file_is_thrown_away(good, tmp_path):
    leave(tmp_path, CONTENT + b"more", "")
    assert get(tmp_path, f"{good.url}/file.bin", md5=MD5) == CONTENT


@pytest.mark.fault(
    "a server that does not support range requests", "the download starts again from the beginning"
)
def test_a_server_without_ranges_starts_again(good, tmp_path):
    good.no_ranges.add("/file.bin")
    leave(tmp_path, CONTENT[:5000], "")
    assert get(tmp_path, f"{good.url}/file.bin", md5=MD5) == CONTENT
    good.breaks["/file.bin"] = 100_000
    (tmp_path / "again").mkdir()
    assert "bytes too early" in message_of(tmp_path / "again", f"{good.url}/file.bin")


def test_a_server_that_does_not_say_how_long_the_file_is_will_do(good, tmp_path):
    good.no_lengths.add("/file.bin")
    assert get(tmp_path, f"{good.url}/file.bin") == CONTENT


@pytest.mark.fault("a downloaded file with the wrong checksum or size", "discarded; the next source is tried")
@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"sha256": SHA256}, "its sha256 is"),
        ({"md5": MD5}, "its md5 is"),
        ({"size": len(CONTENT)}, "has 5 bytes and not 1,024,000"),
    ],
)
def test_a_wrong_file_is_thrown_away_and_the_next_source_has_its_turn(good, tmp_path, facts, words):
    good.files["/wrong.bin"] = b"wrong"
    message = message_of(tmp_path, f"{good.url}/wrong.bin", **facts)
    assert words in message and not list((tmp_path / "data").glob("*"))
    assert get(tmp_path, f"{good.url}/wrong.bin", f"{good.url}/file.bin", **facts) == CONTENT


@pytest.mark.fault(
    "a source that is missing (404), unavailable (503), unreachable, stalled, slow or returns a web page",
    "the next source is tried",
)
@pytest.mark.parametrize("fault", ["404", "503", "stall", "slow", "page", "closed", "silent"])
def test_the_next_source_has_its_turn(good, tmp_path, fault):
    good.files["/bad.bin"] = CONTENT
    bad = f"{good.url}/bad.bin"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        if fault.isdecimal():
            good.statuses["/bad.bin"] = int(fault)
        elif fault == "stall":
            good.stalls["/bad.bin"] = 0, 3
        elif fault == "slow":
            good.stalls["/bad.bin"] = 10, 0.3
        elif fault == "page":
            good.kinds["/bad.bin"] = "text/html; charset=utf-8"
        elif fault == "closed":
            bad = "http://127.0.0.1:9/file.bin"
        else:
            bad = f"http://127.0.0.1:{silent.getsockname()[1]}/file.bin"
        begun = time.monotonic()
        assert get(tmp_path, bad, f"{good.url}/file.bin") == CONTENT
    assert time.monotonic() - begun < 3


@pytest.mark.fault(
    "no network connection", "one-line error with the reason, a URL and where to put the file by hand"
)
def test_without_a_network_the_message_says_what_why_and_what_to_do(tmp_path):
    urls = "http://127.0.0.1:9/file.bin", "http://127.0.0.1:1/file.bin"
    begun = time.monotonic()
    message = message_of(tmp_path, *urls)
    assert time.monotonic() - begun < 2
    target = tmp_path / "data" / "file.bin"
    assert message.startswith("file.bin: cannot be fetched (127.0.0.1: Connection refused); ")  # said once
    assert message.endswith(f"try again, or get it from {urls[0]} by other means and put it at {target}")


@pytest.mark.fault(
    "a server redirects to a local file (`file:`) or another protocol (`ftp:`, `gopher:`, `data:`)",
    "not followed",
)
@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x/", "data:,x"])
def test_nothing_leads_to_files_of_this_machine(good, tmp_path, place):
    good.redirects["/file.bin"] = place
    assert "not followed" in message_of(tmp_path, f"{good.url}/file.bin")
    for url in (place, "/etc/passwd"):
        assert "cannot be fetched" in message_of(tmp_path, url)


def test_other_redirections_are_followed_and_ranges_go_with_them(good, tmp_path):
    good.redirects["/old.bin"] = f"{good.url}/file.bin"
    good.breaks["/file.bin"] = 600_000
    assert get(tmp_path, f"{good.url}/old.bin") == CONTENT
    assert good.asked[-1] == ("/file.bin", 600_000)


def test_a_file_that_is_not_liked_is_thrown_away_and_the_next_source_asked(good, tmp_path):
    good.files["/bad.bin"] = b"bad"

    def accept(path: Path) -> None:
        if path.read_bytes() == b"bad":
            raise SourceError("not liked")

    assert "not liked" in message_of(tmp_path, f"{good.url}/bad.bin", accept=accept)
    assert get(tmp_path, f"{good.url}/bad.bin", f"{good.url}/file.bin", accept=accept) == CONTENT


def test_a_mirror_of_the_user_goes_first_and_the_usual_sources_stay(good, tmp_path, monkeypatch):
    good.files["/mirror/file.bin"] = CONTENT
    monkeypatch.setenv("YOLO_MIRROR", f"{good.url}/mirror/")
    assert get(tmp_path, "http://127.0.0.1:9/elsewhere.bin") == CONTENT
    del good.files["/mirror/file.bin"]
    (tmp_path / "data" / "file.bin").unlink()
    assert get(tmp_path, f"{good.url}/file.bin") == CONTENT
    monkeypatch.setenv("YOLO_MIRROR", "/mnt/mirror")
    with pytest.raises(UsageError, match=r"\$YOLO_MIRROR: '/mnt/mirror' is not an address"):
        get(tmp_path, f"{good.url}/file.bin")


@pytest.mark.fault("too little disk space for a download", "refused before anything is written")
def test_room_is_looked_for_first(good, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    message = message_of(tmp_path, f"{good.url}/file.bin")
    assert "needs 0.0 GiB and 0.0 GiB are free; make room" in message
    assert not (tmp_path / "data" / "file.bin.part").exists()


def in_child(work) -> int:
    """Runs work in a process of its own; gives its exit code."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(20)
    return child.exitcode


def with_a_full_disk(url: str, target: Path) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
    try:
        fetch(Remote("file.bin", (url,)), target, print, target, QUICK)
    except UserError as error:
        os._exit(7 if "cannot be written (File too large); make room" in str(error) else 1)


@pytest.mark.fault(
    "the disk fills up during a download", "one-line error; the partial file is kept and resumed later"
)
def test_a_full_disk_keeps_what_has_come(good, tmp_path):
    target = tmp_path / "data" / "file.bin"
    assert in_child(partial(with_a_full_disk, f"{good.url}/file.bin", target)) == 7
    assert (tmp_path / "data" / "file.bin.part").stat().st_size == 400_000
    assert get(tmp_path, f"{good.url}/file.bin") == CONTENT
    assert good.asked[-1] == ("/file.bin", 400_000)


def hold(lock: Path, seconds: float) -> None:
    with exclusive_lock(lock):
        time.sleep(seconds)


@pytest.mark.fault(
    "a process is killed while it holds the lock of a download and another waits",
    "the waiting process gets the lock",
)
def test_one_process_at_a_time_and_a_killed_one_blocks_nobody(tmp_path):
    lock, said = tmp_path / "new" / ".lock", []
    context = multiprocessing.get_context("fork")
    first = context.Process(target=hold, args=(lock, 60))
    first.start()
    while not lock.exists():
        time.sleep(0.01)
    time.sleep(0.1)

    def waiting() -> None:
        said.append("waits")
        first.kill()

    with exclusive_lock(lock, waiting):
        assert said == ["waits"]
    assert not lock.exists()
    first.join()


@pytest.mark.fault(
    "a named pipe or symlink in place of a download's lock file",
    "refused without blocking; nothing is created at the link's target",
)
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_an_odd_lock_is_refused(kind, tmp_path):
    lock, elsewhere = tmp_path / ".lock", tmp_path / "elsewhere"
    lock.symlink_to(elsewhere) if kind == "link" else os.mkfifo(lock)
    with pytest.raises(UserError, match=r"\.lock: cannot be written"), exclusive_lock(lock):
        pass
    assert os.path.lexists(lock) and not elsewhere.exists()
