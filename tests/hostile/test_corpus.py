"""Files made to do harm, met as a person would meet them: through the scripts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importmode importlib knows no neighbours
from corpus import CASES
from script_server import STREAMS, Request, read_streams

pytestmark = pytest.mark.slow

# Beside the reader's own needs: the images and the network of a small run.
MOST_GROWN = 400 << 20


def beginning(path: Path) -> bytes:
    """The size of a file and what it begins with; one of them claims a terabyte."""
    with path.open("rb") as stream:
        return b"%d %s" % (path.stat().st_size, stream.read(1 << 24))


def state_of(folder: Path) -> dict[str, bytes | None]:
    """Every file outside of `work/runs`, with its content where it is an ordinary one.

    Without the empty file by which a process claims the run that it would resume.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name == ".lock" and path.lstat().st_size == 0:
            continue
        if path.name not in ("out", "err") and folder / "work/runs" not in (path, *path.parents):
            found[str(path)] = beginning(path) if path.is_file() else None
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory, script_server):
    base, found = tmp_path_factory.mktemp("hostile"), {}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "YOLO_CACHE_DIR": str(tmp_path_factory.mktemp("hostile-cache")),
    }
    for number, (name, case) in enumerate(CASES.items()):
        folder = base / str(number)
        (folder / "work").mkdir(parents=True)
        argv = (*case.make(folder), "--device", "cpu")
        before = state_of(folder)
        request = Request(argv, str(folder), str(folder / "work"), environment, cpu_seconds=60)
        answer = script_server.run(request, 120)
        said = dict(zip(STREAMS, read_streams(folder), strict=True))
        after = {"before": before, "after": state_of(folder), "folder": folder}
        found[name] = {"code": answer.code, "grown": answer.grown, **said, **after}
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.fault(case.what, case.happens)) for name, case in CASES.items()],
)
def test_hostile_input_ends_in_one_clear_line_and_does_nothing(name, results):
    found = results[name]
    assert not (found["folder"] / "marker").exists()
    assert found["after"] == found["before"]
    assert found["code"] in (1, 2), found["out"] + found["err"]
    assert "Traceback" not in found["out"] + found["err"]
    [line] = [line for line in found["err"].splitlines() if line.startswith("error: ")]
    assert all(word in line for word in CASES[name].words), line
    assert len(line) < 6000
    assert found["grown"] < MOST_GROWN, f"{found['grown'] >> 20} MiB"
