"""Fixtures that the tests of several packages share."""

from __future__ import annotations

import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importmode importlib knows no neighbours
from script_server import Request, ScriptServer, Started, read_streams

ROOT = Path(__file__).resolve().parents[1]
SECONDS_PER_SCRIPT = (
    550  # below the limit of a whole test, so that the output of a script that hangs is shown
)
RunScript = Callable[..., "subprocess.CompletedProcess[str]"]
# Variables that no import looks at.
SERVED = {"YOLO_CACHE_DIR", "PYTHONPATH", "COLUMNS", "WANDB_NOTES", "WANDB_PROJECT", "WANDB_FAILS_AT"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several processes none is to be left alone with a slow file in the end: those come first."""
    if not hasattr(config, "workerinput"):
        return
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that no test shares with another or with the user."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("YOLO_CACHE_DIR", str(folder))
    return folder


def _find(variable: str, name: str, *relative: str) -> Path:
    """Data or weights in the project, where an environment variable points, or beside the checkout."""
    pointed = os.environ.get(variable)
    places = [Path(pointed), Path(pointed) / name] if pointed else []
    for entry in relative:
        places += [ROOT / entry, *sorted(ROOT.parent.glob(f"*/{entry}"))]
    for place in places:
        if place.name == name and place.exists():
            return place
    pytest.skip(f"{name} is not there: put it at {relative[0]} or set {variable}")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C is heard here and in new processes, also if a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def bccd_dir() -> Path:
    """The folder BCCD: 364 images in VOC layout."""
    return _find("YOLO_BCCD_DIR", "BCCD", "datasets/BCCD", "data/BCCD")


@pytest.fixture(scope="session")
def voc320_dir() -> Path:
    """The folder VOC320: photos of VOC2007 scaled to 320 pixels, in YOLO layout."""
    return _find("YOLO_VOC320_DIR", "VOC320", "datasets/VOC320", "data/VOC320")


@pytest.fixture(scope="session")
def public_yolov5n() -> Path:
    """The public COCO weights of yolov5n."""
    return _find("YOLO_WEIGHTS_DIR", "yolov5n.pt", "weights/yolov5n.pt")


@pytest.fixture(scope="session")
def public_yolov5s() -> Path:
    """The public COCO weights of yolov5s."""
    return _find("YOLO_WEIGHTS_DIR", "yolov5s.pt", "weights/yolov5s.pt")


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    """What scripts of tests see: no display, one thread, deprecations of ours as errors, and `added`."""
    kept = {key: value for key, value in os.environ.items() if "DISPLAY" not in key}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests/strict_warnings"), **added}


@pytest.fixture(scope="session")
def script_server() -> Iterator[ScriptServer]:
    """Runs scripts in forks of a process that has the imports already."""
    server = ScriptServer(_environment({}))
    yield server
    server.close()


@pytest.fixture(scope="session")
def run_script_session(tmp_path_factory: pytest.TempPathFactory, script_server: ScriptServer) -> RunScript:
    """Runs a script of the project as a person would: a process of its own, its output as text.

    `run(name, *arguments, cwd=ROOT, env={}, ranks=0)`; `env` is added to the environment, `ranks`
    processes run it together. All runs of a session share a cache folder; `run_script` has one of its
    own for each test. A script of another folder, or with an environment that an import may look at,
    has a Python of its own.
    """
    shared_cache = tmp_path_factory.mktemp("script-cache")

    def run(
        name: str,
        *arguments: object,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        ranks: int = 0,
    ) -> subprocess.CompletedProcess[str]:
        argv = (str(ROOT / name), *map(str, arguments))
        environment = _environment({"YOLO_CACHE_DIR": str(shared_cache), **(env or {})})
        if set(env or {}) - SERVED or ROOT not in Path(argv[0]).parents:
            return _run_alone(argv, cwd, environment)
        folder = tmp_path_factory.mktemp("script")
        request = Request(argv, str(folder), str(cwd), environment, ranks=ranks)
        answer = script_server.run(request, SECONDS_PER_SCRIPT)
        return subprocess.CompletedProcess(argv, answer.code, *read_streams(folder))

    return run


def _run_alone(
    argv: Sequence[str], cwd: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=SECONDS_PER_SCRIPT,
        check=False,
    )


@pytest.fixture
def run_script(run_script_session: RunScript, own_cache_folder: Path) -> RunScript:
    """As `run_script_session`, with the test's own cache folder."""

    def run(
        name: str, *arguments: object, env: Mapping[str, str] | None = None, **others: Any
    ) -> subprocess.CompletedProcess[str]:
        own = {"YOLO_CACHE_DIR": str(own_cache_folder), **(env or {})}
        return run_script_session(name, *arguments, env=own, **others)

    return run


@pytest.fixture
def start_script(
    tmp_path_factory: pytest.TempPathFactory, script_server: ScriptServer, own_cache_folder: Path
) -> Iterator[Callable[..., Started]]:
    """Starts a script as `run_script` runs it and gives the process, ended with the test at the latest."""
    started: list[Started] = []

    def start(
        name: str, *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None
    ) -> Started:
        argv = (str(ROOT / name), *map(str, arguments))
        folder = str(tmp_path_factory.mktemp("script"))
        environment = _environment({"YOLO_CACHE_DIR": str(own_cache_folder), **(env or {})})
        started.append(script_server.start(Request(argv, folder, str(cwd), environment)))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@dataclass
class Serving:
    """A web server on this machine: files by their paths, and what goes wrong with each.

    asked: (path, first byte asked for) of all questions. statuses: answered instead of the file.
    breaks: so many bytes are sent at most, then the connection ends. stalls: nothing comes after so many
    bytes, for so many seconds. redirects: where a path leads. no_ranges, no_lengths, no_validators: paths
    without. kinds: Content-Type.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    breaks: dict[str, int] = field(default_factory=dict)
    stalls: dict[str, tuple[int, float]] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    no_ranges: set[str] = field(default_factory=set)
    no_lengths: set[str] = field(default_factory=set)
    no_validators: set[str] = field(default_factory=set)
    kinds: dict[str, str] = field(default_factory=dict)
    url: str = ""


class _Answers(http.server.BaseHTTPRequestHandler):
    serving: Serving

    def do_GET(self) -> None:
        serving, path = self.serving, unquote(urlsplit(self.path).path)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        serving.asked.append((path, start))
        if path in serving.redirects:
            self._end(302, {"Location": serving.redirects[path]})
            return
        content = serving.files.get(path)
        status = serving.statuses.get(path, 404 if content is None else 200)
        if status != 200 or content is None:
            self._end(status, {"Content-Length": "0"})
            return
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        if path in serving.no_ranges or self.headers.get("If-Range", tag) != tag:
            start = 0
        if start and start >= len(content):
            self._end(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
            return
        headers = {"Content-Type": serving.kinds.get(path, "application/octet-stream")}
        if path not in serving.no_lengths:
            headers["Content-Length"] = str(len(content) - start)
        if path not in serving.no_validators:
            headers["ETag"] = tag
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._end(206 if start else 200, headers)
        self._send(content[start:], path)

    def _send(self, content: bytes, path: str) -> None:
        serving = self.serving
        content = content[: serving.breaks.get(path, len(content))]
        count, seconds = serving.stalls.get(path, (len(content), 0.0))
        try:
            self.wfile.write(content[:count])
            self.wfile.flush()
            time.sleep(seconds)
            self.wfile.write(content[count:])
        except OSError:
            pass  # whoever asked has gone

    def _end(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """A server with no files yet; `url` is its address. No proxy is asked on the way to it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Serving()
    handler = type("Handler", (_Answers,), {"serving": found})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        found.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield found
        server.shutdown()
