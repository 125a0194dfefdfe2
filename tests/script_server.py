"""Runs scripts for tests, each in a fork of a process that has the imports already.

A script sees what it sees when a person starts it: its own process, arguments, folder, environment and
streams, Python's usual end. Only the seconds that the imports take are spent once.

As a program it reads a question a line from standard input and writes an answer a line. A question is a
request to run a script to its end, one to start it, which is answered by its process, or such a process:
whether it has ended.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STREAMS = ("out", "err")
MODULES = (
    "scipy.cluster.vq",
    "torch._dynamo",  # what an optimizer imports
    "utils.comparison.run",
    "utils.distillation.recipe",
    "utils.evaluation.run",
    "utils.export.run",
    "utils.inference.run",
    "utils.reporting.evolution",
    "utils.reporting.scenes",
    "utils.training.start",
)
MAX_ADDRESSES = 12 << 30  # of which the libraries take five; keeps a machine alive if a guard fails


@dataclass(frozen=True)
class Request:
    """A script to run.

    folder: gets its `out` and `err`. cpu_seconds: limits time and memory, 0 nothing. ranks: so many
    processes run it together, with the environment variables of torchrun; 0: one process without them.
    """

    argv: tuple[str, ...]
    folder: str
    cwd: str
    environment: dict[str, str]
    cpu_seconds: int = 0
    ranks: int = 0


@dataclass(frozen=True)
class Answer:
    """code: as of `subprocess`. grown: bytes of memory that the process took beside those of its imports."""

    code: int
    grown: int


class Started:
    """A script that runs; as much of `subprocess.Popen` as the tests need."""

    def __init__(self, server: ScriptServer, request: Request) -> None:
        self._server, self.folder = server, Path(request.folder)
        self.returncode: int | None = None
        self.pid: int = server.ask({"start": asdict(request)}, 60)
        self._life = server.life

    def poll(self) -> int | None:
        """Gives the code it has ended with, if it has."""
        if self._life != self._server.life:
            self.returncode = -signal.SIGKILL  # it has ended with its server
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid}, 60)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Waits for its end and gives the code. Raises TimeoutExpired."""
        limit = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired("a started script", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def said(self) -> list[str]:
        """What it has written to its streams so far, to standard output and to standard error."""
        return read_streams(self.folder)


def read_streams(folder: Path) -> list[str]:
    """What a script has written, to standard output and to standard error."""
    return [(folder / stream).read_text(encoding="utf-8", errors="replace") for stream in STREAMS]


class ScriptServer:
    """The side of the tests: starts the server when it is first needed."""

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str] = MODULES) -> None:
        """`environment` is that of the imports, `modules` what is imported for all scripts."""
        self._environment, self._modules = dict(environment), modules
        self.life = 0  # counts the servers that have ended
        self._process: subprocess.Popen[str] | None = None

    def run(self, request: Request, timeout: float) -> Answer:
        """Runs a script to its end. Raises TimeoutExpired after so many seconds; the script is dead then."""
        return Answer(**self.ask({"run": asdict(request)}, timeout))

    def start(self, request: Request) -> Started:
        """Starts a script and does not wait for it."""
        return Started(self, request)

    def ask(self, question: Mapping[str, object], timeout: float) -> Any:
        """Gives the answer to a question. Raises TimeoutExpired; then everything that ran is dead."""
        if self._process is None:
            self._process = self._begun()
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not ready:
            self.close()
            raise subprocess.TimeoutExpired(str(question), timeout)
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"the server of scripts has died at {question}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the server and what runs in it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None
            self.life += 1

    def _begun(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, __file__, *self._modules],
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
    # A shell that runs the tests in the background makes them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup
    if request.cpu_seconds:
        resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESSES, MAX_ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CPU, (request.cpu_seconds, request.cpu_seconds))
    sys.argv = [*argv]
    sys.path[:1] = [str(ROOT), *filter(None, request.environment.get("PYTHONPATH", "").split(":"))]
    if request.ranks:
        become_ranks(request.ranks)
    run_to_its_end(argv[0])


def run_to_its_end(script: str) -> None:
    """Runs a script; ends this process as Python does, but for taking its modules apart, most of a second.

    An exception that nobody catches ends in Python's own way.
    """
    code: object = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        code = left.code
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as an end does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


def become_ranks(count: int) -> None:
    """Returns in each rank; their parent ends with them, by the code of the first that fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {**master, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ["TORCHELASTIC_RUN_ID"] = "none"  # of a launch that has no name
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return
        children.append(child)
    codes = []
    for _ in range(count):
        child, status = os.wait()
        children.remove(child)
        codes.append(os.waitstatus_to_exitcode(status) % 256)
        if codes[-1]:
            for other in children:  # as torchrun does; they would wait for this one
                os.kill(other, signal.SIGTERM)
    os._exit(next(filter(None, codes), 0))


def serve() -> None:
    """Answers questions until there are no more."""
    sys.path.insert(0, str(ROOT))
    for name in sys.argv[1:]:
        importlib.import_module(name)
    # At its end a child would walk through all objects of the imports, and copy their memory: a second each.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        [(kind, value)] = json.loads(line).items()
        if kind == "poll":
            pid, status = os.waitpid(value, os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        request = Request(**value)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        child = os.fork()
        if child == 0:
            become((str(ROOT / request.argv[0]), *request.argv[1:]), request)
            return
        if kind == "start":
            print(child, flush=True)
            continue
        _, status, usage = os.wait4(child, 0)
        answer = Answer(os.waitstatus_to_exitcode(status), max(usage.ru_maxrss - before, 0) * 1024)
        print(json.dumps(asdict(answer)), flush=True)


if __name__ == "__main__":
    serve()
