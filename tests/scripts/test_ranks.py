"""Two processes on one machine, as torchrun starts them.

Where nothing happens to them, the server of scripts starts them in its stead, which takes less time.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--img", "64", "--batch", "4", "--workers", "0", "--device", "cpu", "--noautoanchor", "--noplots"]
NET = ["--cfg", "models/yolov5n.yaml", "--weights", ""]


@pytest.fixture(scope="module")
def small_set(make_shapes, tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("small"), images=7)


@pytest.fixture(scope="module")
def weights(small_set, run_script_session, tmp_path_factory):
    project = tmp_path_factory.mktemp("teacher")
    words = ["--data", small_set, *NET, "--epochs", 2, "--project", project, *SMALL]
    done = run_script_session("train.py", *words)
    assert done.returncode == 0, done.stderr
    return project / "exp" / "weights" / "best.pt"


@pytest.fixture
def torchrun(own_cache_folder):
    """Starts a script in two processes; gives the launching process."""
    started = []

    def start(*words, launch=(), place=("--standalone", "--nproc_per_node", "2"), cwd=ROOT):
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *place, *launch, *map(str, words)],
            cwd=cwd,
            env={**os.environ, "YOLO_CACHE_DIR": str(own_cache_folder), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def ended(process, seconds=300):
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def children_of(process):
    """The processes of the ranks."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == process.pid:
            found.append(int(status.parent.name))
    return sorted(found)


def test_two_processes_train_one_student_under_a_teacher(small_set, weights, run_script, tmp_path, rows_of):
    words = ["--data", small_set, *NET, "--teacher", weights, "--feature-loss", "cwd", "--stop-distill", "1"]
    words += ["--epochs", "2", "--project", tmp_path]
    done = run_script("train_distill.py", *words, *SMALL, ranks=2)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["exp"]
    assert len(rows_of(tmp_path / "exp")) == 2
    assert (done.stdout + done.stderr).count("7 images for training") == 1
    assert torch.load(tmp_path / "exp/weights/best.pt", weights_only=True)["model"]


@pytest.mark.parametrize("batch", [2, 8])
def test_ranks_validate_with_unequal_numbers_of_batches(batch, make_shapes, run_script, tmp_path, rows_of):
    """Five images are three validation batches at batch 2, and at batch 8 one for two ranks."""
    data = make_shapes(tmp_path / "five", images=5)
    words = ["train.py", "--data", data, *NET, *SMALL, "--batch", batch, "--epochs", "1"]
    done = run_script(*words, "--project", tmp_path / "runs", ranks=2)
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(tmp_path / "runs/exp")
    assert float(row["val/box_loss"]) > 0


def test_scores_are_to_the_last_digit_those_of_one_process(small_set, weights, run_script, tmp_path):
    words = ["test.py", "--weights", weights, "--data", small_set, "--img", "64", "--batch", "2"]
    words += ["--device", "cpu", "--save-json", "--noplots", "--conf-thres", "0.0001"]
    for name, ranks in (("alone", 0), ("two", 2)):
        done = run_script(*words, "--project", tmp_path, "--name", name, ranks=ranks)
        assert done.returncode == 0, done.stderr
    alone, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("alone", "two"))
    alone.pop("speed_ms"), two.pop("speed_ms")
    assert alone == two and alone["labels"] > 0
    found = [
        sorted(
            json.loads((tmp_path / name / "best_predictions.json").read_text()),
            key=lambda entry: (entry["image_id"], entry["score"], entry["bbox"]),
        )
        for name in ("alone", "two")
    ]
    assert found[0] == found[1]


def long_words(small_set, weights, kind):
    """Epochs with a state after every step: 6 plain ones, or 3 under a teacher and the student's average."""
    epochs = "6" if kind == "plain" else "3"
    common = ["--data", small_set, *NET, "--epochs", epochs, *SMALL, "--save-every-steps", "1"]
    if kind == "plain":
        return ["train.py", *common]
    return [
        "train_distill.py",
        *common,
        "--teacher",
        weights,
        "ema",
        "--distill-ratio",
        "auto",
        "--feature-loss",
        "cwd",
    ]


@pytest.fixture(scope="module")
def whole(small_set, weights, run_script_session, tmp_path_factory):
    """The folders of runs that nothing happens to, by their kind; each is made when it is first asked for."""
    made = {}

    def folder_of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("whole") / "exp"
            words = [*long_words(small_set, weights, kind), "--project", made[kind].parent]
            done = run_script_session(*words, ranks=2)
            assert done.returncode == 0, done.stderr
        return made[kind]

    return folder_of


def wait_for_state(folder, *processes):
    limit = time.monotonic() + 120
    while not (folder / "weights/state.pt").is_file():
        assert all(process.poll() is None for process in processes) and time.monotonic() < limit
        time.sleep(0.02)


