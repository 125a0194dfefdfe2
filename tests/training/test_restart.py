"""Which run goes on when torchrun starts its processes again."""

import os

import pytest
import torch

from utils.config.options import TrainOptions
from utils.distributed import restarts
from utils.training import resume, state


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Makes a run's folder as a launch of torchrun leaves it: launched(name, job, options, age)."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")

    def make(name, job, options=None, age=0):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        folder = tmp_path / name
        (folder / "weights").mkdir(parents=True)
        resume.note_launch(folder)
        note = folder / resume.LAUNCH_NAME
        os.utime(note, ns=(0, note.stat().st_mtime_ns - age * 10**9))
        if options is not None:
            run = state.RunState(
                1, 0.0, 0, [], "TrainOptions", resume.with_absolute_paths(options), {}, [], {}, ""
            )
            counts = {"done": 0, "pending": 0, "ema_updates": 0, "meters": []}
            content = {"version": state.VERSION, "run": vars(run), **counts}
            torch.save(content, folder / "weights/state.pt")
        return folder

    return make


def go_on_with(options):
    found = resume._state_to_go_on_with(options, is_restart=restarts() > 0)
    return found and found.parent.parent.name


def test_the_newest_run_of_the_launch_goes_on(launched, tmp_path):
    options = TrainOptions(project=tmp_path)
    launched("exp", "job", options, age=60)
    launched("exp2", "another", options)
    launched("exp3", "job", options)
    assert go_on_with(options) == "exp3"


def test_an_earlier_job_of_the_same_name_is_left_alone(launched, tmp_path):
    options = TrainOptions(project=tmp_path)
    launched("exp", "job", options, age=60)
    launched("exp2", "job")  # stopped before its first state
    assert go_on_with(options) is None


def test_a_run_with_other_options_is_left_alone(launched, tmp_path):
    launched("exp", "job", TrainOptions(project=tmp_path, seed=5))
    assert go_on_with(TrainOptions(project=tmp_path)) is None


def test_a_launch_without_a_name_is_known_by_its_process_and_when_that_began(launched, tmp_path, monkeypatch):
    options = TrainOptions(project=tmp_path)
    folder = launched("exp", "none", options)
    assert go_on_with(options) == "exp" and str(os.getppid()) in (folder / resume.LAUNCH_NAME).read_text()
    monkeypatch.setattr(resume, "_begin_of", lambda process: "another time")
    assert go_on_with(options) is None
