"""Runs that are stopped where it matters when: before, between and after the steps of training."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models.checkpoint import read_checkpoint, save_checkpoint
from models.yolo import Model
from utils.config.cli import parse
from utils.config.options import DistillOptions, TrainOptions
from utils.datasets.workers import outlive_signals
from utils.device import DeadWorkerError
from utils.distillation.recipe import distillation_recipe
from utils.distillation.teacher import Teacher
from utils.errors import StoppedError
from utils.evaluation.evaluate import EvaluationResult
from utils.losses.recipe import plain_recipe
from utils.training import run as module
from utils.training import setup
from utils.training.loop import Trainer
from utils.training.run import TrainingRun
from utils.training.start import run_training

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--img", "64", "--batch", "2", "--device", "cpu", "--noautoanchor", "--noplots"]
NET = ["--cfg", "models/yolov5n.yaml", "--weights", ""]


def train(*words, kind=TrainOptions):
    """A run in this process, which can be looked at and disturbed."""
    recipe = distillation_recipe if kind is DistillOptions else plain_recipe
    return run_training(parse(kind, [*map(str, words)]), recipe)


def words_of(data, project, *others):
    return ["--data", data, *NET, *SMALL, "--workers", 0, "--project", project, *others]


def state_of(folder):
    return torch.load(folder / "weights/state.pt", weights_only=True)


def assert_same_run(whole, cut, rows_of):
    assert rows_of(whole) == rows_of(cut)
    one, two = state_of(whole), state_of(cut)
    assert all(torch.equal(one[part][key], two[part][key]) for part in ("model", "ema") for key in one[part])
    assert one["run"]["best_epoch"] == two["run"]["best_epoch"]


def before(monkeypatch, owner, name, act):
    """Has something done before each call of a function, which is told how often it was called."""
    real, calls = getattr(owner, name), itertools.count(1)

    def disturbed(*args, **kwargs):
        act(next(calls), kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, disturbed)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.fault(
    "SIGTERM during setup or during the final evaluation",
    "exit code 143; during setup no run folder is left, during evaluation the trained state is kept",
)
def test_a_signal_where_nothing_is_to_be_saved_ends_the_run_at_once(small_set, tmp_path, monkeypatch):
    words = words_of(small_set, tmp_path, "--epochs", 1)
    with monkeypatch.context() as patch:
        before(patch, setup, "loaders", lambda *_: terminate())
        with pytest.raises(StoppedError) as stopped:
            train(*words)
        assert stopped.value.exit_code == 143 and not (tmp_path / "exp").exists()
    before(monkeypatch, module, "evaluate", lambda call, _: terminate() if call == 2 else None)
    with pytest.raises(StoppedError, match="--resume") as stopped:
        train(*words)
    assert stopped.value.exit_code == 143
    assert state_of(tmp_path / "exp")["run"]["epoch"] == 1


@pytest.mark.fault(
    "SIGTERM during validation",
    "the epoch's training is saved; `--resume` starts with the validation and ends with the same weights",
)
def test_a_run_goes_on_from_the_middle_of_a_validation(small_set, tmp_path, monkeypatch, rows_of):
    words = ["--epochs", 2, "--image-weights"]
    train(*words_of(small_set, tmp_path / "whole", *words))

    def in_the_second(call, given):
        if call == 2:
            given["observers"].insert(0, lambda *_: terminate())

    with monkeypatch.context() as patch:
        before(patch, module, "evaluate", in_the_second)
        with pytest.raises(StoppedError):
            train(*words_of(small_set, tmp_path / "cut", *words))
    folder = tmp_path / "cut" / "exp"
    saved = state_of(folder)
    assert saved["run"]["epoch"] == 1 and saved["done"] == 4 and len(rows_of(folder)) == 1
    steps = []
    before(monkeypatch, Trainer, "run_batch", lambda *_: steps.append(1))
    train("--resume", folder)
    assert not steps
    assert_same_run(tmp_path / "whole/exp", folder, rows_of)


def test_a_run_without_weights_that_is_shortened_to_what_is_done_has_some(small_set, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        before(patch, TrainingRun, "_after_step", lambda call, _: terminate() if call == 10 else None)
        with pytest.raises(StoppedError):
            train(*words_of(small_set, tmp_path, "--epochs", 9, "--nosave"))
    folder = tmp_path / "exp"
    assert state_of(folder)["run"]["epoch"] == 2 and not (folder / "weights/last.pt").exists()
    train("--resume", folder, "--epochs", 2)
    saved, averaged = read_checkpoint(folder / "weights/last.pt"), state_of(folder)["ema"]
    assert saved.epoch == 1
    assert all(
        torch.equal(value, averaged[name].half().float())
        for name, value in saved.state.items()
        if value.is_floating_point()
    )


@pytest.mark.fault(
    "`--resume` of a run that stopped early",
    "runs the final evaluation again and says why; `--patience` or `--epochs` continues the training",
)
def test_a_run_that_stopped_early_stays_so(small_set, tmp_path, monkeypatch, rows_of, capfd):
    worse = itertools.count(0.0, -1.0)
    monkeypatch.setattr(EvaluationResult, "fitness", property(lambda _self: next(worse)))
    folder = train(*words_of(small_set, tmp_path, "--epochs", 9, "--patience", 1))
    assert len(rows_of(folder)) == 2 and "stopping early" in capfd.readouterr().out
    train("--resume", folder)
    output = capfd.readouterr().out
    assert "it stopped early after epoch 2: no better score since epoch 1" in output
    assert "on the validation split" in output and len(rows_of(folder)) == 2
    train("--resume", folder, "--patience", 2)
    assert len(rows_of(folder)) == 3
    train("--resume", folder, "--epochs", 4)
    assert len(rows_of(folder)) == 4


@pytest.mark.fault(
    "a loader worker is killed, as when the system is out of memory",
    "the run ends with an error; the saved state includes every step made, and `--resume` ends with the same "
    "weights as an uninterrupted run",
)
def test_a_killed_worker_costs_no_step(small_set, tmp_path, monkeypatch, rows_of):
    words, trained = ["--epochs", 2, "--nosave"], []
    train(*words_of(small_set, tmp_path / "whole", *words))

    def kill_worker(call, _given):
        trained.append(call)
        if call == 2:
            [worker] = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        before(patch, TrainingRun, "_after_step", kill_worker)
        with pytest.raises(DeadWorkerError):
            train(*words_of(small_set, tmp_path / "cut", *words), "--workers", 1)
    folder = tmp_path / "cut/exp"
    saved = state_of(folder)
    assert 4 * saved["run"]["epoch"] + saved["done"] == trained[-1] >= 2
    train("--resume", folder)
    assert_same_run(tmp_path / "whole/exp", folder, rows_of)


@pytest.fixture
def group(small_set, tmp_path, own_cache_folder):
    """A run with two workers in a process group of its own, which has made some steps."""
    words = words_of(small_set, tmp_path, "--epochs", 500, "--noval", "--save-every-steps", 3)
    process = subprocess.Popen(
        [sys.executable, "train.py", *map(str, words), "--workers", "2"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "YOLO_CACHE_DIR": str(own_cache_folder)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    state, limit = tmp_path / "exp/weights/state.pt", time.monotonic() + 120
    while not state.is_file() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()


@pytest.mark.fault(
    "SIGTERM to a run and its loader workers",
    "exit code 143 with the resume command; no process is left behind",
)
def test_a_signal_to_the_whole_group_is_one_to_the_run(group):
    os.killpg(group.pid, signal.SIGTERM)
    _, errors = group.communicate(timeout=60)
    assert group.returncode == 143, errors
    assert "stopped; go on with" in errors and "has died" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(group.pid, 0)


@pytest.mark.fault("SIGKILL of a run that has loader workers", "the workers exit too, within 20 s")
def test_the_workers_of_a_killed_run_do_not_stay_behind(group):
    group.kill()
    group.wait()
    limit = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < limit:
            os.killpg(group.pid, 0)
            time.sleep(0.1)


def make_batches_for_long(started):
    outlive_signals(0)
    started.set()
    time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not say who sent a signal")
def test_a_worker_that_hangs_ends_when_its_parent_says_so_and_for_nobody_else():
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=make_batches_for_long, args=(started,))
    worker.start()
    assert started.wait(30)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


def overdone(path):
    """Weights of a network whose answers hang on the last digits."""
    torch.manual_seed(0)
    model = Model("models/yolov5n.yaml", nc=2)
    model.names = ["square", "disc"]
    with torch.no_grad():
        for convolution in model.head.m:
            convolution.weight *= 1e12  # all but nothing comes to it from layers that nobody has trained
    save_checkpoint(path, model=model, epoch=0, best_fitness=0.0, meta={})
    return path


@pytest.mark.fault(
    "bfloat16 outputs that differ from float32 at the start of a run",
    "detected before the first step; the run uses float32, with a warning",
)
@pytest.mark.parametrize("which", ["this network", "teacher"])
def test_a_run_computes_in_float32_where_reduced_precision_disagrees(
    which, small_set, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("utils.training.precision.cpu_computes_bf16", lambda: True)
    kinds = []
    real = Trainer.run_batch
    monkeypatch.setattr(Trainer, "run_batch", lambda self, *a: kinds.append(self.amp_dtype) or real(self, *a))
    weights = overdone(tmp_path / "overdone.pt")
    words = words_of(small_set, tmp_path, "--epochs", 1, "--amp-dtype", "bf16")
    if which == "teacher":
        train(*words, "--teacher", weights, kind=DistillOptions)
        which = f"teacher {weights}"
    else:
        train(*words, "--weights", weights, "--hyp", "data/hyp.demo.yaml")
    warnings = [line for line in capfd.readouterr().err.splitlines() if "does not say what" in line]
    wanted = f"warning: in bfloat16 {which} does not say what it says in float32: --amp is off"
    assert warnings == [wanted] and kinds == [None] * 4


@pytest.mark.parametrize("agreeing", [True, False])
def test_beside_a_run_in_float32_a_teacher_may_answer_in_bf16(
    agreeing, small_set, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("utils.training.precision.cpu_computes_bf16", lambda: True)
    kinds = []
    real = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, *a: kinds.append(self.dtype) or real(self, *a))
    weights = tmp_path / "teacher.pt"
    if agreeing:
        torch.manual_seed(0)
        model = Model(ROOT / "models/yolov5n.yaml", nc=3)
        save_checkpoint(weights, model=model, epoch=0, best_fitness=0.0, meta={})
    else:
        overdone(weights)
    words = words_of(small_set, tmp_path, "--epochs", 1, "--teacher", weights)
    train(*words, kind=DistillOptions)
    assert kinds == [torch.bfloat16 if agreeing else None] * 4
    told = capfd.readouterr().err
    assert ("does not say what it says in float32: teachers answer in float32" in told) != agreeing
    train(*words, "--no-amp", kind=DistillOptions)
    assert kinds[4:] == [None] * 4
