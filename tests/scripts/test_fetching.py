"""The scripts fetch what they lack, once, and only where they may."""

import io
import os
import re
import shlex
import shutil
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml

import models.download
from utils.datasets import convert, download

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--img", "64", "--workers", "0", "--device", "cpu", "--noplots"]


@pytest.fixture
def data(make_shapes, serving, tmp_path):
    """A dataset YAML whose data is not there, and lies on the server in an archive."""
    made = make_shapes(tmp_path / "made" / "shapes", names=("ring", "star", "cross", "disc", "moon", "leaf"))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in sorted(made.parent.rglob("*.*")):
            archive.write(path, path.relative_to(tmp_path / "made"))
    serving.files["/shapes.zip"] = content.getvalue()
    settings = yaml.safe_load(made.read_text())
    step = {
        "url": [f"{serving.url}/gone/shapes.zip", f"{serving.url}/shapes.zip"],
        "take": "shapes",
        "gives": "images/val",
    }
    settings |= {"path": "datasets/shapes", "download": [step]}
    shutil.rmtree(tmp_path / "made")
    (tmp_path / "shapes.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "shapes.yaml"


@pytest.fixture
def mirror(serving, tmp_path, monkeypatch):
    """A mirror with weights under a public name, reached from a working folder with a folder `weights`."""
    serving.files["/yolov5x6.pt"] = (ROOT / "weights/demo_student.pt").read_bytes()
    monkeypatch.setenv("YOLO_MIRROR", serving.url)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    (tmp_path / "weights").mkdir()
    return serving


def errors_of(done):
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


def test_data_weights_and_teacher_are_fetched_once(data, mirror, run_script, tmp_path):
    words = ["--data", data, "--weights", "yolov5x6.pt", *SMALL, "--project", tmp_path / "runs"]
    training = ["--teacher", "yolov5x6.pt", "--epochs", 1, "--batch", 4, "--noautoanchor"]
    done = run_script("train_distill.py", *words, *training, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"fetching what is missing into {tmp_path / 'datasets/shapes'}: 1 archive" in done.stdout
    assert "fetching yolov5x6.pt into weights" in done.stdout
    done = run_script("test.py", *words, cwd=tmp_path)
    assert done.returncode == 0 and "fetching" not in done.stdout, done.stderr
    counts = Counter(path for path, _ in mirror.asked)
    assert counts == {"/yolov5x6.pt": 1, "/shapes.zip": 1}
    assert sorted(entry.name for entry in (tmp_path / "datasets").iterdir()) == ["shapes"]


@pytest.mark.parametrize("script", ["train_distill.py", "detect.py"])
def test_no_download_asks_nobody(script, data, mirror, run_script, tmp_path):
    words = ["--weights", "yolov5x6.pt", "--device", "cpu", "--no-download", "--project", tmp_path / "runs"]
    words += ["--source", ROOT / "data/images"] if script == "detect.py" else ["--data", data]
    words += ["--teacher", ROOT / "weights/demo_teacher.pt"] if script == "train_distill.py" else []
    done = run_script(script, *words, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = errors_of(done)
    assert "no-download" in line
    assert mirror.asked == [] and not (tmp_path / "datasets").exists() and not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.fault(
    "several `torchrun` processes lack the same data and weights", "one downloads them, the others wait"
)
def test_of_several_ranks_one_fetches(data, mirror, run_script, tmp_path):
    mirror.stalls["/yolov5x6.pt"] = 1000, 1.5
    mirror.stalls["/shapes.zip"] = 1000, 1.5
    words = ["--data", data, "--weights", "yolov5x6.pt", *SMALL, "--project", tmp_path / "runs"]
    done = run_script("test.py", *words, cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    counts = Counter(path for path, _ in mirror.asked)
    assert counts == {"/yolov5x6.pt": 1, "/shapes.zip": 1}
    assert done.stdout.count("fetching what is missing") == done.stdout.count("fetching yolov5x6.pt") == 1


def called_by(script, *words, cwd):
    """The folder and the words with which a shell script calls Python."""
    (cwd / "python").write_text('#!/bin/sh\npwd\necho "$@"\n')
    (cwd / "python").chmod(0o755)
    done = subprocess.run(
        ["sh", ROOT / script, *words],
        cwd=cwd,
        env={**os.environ, "PYTHON": str(cwd / "python")},
        capture_output=True,
        text=True,
        check=True,
    )
    folder, line = done.stdout.splitlines()
    return Path(folder), shlex.split(line)


def test_the_commands_of_the_documents_are_taken(tmp_path):
    parsers = {module.__spec__.name: module._arguments for module in (models.download, download, convert)}
    text = "".join((ROOT / name).read_text() for name in ("README.md", "docs/datasets.md")).replace(
        "\\\n", ""
    )
    found = re.findall(r"^(?:bash|python -m) .*(?:\.sh|download|convert)\b.*$", text, re.MULTILINE)
    assert len(found) >= 8
    for command in found:
        start, *words = shlex.split(command)
        if start == "bash":
            words = called_by(*words, cwd=tmp_path)[1]
        assert words[0] == "-m"
        parsers[words[1]](words[2:])


@pytest.mark.parametrize("name", ["get_voc", "get_voc2007", "get_coco"])
def test_the_shell_scripts_call_the_same_code_from_any_folder(name, tmp_path):
    folder, words = called_by(f"data/scripts/{name}.sh", "--keep", cwd=tmp_path)
    yaml_path = f"data/{name.removeprefix('get_')}.yaml"
    assert folder == ROOT and words == ["-m", "utils.datasets.download", yaml_path, "--keep"]
    assert (ROOT / yaml_path).is_file() and os.access(ROOT / "data/scripts" / f"{name}.sh", os.X_OK)
    assert called_by("weights/download_weights.sh", "a.pt", cwd=tmp_path)[1] == [
        "-m",
        "models.download",
        "a.pt",
    ]
