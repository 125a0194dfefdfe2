"""detect.py and test.py as a person runs them: processes, real files, wrong input."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models.checkpoint import save_checkpoint
from models.yolo import Model

REPOSITORY = Path(__file__).parents[2]
NAMES = ["round thing", "a/b", "third"]
RunScript = Callable[..., "subprocess.CompletedProcess[str]"]


def assert_refused(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One clear line on stderr, the exit code, no traceback, no run folder."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    for word in words:
        assert word in message, message


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network whose biases make it find something everywhere."""
    torch.manual_seed(0)
    model = Model(REPOSITORY / "models" / "yolov5n.yaml", nc=len(NAMES))
    model.names = list(NAMES)
    with torch.no_grad():
        for convolution in model.head.m:
            convolution.bias.view(3, -1)[:, 4:] += 5.0
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    save_checkpoint(path, model=model.eval(), epoch=0, best_fitness=None, meta={})
    return path


def _picture(path: Path, seed: int, size_wh: tuple[int, int] = (90, 60)) -> None:
    noise = np.random.default_rng(seed).integers(
        0, 255, (size_wh[1] // 10, size_wh[0] // 10, 3), dtype=np.uint8
    )
    cv2.imwrite(str(path), cv2.resize(noise, size_wh, interpolation=cv2.INTER_CUBIC))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled set of six images; the path of its YAML."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for number in range(3):
            _picture(folder / "images" / split / f"p{number}.jpg", number)
            lines = f"{number} 0.5 0.5 0.4 0.4\n0 0.2 0.2 0.2 0.2\n"
            (folder / "labels" / split / f"p{number}.txt").write_text(lines)
    yaml = folder / "tiny.yaml"
    yaml.write_text(f"path: .\ntrain: images/train\nval: images/val\nnames: {json.dumps(NAMES)}\n")
    return yaml


def test_detect_writes_all_that_is_asked_for(run_script: RunScript, tmp_path: Path, weights: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    _picture(source / "one.jpg", 1)
    _picture(source / "two.png", 2, (64, 100))
    (source / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    writer = cv2.VideoWriter(str(source / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 8.0, (64, 48))
    for number in range(6):
        writer.write(np.full((48, 64, 3), 40 * number, np.uint8))
    writer.release()
    before = {path: path.read_bytes() for path in source.iterdir()}
    switches = "--save-txt --save-conf --save-crop --save-csv --half --view-img --device cpu --augment"
    result = run_script(
        "detect.py",
        *("--weights", weights, "--source", source, "--img", 64, "--conf-thres", 0.3, "--max-det", 5),
        *("--classes", 0, 1, "--vid-stride", 2, *switches.split()),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert "1 skipped" in said and "broken.jpg" in said
    assert "--half needs a CUDA device" in said and "--view-img is left out" in said
    run = tmp_path / "runs" / "detect" / "exp"
    assert sorted(path.name for path in run.iterdir()) == [
        *("clip.mp4", "crops", "labels", "one.jpg", "predictions.csv", "two.png")
    ]
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert cv2.imread(str(run / "two.png")).shape == (100, 64, 3)
    assert not np.array_equal(cv2.imread(str(run / "two.png")), cv2.imread(str(source / "two.png")))
    lines = [line.split() for line in (run / "labels" / "one.txt").read_text().splitlines()]
    assert 0 < len(lines) <= 5 and all(len(line) == 6 and line[0] in "01" for line in lines)
    values = np.array(lines, float)[:, 1:]
    assert values.min() >= 0 and values.max() <= 1 and values[:, 4].min() > 0.3
    assert {p.name for p in (run / "crops").iterdir()} <= {"round thing", "a_b"}
    with (run / "predictions.csv").open(newline="") as file:
        assert {row["Image Name"] for row in csv.DictReader(file)} == {"one.jpg", "two.png", "clip.mp4"}
    capture = cv2.VideoCapture(str(run / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and capture.get(cv2.CAP_PROP_FPS) == 4


@pytest.mark.fault(
    "SIGTERM or SIGINT (Ctrl-C) during `detect.py`",
    "exit code 143 or 130; the video written so far can be played",
)
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_video_that_can_be_played(
    tmp_path: Path, weights: Path, number: int, code: int
) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "long.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 8.0, (64, 48))
    for grey in range(2000):
        writer.write(np.full((48, 64, 3), grey % 256, np.uint8))
    writer.release()
    command = [sys.executable, "-u", REPOSITORY / "detect.py", "--weights", weights, "--source", "long.mp4"]
    command += ["--img", "64", "--device", "cpu"]
    process = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        assert any("frame 9 of 2000" in line for line in process.stdout)
        process.send_signal(number)
        assert len(process.stdout.readlines()) < 1900
        errors = process.stderr.read()
    assert process.returncode == code, errors
    assert errors == ("terminated\n" if number == signal.SIGTERM else "interrupted\n")
    capture = cv2.VideoCapture(str(tmp_path / "runs/detect/exp/long.mp4"))
    assert capture.grab() and capture.get(cv2.CAP_PROP_FRAME_COUNT) >= 8


def test_several_weights_form_an_ensemble(
    run_script: RunScript, tmp_path: Path, weights: Path, data: Path
) -> None:
    other = Model(REPOSITORY / "models" / "hub" / "yolov5n6.yaml", nc=4)
    other.names = ["third", "unseen", *NAMES[:2]]
    save_checkpoint(tmp_path / "other.pt", model=other.eval(), epoch=0, best_fitness=None, meta={})
    _picture(tmp_path / "a.jpg", 1)
    both = ("--weights", weights, "other.pt", "--img", 64)
    detected = run_script("detect.py", *both, "--source", "a.jpg", "--save-txt", cwd=tmp_path)
    assert detected.returncode == 0, detected.stderr
    assert f"{weights} + other.pt on " in detected.stdout
    assert "other.pt: classes are matched by name" in detected.stdout
    assert (tmp_path / "runs/detect/exp/labels/a.txt").read_text()
    scored = run_script("test.py", *both, "--data", data, "--save-json", "--noplots", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert f"detect.py --weights {weights} other.pt --source" in scored.stdout
    assert json.loads((tmp_path / "runs/test/exp/tiny_predictions.json").read_text())


def test_detect_with_nothing_to_save_leaves_nothing(
    run_script: RunScript, tmp_path: Path, weights: Path
) -> None:
    _picture(tmp_path / "a.jpg", 1)
    result = run_script(
        "detect.py", "--weights", weights, "--source", "a.jpg", "--img", 70, "--nosave", cwd=tmp_path
    )
    assert result.returncode == 0 and not (tmp_path / "runs").exists()
    assert "using 96" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--source", "nowhere.jpg"], 1, ("nowhere.jpg", "no such file")),
        (["--source", "broken.jpg"], 1, ("broken.jpg", "nothing could be read")),
        (["--source", "http://127.0.0.1:9/x"], 1, ("127.0.0.1:9", "cannot be opened")),
        (["--source", "a.jpg", "--weights", "nowhere.pt"], 1, ("nowhere.pt",)),
        (["--source", "a.jpg", "--weights", "a.jpg"], 1, ("a.jpg",)),
        (["--source", "a.jpg", "--classes", "3"], 2, ("--classes", "0 to 2")),
        (["--source", "a.jpg", "--conf-thres", "2"], 2, ("conf",)),
        (["--source", "a.jpg", "--device", "7"], 2, ("--device",)),
    ],
)
def test_detect_refuses_what_cannot_work(
    run_script: RunScript,
    tmp_path: Path,
    weights: Path,
    arguments: list[str],
    code: int,
    words: tuple[str, ...],
) -> None:
    _picture(tmp_path / "a.jpg", 1)
    (tmp_path / "broken.jpg").write_bytes(b"")
    given = arguments if "--weights" in arguments else ["--weights", str(weights), *arguments]
    assert_refused(run_script("detect.py", *given, cwd=tmp_path), code, *words)
    assert not list(tmp_path.glob("runs/detect/*"))


def test_test_scores_and_writes_what_is_asked_for(
    run_script: RunScript, tmp_path: Path, weights: Path, data: Path
) -> None:
    before = {path: path.read_bytes() for path in data.parent.rglob("*") if path.is_file()}
    result = run_script(
        "test.py",
        *("--weights", weights, "--data", data, "--img", 64, "--batch", 2, "--workers", 0),
        *("--verbose", "--save-txt", "--save-conf", "--save-json"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert all(word in said for word in ("mAP50-95", "round thing", "third", "ms inference"))
    run = tmp_path / "runs" / "test" / "exp"
    names = {path.name for path in run.iterdir()}
    assert {"labels", "tiny_predictions.json", "confusion_matrix.png", "PR_curve.png"} <= names
    assert {f"val_batch{n}_{kind}.jpg" for n in (0, 1) for kind in ("labels", "pred")} <= names
    scores = json.loads((run / "metrics.json").read_text())
    assert scores["images"] == 3 and 0 <= scores["map50_95"] <= scores["map50"] <= 1
    assert set(scores["classes"]) <= set(NAMES)
    entries = json.loads((run / "tiny_predictions.json").read_text())
    assert {entry["image_id"] for entry in entries} == {"p0", "p1", "p2"}
    in_text = sum(len(path.read_text().splitlines()) for path in (run / "labels").iterdir())
    assert in_text == len(entries) > 0
    assert {path: path.read_bytes() for path in data.parent.rglob("*") if path.is_file()} == before


def test_test_has_other_tasks_and_ways(
    run_script: RunScript, tmp_path: Path, weights: Path, data: Path
) -> None:
    common = ("--weights", weights, "--data", data, "--img", 64, "--workers", 0)
    speed = run_script("test.py", *common, "--task", "speed", "--half", "--device", "cpu", cwd=tmp_path)
    assert speed.returncode == 0 and "ms inference" in speed.stdout + speed.stderr
    assert not (tmp_path / "runs").exists()
    single = run_script(
        "test.py", *common, *"--task train --single-cls --augment --noplots --no-rect".split(), cwd=tmp_path
    )
    assert single.returncode == 0, single.stderr
    assert [path.name for path in (tmp_path / "runs/test/exp").iterdir()] == ["metrics.json"]


def test_without_a_readable_image_an_earlier_table_stays(
    run_script: RunScript, tmp_path: Path, weights: Path
) -> None:
    (tmp_path / "bad.jpg").write_text("x")
    earlier = tmp_path / "runs/detect/exp/predictions.csv"
    given = ("--weights", weights, "--source", "bad.jpg", "--img", 64, "--save-csv")
    assert_refused(run_script("detect.py", *given, cwd=tmp_path), 1, "bad.jpg")
    assert not earlier.parent.exists()
    earlier.parent.mkdir(parents=True)
    earlier.write_text("mine")
    assert_refused(run_script("detect.py", *given, "--exist-ok", cwd=tmp_path), 1, "bad.jpg")
    assert earlier.read_text() == "mine" and list(earlier.parent.iterdir()) == [earlier]


def test_of_one_class_the_scores_are_those_of_the_class_that_the_data_has(
    run_script: RunScript, tmp_path: Path, weights: Path, data: Path
) -> None:
    part = data.with_name("part.yaml")
    part.write_text(data.read_text().replace(json.dumps(NAMES), '["third"]'))
    for labels in data.parent.rglob("*.txt"):
        lines = [line.split(maxsplit=1)[1] for line in labels.read_text().splitlines()]
        labels.write_text("".join(f"0 {line}\n" for line in lines))
    scores = []
    for number, more in enumerate(([], ["--single-cls"])):
        given = ("--weights", weights, "--data", part, "--img", 64, "--workers", 0, "--noplots", *more)
        result = run_script("test.py", *given, "--name", number, cwd=tmp_path)
        assert result.returncode == 0 and "its other 2 classes left out" in result.stdout, result.stderr
        scores.append(json.loads((tmp_path / f"runs/test/{number}/metrics.json").read_text()))
        scores[-1].pop("speed_ms")
        assert len(scores[-1].pop("classes")) == 1  # under another name
    assert scores[0] == scores[1]


def test_test_refuses_what_cannot_work(
    run_script: RunScript, tmp_path: Path, weights: Path, data: Path
) -> None:
    two = data.with_name("two.yaml")
    two.write_text(data.read_text().replace(json.dumps(NAMES), '["x", "y"]'))
    common = ("--weights", weights, "--img", 64, "--workers", 0)
    other_classes = run_script("test.py", *common, "--data", two, cwd=tmp_path)
    assert_refused(other_classes, 1, "3 classes (round thing, a/b, third)", "2 classes (x, y)")
    no_split = run_script("test.py", *common, "--data", data, "--task", "test", cwd=tmp_path)
    assert_refused(no_split, 1, "test", "tiny.yaml")
    assert not (tmp_path / "runs").exists()


def test_public_weights_detect_on_real_pictures(
    run_script: RunScript, tmp_path: Path, public_yolov5n: Path, bccd_dir: Path
) -> None:
    pictures = sorted((bccd_dir / "JPEGImages").glob("*.jpg"))[:2]
    for picture in pictures:
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    result = run_script(
        "detect.py",
        "--weights",
        public_yolov5n,
        "--source",
        "*.jpg",
        "--img",
        320,
        "--save-txt",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "detect" / "exp"
    assert {picture.name for picture in pictures} <= {path.name for path in run.iterdir()}
