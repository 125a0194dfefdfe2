"""Files made to do harm, met as a person would meet them: through the scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importmode importlib knows no neighbours
from corpus import CASES, ROOT

# Beside the reader's own needs: the pictures and the network of a small run.
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
def results(tmp_path_factory):
    base = tmp_path_factory.mktemp("hostile")
    cases, before = {}, {}
    for number, (name, case) in enumerate(CASES.items()):
        folder = base / str(number)
        (folder / "work").mkdir(parents=True)
        argv = [*case.make(folder), "--device", "cpu"]
        cases[name] = {"argv": argv, "folder": str(folder)}
        before[name] = state_of(folder)
    cache = tmp_path_factory.mktemp("hostile-cache")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("driver.py"))],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "YOLO_CACHE_DIR": str(cache)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, case in cases.items():
        found[name]["before"], found[name]["after"] = before[name], state_of(Path(case["folder"]))
        found[name]["folder"] = Path(case["folder"])
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
