"""Several runs of the experiments at once."""

import subprocess
import threading
from pathlib import Path

import pytest

from experiments import run
from experiments.run import Runner
from utils.errors import UserError


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "write_report", lambda: None)
    monkeypatch.setattr(Runner, "teacher_score", lambda *_: None)
    monkeypatch.setattr(Runner, "teacher", lambda *_: None)
    return tmp_path


def test_jobs_share_the_work_and_leave_out_what_is_done(monkeypatch, results):
    together, done = threading.Barrier(2, timeout=30), []

    def arm(self, name, arm, seed, record):
        together.wait()  # comes to an end with two at once alone
        done.append((name, arm.name, seed))
        record.parent.mkdir(exist_ok=True)
        record.touch()

    monkeypatch.setattr(Runner, "arm", arm)
    (results / "voc320").mkdir()
    (results / "voc320" / "plain-s0.json").touch()
    (results / "voc320" / "plain-s1.json").touch()
    Runner("cpu", Path("weights"), jobs=2).run(["voc320"], [], [])
    wanted = [("plain", 2), ("response", 0), ("response", 1), ("response", 2)]
    assert sorted(done) == [("voc320", *entry) for entry in wanted]


def test_what_fails_leaves_the_others_to_go_on(monkeypatch, results):
    done = []

    def arm(self, name, arm, seed, record):
        if arm.name == "plain" and seed == 1:
            raise UserError("exit code 1", "train.py", "see above")
        done.append((arm.name, seed))

    monkeypatch.setattr(Runner, "arm", arm)
    with pytest.raises(UserError, match="voc320/plain-s1: did not come to its end"):
        Runner("cpu", Path("weights"), jobs=3).run(["voc320"], [], [])
    assert len(done) == 5
    done.clear()
    with pytest.raises(UserError, match="exit code 1"):
        Runner("cpu", Path("weights")).run(["voc320"], ["plain"], [])
    assert done == [("plain", 0)]


def test_scripts_of_several_jobs_write_to_their_folders(monkeypatch, tmp_path):
    commands = []

    def script(command, check, stdout, stderr, env):
        commands.append((command, env["OMP_NUM_THREADS"]))
        stdout.write("epochs\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", script)
    monkeypatch.setattr(run, "usable_cpus", lambda: 8)
    runner = Runner("cpu", Path("weights"), jobs=4)
    runner._call(tmp_path, "train.py", "--epochs", "1")
    assert commands[0][0][1:] == ["train.py", "--epochs", "1", "--workers", "2"] and commands[0][1] == "2"
    assert (tmp_path / "run.log").read_text() == "epochs\n"
