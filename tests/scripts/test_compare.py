"""compare.py and the optional loggers as a person runs them, on runs of train.py and train_distill.py."""

import csv
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--img", "64", "--batch", "4", "--workers", "0", "--device", "cpu", "--noautoanchor"]
NET = ["--cfg", "models/yolov5n.yaml", "--weights", ""]
WANDB = """
import json, os, sys

def note(*what):
    with open(os.environ["WANDB_NOTES"], "a") as notes:
        notes.write(json.dumps(what) + "\\n")

class Config:
    def update(self, values, allow_val_change):
        note("config", values)

class Run:
    config = Config()
    def __init__(self, id):
        self.id = id
    def log(self, values, step):
        note("log", step, values)
        if step >= int(os.environ.get("WANDB_FAILS_AT", 9)):
            raise RuntimeError("no connection")
    def finish(self):
        note("finish")

def init(**given):
    note("init", given)
    return Run(given["id"] or "id-of-the-run")

def Image(path):
    return os.path.basename(path)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wandb(tmp_path_factory):
    """The environment with a stand-in for wandb, and the file that it notes its calls in."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "wandb.py").write_text(WANDB)
    path = f"{ROOT / 'tests/strict_warnings'}:{folder}"
    notes = folder / "notes.jsonl"
    return {"PYTHONPATH": path, "WANDB_NOTES": str(notes), "WANDB_PROJECT": "mine"}, notes


def be_sure(weights):
    """Makes a network that is hardly trained see objects everywhere, so that there is something to draw."""
    content = torch.load(weights, weights_only=True)
    for name, value in content["model"].items():
        if name.startswith("model.24.m.") and name.endswith(".bias"):
            value.view(3, -1)[:, 4:] += 6
    torch.save(content, weights)


@pytest.fixture(scope="module")
def runs(make_shapes, run_script_session, tmp_path_factory, wandb):
    """A folder of runs: `plain`, and `taught`, which stopped after the first of two epochs and went on."""
    folder = tmp_path_factory.mktemp("runs")
    data = make_shapes(folder / "set")
    common = ["--data", data, *NET, *SMALL, "--project", folder / "train"]
    environment, _ = wandb
    plain = run_script_session("train.py", *common, "--epochs", 2, "--name", "plain", "--noplots")
    assert plain.returncode == 0, plain.stderr
    be_sure(folder / "train/plain/weights/best.pt")
    taught = [
        *("train_distill.py", *common, "--name", "taught", "--logger", "wandb"),
        *("--teacher", folder / "train/plain/weights/best.pt"),
    ]
    first = run_script_session(*taught, "--epochs", 1, env=environment)
    assert first.returncode == 0, first.stderr
    words = ["--resume", folder / "train/taught", "--epochs", 2]
    second = run_script_session("train_distill.py", *words, env={**environment, "WANDB_FAILS_AT": "1"})
    assert second.returncode == 0, second.stderr
    return folder, data, second


def test_a_distilled_run_leaves_times_the_teachers_score_and_pictures_of_disagreement(runs):
    folder = runs[0] / "train/taught"
    with open(folder / "times.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert all(0 < float(row[name]) < 100 for row in rows for name in ("train_seconds", "val_seconds"))
    (name, scores), = json.loads((folder / "references.json").read_text()).items()  # fmt: skip
    assert name == f"teacher {runs[0] / 'train/plain/weights/best.pt'}" and 0 <= scores["map50_95"] <= 1
    for picture in ("disagreement.jpg", "objectness.jpg"):
        image = cv2.imread(str(folder / picture))
        assert image is not None and np.ptp(image) > 100
    left = {path.name for path in (runs[0] / "train/plain").iterdir()}
    assert not {"disagreement.jpg", "objectness.jpg", "references.json"} & left


def test_a_logger_gets_the_columns_settings_and_pictures_goes_on_and_may_fail(runs, wandb):
    folder, _, second = runs
    notes = [json.loads(line) for line in wandb[1].read_text().splitlines()]
    first, again = (note[1] for note in notes if note[0] == "init")
    assert (first["project"], first["name"], first["id"]) == ("mine", "taught", None)
    assert (again["id"], again["resume"]) == ("id-of-the-run", "allow")
    config = next(note[1] for note in notes if note[0] == "config")
    assert config["imgsz"] == 64 and config["hyp"]["lr0"] == 0.01
    with open(folder / "train/taught/results.csv", encoding="utf-8") as stream:
        row = next(csv.DictReader(stream))
    logged = next(note[2] for note in notes if note[:2] == ["log", 0])
    given = {name: float(value) for name, value in row.items() if value and name != "epoch"}
    assert {name: value for name, value in logged.items() if "seconds" not in name} == pytest.approx(given)
    pictures = {name for note in notes if note[0] == "log" for name in note[2] if name.startswith("plots/")}
    assert {
        "plots/labels",
        "plots/train_batch0",
        "plots/disagreement",
        "plots/results",
    } <= pictures
    assert sum(note[0] == "finish" for note in notes) == 1  # the second process gave it up before its end
    assert [note[1] for note in notes if note[0] == "log" and note[1] > 0] == [1]
    assert second.stderr.count("--logger wandb: failed (no connection)") == 1


def test_runs_are_compared_in_a_table_and_a_picture(runs, run_script, tmp_path):
    folder = runs[0]
    broken = folder / "train/broken"
    broken.mkdir(exist_ok=True)
    (broken / "results.csv").write_text("epoch,train/box_loss\n0,1\n")
    words = [*sorted((folder / "train").iterdir()), folder / "set", folder / "nowhere", "--project", tmp_path]
    done = run_script("compare.py", *words)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    warnings = done.stderr.splitlines()
    assert len(warnings) == 3, warnings
    assert all(any(name in line for line in warnings) for name in ("broken", "set", "nowhere"))
    assert "distilled: response, teacher plain" in done.stdout and "points over plain training" in done.stdout
    with open(tmp_path / "exp/runs.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [Path(row["run"]).name for row in rows] == ["plain", "taught"]
    assert [row["done"] for row in rows] == ["2", "2"]
    assert {row["parameters"] for row in rows} == {"1766623"} and all(row["time"] != "-" for row in rows)
    assert cv2.imread(str(tmp_path / "exp/comparison.png")) is not None


def test_a_student_and_another_network_are_compared_on_pictures(runs, run_script, tmp_path):
    folder, data, _ = runs
    words = ["--weights", folder / "train/taught/weights/best.pt", "--data", data, *SMALL[:-1]]
    done = run_script(
        "compare.py", *words, "--teacher", folder / "train/plain/weights/best.pt", "--project", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "disagreement.jpg and objectness.jpg in" in done.stdout
    for who in ("student", "teacher"):
        assert re.search(rf"^{who} .*best\.pt: mAP50 \d\.\d+, mAP50-95 \d\.\d+$", done.stdout, re.MULTILINE)
    assert {path.name for path in (tmp_path / "exp").iterdir()} == {"disagreement.jpg", "objectness.jpg"}


def test_a_logger_that_is_not_there_is_said_in_one_line_before_anything_is_made(runs, run_script, tmp_path):
    (tmp_path / "wandb").mkdir()  # what wandb itself leaves beside the scripts
    words = ["--data", runs[1], *NET, *SMALL, "--epochs", 1, "--project", tmp_path / "runs"]
    done = run_script("train.py", *words, "--logger", "wandb", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and "pip install wandb" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()
