"""Runs scripts for tests, each in a fork of a process that has the imports already.

A script sees what it sees when a person starts it: its own process, arguments, folder, environment and
streams, Python's usual end. Only the seconds that the imports take are spent once.

As a program it reads a request a line from standard input and writes an answer a line.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STREAMS = ("out", "err")
MAX_ADDRESSES = 12 << 30  # of which the libraries take five; keeps a machine alive if a guard fails


@dataclass(frozen=True)
class Request:
    """A script to run. folder: gets its `out` and `err`. cpu_seconds: limits time and memory, 0 nothing."""

    argv: tuple[str, ...]
    folder: str
    cwd: str
    environment: dict[str, str]
    cpu_seconds: int = 0


@dataclass(frozen=True)
class Answer:
    """code: as of `subprocess`. grown: bytes of memory that the process took beside those of its imports."""

    code: int
    grown: int


class ScriptServer:
    """The side of the tests: starts the server when it is first needed."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment` is that of the imports."""
        self._environment = dict(environment)
        self._process: subprocess.Popen[str] | None = None

    def run(self, request: Request, timeout: float) -> Answer:
        """Runs a script to its end. Raises TimeoutExpired after so many seconds; the script is dead then."""
        if self._process is None:
            self._process = self._started()
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(asdict(request)), file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not ready:
            self.close()
            raise subprocess.TimeoutExpired(request.argv, timeout)
        line = self._process.stdout.readline()
        assert line, f"the server of scripts has died at {request.argv}"
        return Answer(**json.loads(line))

    def close(self) -> None:
        """Ends the server and what runs in it."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def become(argv: Sequence[str], request: Request) -> None:
    """Turns this process into the one of the script and runs it; ends as the script ends."""
    wanted = [os.open(os.devnull, os.O_RDONLY)]
    wanted += [
        os.open(os.path.join(request.folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in STREAMS
    ]
    for number, descriptor in enumerate(wanted):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.environment)
    if request.cpu_seconds:
        resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESSES, MAX_ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CPU, (request.cpu_seconds, request.cpu_seconds))
    sys.argv = [*argv]
    sys.path[0] = str(ROOT)
    runpy.run_path(argv[0], run_name="__main__")


def serve() -> None:
    """Answers requests until there are no more."""
    sys.path.insert(0, str(ROOT))
    import scipy.cluster.vq  # noqa: F401

    import utils.comparison.run
    import utils.distillation.recipe
    import utils.evaluation.run
    import utils.export.run
    import utils.inference.run
    import utils.reporting.evolution
    import utils.reporting.scenes
    import utils.training.start  # noqa: F401

    # At its end a child would walk through all objects of the imports, and copy their memory: a second each.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = Request(**json.loads(line))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        child = os.fork()
        if child == 0:
            become((str(ROOT / request.argv[0]), *request.argv[1:]), request)
            return
        _, status, usage = os.wait4(child, 0)
        answer = Answer(os.waitstatus_to_exitcode(status), max(usage.ru_maxrss - before, 0) * 1024)
        print(json.dumps(asdict(answer)), flush=True)


if __name__ == "__main__":
    serve()
