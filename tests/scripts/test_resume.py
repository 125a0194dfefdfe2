"""A run that was stopped, however rudely, ends with the weights of one that never was."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--img", "64", "--batch", "2", "--workers", "1", "--device", "cpu", "--noautoanchor", "--noplots"]
NET = ["--cfg", "models/yolov5n.yaml", "--weights", ""]
EPOCHS = "6"


@pytest.fixture(scope="module")
def teacher(small_set, run_script_session, tmp_path_factory):
    project = tmp_path_factory.mktemp("teacher")
    done = run_script_session(
        "train.py", "--data", small_set, *NET, "--epochs", 1, "--project", project, *SMALL
    )
    assert done.returncode == 0, done.stderr
    return project / "exp" / "weights" / "best.pt"


def words_of(kind, small_set, teacher):
    """The script and its options, plain or with everything that a distillation keeps from step to step."""
    common = ["--data", small_set, *NET, "--epochs", EPOCHS, *SMALL]
    if kind == "plain":
        return ["train.py", *common, "--multi-scale", "--image-weights"]
    taught = ["--teacher", teacher, "ema", "--distill-ratio", "auto", "--feature-loss", "cwd"]
    schedule = ["--distill-schedule", "cosine", "--distill-final", "0.2", "--distill-warmup", "1"]
    closing = ["--stop-distill", "1", "--close-mosaic", "1"]
    return ["train_distill.py", *common, *taught, *schedule, *closing, "--optimizer", "AdamW"]


@pytest.fixture(scope="module")
def whole_plain(small_set, run_script_session, tmp_path_factory):
    """The folder of a plain run that nothing happens to."""
    project = tmp_path_factory.mktemp("whole")
    done = run_script_session(*words_of("plain", small_set, None), "--project", project)
    assert done.returncode == 0, done.stderr
    return project / "exp"


def state_of(folder):
    return torch.load(folder / "weights/state.pt", weights_only=True)


def wait_for_state(process, folder, beyond=0.0):
    """Until the state file of a running process is newer than `beyond`; gives its time."""
    path, limit = folder / "weights/state.pt", time.monotonic() + 120
    while not (path.is_file() and path.stat().st_mtime_ns > beyond):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)
    return path.stat().st_mtime_ns


def equal(one, two):
    """Whether two values of a state are equal to the last bit; NaN is equal to NaN."""
    if isinstance(one, torch.Tensor):
        return torch.equal(*(value.nan_to_num(nan=-12345.0) for value in (one, two)))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(value, two[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def assert_same_run(first, second, rows_of):
    one, two = state_of(first), state_of(second)
    for part in ("model", "ema", "losses"):
        for name, value in one[part].items():
            same = (
                torch.equal(value, two[part][name])
                if isinstance(value, torch.Tensor)
                else value == two[part][name]
            )
            assert same, f"{part} {name}"
    for part in ("optimizer", "meters", "gradients", "torch_rng", "ema_updates", "pending", "done", "guard"):
        assert equal(one[part], two[part]), part
    assert rows_of(first) == rows_of(second)


@pytest.mark.fault(
    "SIGKILL at two points in a run with `--save-every-steps 1`",
    "`--resume` ends with weights, EMA, optimizer state and scores bit-identical to an "
    "uninterrupted run (on CPU)",
)
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_never_stopped(
    small_set, teacher, run_script, start_script, tmp_path, rows_of
):
    words = words_of("distilled", small_set, teacher)
    whole = run_script(*words, "--project", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    folder, newest = tmp_path / "cut" / "exp", 0
    process = start_script(*words, "--project", tmp_path / "cut", "--save-every-steps", "1")
    # Twice in the middle of an epoch or wherever the moment falls; a state is written after each batch.
    for _ in range(2):
        for _ in range(7):
            newest = wait_for_state(process, folder, newest)
        process.kill()
        process.wait()
        assert len(rows_of(folder)) < int(EPOCHS)
        process = start_script(words[0], "--resume", folder)
    assert process.wait() == 0
    assert_same_run(tmp_path / "whole/exp", folder, rows_of)


@pytest.mark.fault(
    "SIGTERM, SIGINT (Ctrl-C) or SIGHUP (closed terminal) during training",
    "exit code 143, 130 or 129; `--resume` ends with the same weights as an uninterrupted run",
)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_a_run_with_its_state_saved_and_the_usual_code(
    number, code, small_set, whole_plain, run_script, start_script, tmp_path, rows_of
):
    words = words_of("plain", small_set, None)
    process = start_script(*words, "--project", tmp_path / "cut", "--save-every-steps", "3")
    folder = tmp_path / "cut" / "exp"
    wait_for_state(process, folder)
    process.send_signal(number)
    assert process.wait(60) == code, process.said()
    assert len(rows_of(folder)) < int(EPOCHS)
    done = run_script("train.py", "--resume", folder)
    assert done.returncode == 0, done.stderr
    assert_same_run(whole_plain, folder, rows_of)


@pytest.mark.fault("the teacher has changed since the run began", "`--resume` is refused, naming the teacher")
def test_a_run_does_not_go_on_under_a_teacher_that_has_changed(small_set, teacher, run_script, tmp_path):
    own = tmp_path / "teacher.pt"
    shutil.copy(teacher, own)
    words = words_of("distilled", small_set, own)
    first = run_script(*words, "--project", tmp_path, "--epochs", "1", "--stop-distill", "0")
    assert first.returncode == 0, first.stderr
    content = torch.load(own, weights_only=True)
    name = next(name for name, value in content["model"].items() if value.is_floating_point())
    content["model"][name] += 1
    torch.save(content, own)
    done = run_script("train_distill.py", "--resume", tmp_path / "exp", "--epochs", "2")
    assert done.returncode == 1 and "not those that the run began with" in done.stderr
    assert str(own) in done.stderr and "Traceback" not in done.stderr


FULL = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.fault(
    "disk full when checkpoints are written",
    "error without a traceback; the previous checkpoints are intact, and `--resume` works once "
    "there is space",
)
def test_a_full_disk_ends_a_run_with_one_line_and_leaves_the_last_state_whole(
    small_set, run_script, own_cache_folder, tmp_path
):
    """The disk is full for every file beyond a megabyte; weights are larger."""
    words = words_of("plain", small_set, None)
    first = run_script(*words, "--project", tmp_path, "--epochs", "1")
    assert first.returncode == 0, first.stderr
    weights = tmp_path / "exp" / "weights"
    before = {path.name: path.read_bytes() for path in weights.iterdir()}
    done = subprocess.run(
        [
            *(sys.executable, "-c", FULL, str(ROOT / "train.py")),
            *("--resume", str(tmp_path / "exp"), "--epochs", "2"),
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "YOLO_CACHE_DIR": str(own_cache_folder)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr and "make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in weights.iterdir()} == before
    resumed = run_script("train.py", "--resume", tmp_path / "exp", "--epochs", "2")
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.fault(
    "a `state.pt` with parts of another network or of the wrong type",
    "`--resume` is refused, naming the file, which is left unchanged",
)
def test_a_state_whose_parts_do_not_fit_is_refused_in_one_line(small_set, run_script, tmp_path):
    done = run_script(*words_of("plain", small_set, None), "--epochs", 1, "--project", tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "exp/weights/state.pt"
    content = torch.load(path, weights_only=True)
    for changes in ({"optimizer": {}}, {"model": {**content["model"], "model.0.conv.weight": torch.ones(3)}},
                    {"torch_rng": torch.ones(3)}, {"run": {**content["run"], "epoch": "many"}}):  # fmt: skip
        torch.save({**content, **changes}, path)
        before = path.read_bytes()
        done = run_script("train.py", "--resume", path, "--epochs", 2)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "state.pt" in done.stderr and "not an intact run state" in done.stderr, done.stderr
        assert path.read_bytes() == before


@pytest.fixture(scope="module")
def finished(small_set, run_script_session, tmp_path_factory):
    """The folder of a run of one epoch, started with the relative path of its data."""
    folder = tmp_path_factory.mktemp("finished")
    words = words_of("plain", small_set.name, None)
    done = run_script_session(
        *words,
        "--cfg",
        ROOT / "models/yolov5n.yaml",
        "--epochs",
        1,
        "--project",
        folder,
        cwd=small_set.parent,
    )
    assert done.returncode == 0, done.stderr
    return folder / "exp"


def test_a_run_goes_on_from_another_working_folder(finished, run_script, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "exp")
    done = run_script("train.py", "--resume", folder, "--epochs", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_run_goes_on_with_data_that_lies_elsewhere_now(finished, small_set, run_script, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "exp")
    moved = shutil.copytree(small_set.parent, tmp_path / "moved")
    settings = (moved / "set.yaml").read_text().replace(str(small_set.parent), str(moved))
    (moved / "set.yaml").write_text(settings)
    done = run_script("train.py", "--resume", folder, "--epochs", 2, "--data", moved / "set.yaml")
    assert done.returncode == 0 and "not those that the run began with" not in done.stderr, done.stderr


@pytest.mark.fault(
    "training images have been removed since the run stopped",
    "mid-epoch `--resume` is refused; between epochs it continues with a warning",
)
def test_changed_data_are_noticed(finished, small_set, run_script, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "exp")
    changed = shutil.copytree(small_set.parent, tmp_path / "changed")
    settings = (changed / "set.yaml").read_text().replace(str(small_set.parent), str(changed))
    (changed / "set.yaml").write_text(settings)
    for name in ("0.png", "1.png"):
        (changed / "images/train" / name).unlink()
    words = ["train.py", "--resume", folder, "--epochs", 2, "--data", changed / "set.yaml"]
    path = folder / "weights/state.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "done": 1}, path)
    done = run_script(*words)
    assert done.returncode == 1 and "stopped in the middle of an epoch" in done.stderr
    torch.save(content, path)
    done = run_script(*words)
    assert done.returncode == 0 and "not those that the run began with" in done.stderr, done.stderr


@pytest.mark.fault("`--resume` of a run that is still running", "refused; the running one continues")
def test_a_run_that_is_at_work_is_not_resumed(small_set, run_script, start_script, tmp_path):
    words = words_of("plain", small_set, None)
    process = start_script(*words, "--project", tmp_path, "--epochs", "60")
    wait_for_state(process, tmp_path / "exp")
    done = run_script("train.py", "--resume", tmp_path / "exp")
    assert done.returncode == 1 and "another process is writing" in done.stderr, done.stderr
    assert process.poll() is None


@pytest.mark.fault(
    "temporary files left behind by a killed process", "`--resume` removes them and keeps other files"
)
def test_what_a_killed_process_left_is_removed_and_other_files_are_not(finished, run_script, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "exp")
    left = [folder / ".results.csv.0123456789ab.tmp", folder / "weights/.state.pt.ba9876543210.tmp"]
    for path in (*left, folder / "weights/mine.tmp"):
        path.write_bytes(b"half")
    done = run_script("train.py", "--resume", folder)
    assert done.returncode == 0, done.stderr
    assert not any(path.exists() for path in left) and (folder / "weights/mine.tmp").exists()


def test_a_run_does_not_go_on_from_weights_that_are_not_its_last(finished, run_script):
    for path in (finished / "weights/best.pt", finished / "weights/nothing.pt"):
        done = run_script("train.py", "--resume", path)
        assert done.returncode == 1 and path.name in done.stderr and "Traceback" not in done.stderr
