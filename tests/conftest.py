"""Fixtures that the tests of several packages share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS_PER_SCRIPT = (
    550  # below the limit of a whole test, so that the output of a script that hangs is shown
)
RunScript = Callable[..., "subprocess.CompletedProcess[str]"]


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


@pytest.fixture(scope="session")
def bccd_dir() -> Path:
    """The folder BCCD: 364 pictures in VOC layout."""
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


@pytest.fixture
def script_environment(own_cache_folder: Path) -> dict[str, str]:
    """The environment in which `run_script` runs scripts."""
    return _environment({"YOLO_CACHE_DIR": str(own_cache_folder)})


@pytest.fixture(scope="session")
def run_script_session(tmp_path_factory: pytest.TempPathFactory) -> RunScript:
    """Runs a script of the project as a person would: a process of its own, its output as text.

    `run(name, *arguments, cwd=ROOT, env={})`; `env` is added to the environment. All runs of a
    session share a cache folder; `run_script` has one of its own for each test.
    """
    shared_cache = tmp_path_factory.mktemp("script-cache")

    def run(
        name: str, *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / name), *map(str, arguments)],
            cwd=cwd,
            env=_environment({"YOLO_CACHE_DIR": str(shared_cache), **(env or {})}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=SECONDS_PER_SCRIPT,
            check=False,
        )

    return run


@pytest.fixture
def run_script(run_script_session: RunScript, own_cache_folder: Path) -> RunScript:
    """As `run_script_session`, with the test's own cache folder."""

    def run(
        name: str, *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        own = {"YOLO_CACHE_DIR": str(own_cache_folder), **(env or {})}
        return run_script_session(name, *arguments, cwd=cwd, env=own)

    return run


@pytest.fixture
def start_script(own_cache_folder: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a script as `run_script` runs it and gives the process, ended with the test at the latest."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: object) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / name), *map(str, arguments)],
            cwd=ROOT,
            env=_environment({"YOLO_CACHE_DIR": str(own_cache_folder)}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