def assert_same_end(first, second, rows_of, means=True):
    """Same weights and scores, and the same means of each epoch, but for rounding.

    means: without them one epoch's may be others, where a killed run could only save the first process's.
    """
    one, two = (torch.load(folder / "weights/state.pt", weights_only=True) for folder in (first, second))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])
    rows = list(zip(rows_of(first), rows_of(second), strict=True))
    same = [{name for name in row if is_near(row[name], other[name])} for row, other in rows]
    assert all("metrics/mAP_0.5" in names and "val/box_loss" in names for names in same)
    assert sum(len(names) == len(rows[0][0]) for names in same) >= len(rows) - (not means)


def is_near(first, second):
    """Whether two cells of results.csv, with five digits, are the same but for the last one."""
    return first == second or float(first) == pytest.approx(float(second), rel=1e-4)


@pytest.mark.fault(
    "SIGKILL of one of two ranks",
    "`torchrun --max-restarts` restarts both; the weights end up the same as without the kill",
)
def test_a_rank_that_dies_ends_the_others_and_a_restart_goes_on_to_the_same_weights(
    small_set, weights, whole, torchrun, tmp_path, rows_of
):
    words, folder = long_words(small_set, weights, "distilled"), tmp_path / "exp"
    process = torchrun(*words, "--project", tmp_path, launch=("--max-restarts", "1"))
    wait_for_state(folder, process)
    os.kill(children_of(process)[-1], signal.SIGKILL)
    code, output = ended(process, seconds=200)
    assert code == 0, output
    assert [path.name for path in tmp_path.iterdir()] == ["exp"]
    assert_same_end(whole("distilled"), folder, rows_of, means=False)


@pytest.mark.fault(
    "SIGTERM to `torchrun` or to one rank, SIGINT (Ctrl-C) to the process group",
    "every rank stops and prints the resume command; after SIGTERM to `torchrun`, `--resume` "
    "ends with the same weights",
)
@pytest.mark.parametrize("target", ["launcher", "group", "one"])
def test_processes_that_are_stopped_stop_together_with_the_state_saved(
    target, small_set, weights, whole, torchrun, run_script, tmp_path, rows_of
):
    words, folder = long_words(small_set, weights, "plain"), tmp_path / "exp"
    process = torchrun(*words[:-1], "3", "--project", tmp_path)
    wait_for_state(folder, process)
    if target == "group":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid if target == "launcher" else children_of(process)[-1], signal.SIGTERM)
    code, output = ended(process)
    go_on = "stopped; go on with: torchrun --nproc_per_node 2 train.py --resume"
    assert code != 0 and output.count(go_on) == 2, output
    assert "is gone" not in output and len(rows_of(folder)) < 6
    if target == "launcher":
        done = run_script("train.py", "--resume", folder, ranks=2)
        assert done.returncode == 0, done.stderr
        assert_same_end(whole("plain"), folder, rows_of)


@pytest.mark.fault(
    "SIGKILL of a rank on one of two nodes",
    "`torchrun --nnodes 2 --max-restarts` restarts on both; the weights end up the same",
)
def test_two_launchers_train_together_and_go_on_after_a_death(
    small_set, weights, whole, torchrun, tmp_path, rows_of
):
    """Both on this machine; their processes know each other by the network alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "job"]
    place += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", "--max-restarts", "1"]
    words, folder = [*long_words(small_set, weights, "plain"), "--project", tmp_path], tmp_path / "exp"
    agents = [torchrun(*words, place=place) for _ in range(2)]
    wait_for_state(folder, *agents)
    [rank] = children_of(agents[1])
    os.kill(rank, signal.SIGKILL)
    for agent in agents:
        code, output = ended(agent, seconds=200)
        assert code == 0, output
    assert [path.name for path in tmp_path.iterdir()] == ["exp"]
    assert_same_end(whole("plain"), folder, rows_of, means=False)


@pytest.mark.fault(
    "several nodes without a shared disk",
    "the run folder is needed and written on the first node only, for training and for `--resume`",
)
def test_only_the_first_machine_needs_the_folder_of_the_run(small_set, start_script, tmp_path, rows_of):
    """The second node's process works in another folder, where the run's does not exist."""
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()

    def both(*words):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        launch |= {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "TORCHELASTIC_RUN_ID": "none",
        }
        started = [
            start_script("train.py", *words, cwd=place, env={**launch, "RANK": str(rank)})
            for rank, place in enumerate(places)
        ]
        for process in started:
            assert process.wait(200) == 0, process.said()

    both("--data", small_set, *NET, "--epochs", "1", *SMALL, "--project", "runs")
    assert not (places[1] / "runs").exists()
    both("--resume", "runs/exp", "--epochs", "2")
    assert len(rows_of(places[0] / "runs/exp")) == 2 and not (places[1] / "runs").exists()


@pytest.mark.fault(
    "a batch size that is not divisible by the number of processes", "refused before a run folder is created"
)
def test_a_batch_that_does_not_divide_is_refused(small_set, run_script, tmp_path):
    words = ["train.py", "--data", small_set, *NET, *SMALL, "--batch", "3", "--project", tmp_path / "runs"]
    done = run_script(*words, ranks=2)
    assert done.returncode != 0 and "do not divide among 2 processes" in done.stderr
    assert not (tmp_path / "runs").exists()
