"""Runs scripts one after the other, each in a fork of a process that has the imports already.

Reads `{name: {"argv": [...], "folder": ...}}` from standard input, writes the results as JSON: exit code,
output, and by how many bytes the process grew. A script sees what it sees when a person starts it.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_ADDRESSES = 12 << 30  # of which the libraries take five; keeps a machine alive if a guard fails
SECONDS = 60


def run_here(argv: list[str], folder: Path) -> None:
    """Becomes the script."""
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, stream.fileno())
    os.chdir(folder / "work")
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESSES, MAX_ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    sys.argv = [str(ROOT / argv[0]), *argv[1:]]
    code: object = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import utils.evaluation.run
    import utils.inference.run
    import utils.training.run  # noqa: F401

    results = {}
    for name, case in json.load(sys.stdin).items():
        folder = Path(case["folder"])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        child = os.fork()
        if child == 0:
            run_here(case["argv"], folder)
        _, status, usage = os.wait4(child, 0)
        results[name] = {
            "code": os.waitstatus_to_exitcode(status),
            "out": (folder / "out").read_text(errors="replace"),
            "err": (folder / "err").read_text(errors="replace"),
            "grown": max(usage.ru_maxrss - before, 0) * 1024,
        }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
