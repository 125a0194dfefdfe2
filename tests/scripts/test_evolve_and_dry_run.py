"""Evolution by the script, and runs that only say what they would do."""

import csv
import re
import shlex
from pathlib import Path

import pytest

from models.checkpoint import save_checkpoint
from models.yolo import Model
from utils.config.cli import parse
from utils.config.options import DetectOptions, DistillOptions, TrainOptions
from utils.config.options import TestOptions as ScoringOptions
from utils.distillation.recipe import distillation_recipe
from utils.errors import UsageError, UserError
from utils.evaluation.run import run_test
from utils.inference.run import run_detect
from utils.training.start import run_training

SMALL = ["--img", "64", "--batch", "4", "--workers", "0", "--device", "cpu", "--noautoanchor"]


@pytest.fixture(scope="module")
def small_set(make_shapes, tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An untrained network for the set."""
    model = Model("models/demo-student.yaml", nc=2)
    model.names = ["square", "disc"]
    path = tmp_path_factory.mktemp("weights") / "a start.pt"
    save_checkpoint(path, model=model, epoch=-1, best_fitness=None, meta={})
    return path


def files_below(*folders):
    return {path: path.stat().st_mtime_ns for folder in folders for path in Path(folder).rglob("*")}


def next_commands(said):
    """The commands that a run says at its end, by what they are for."""
    return {match[1]: shlex.split(match[2])[1:] for match in re.finditer(r"^(.+?): (python .+)$", said, re.M)}


def run_words(words, kind, project):
    if kind is TrainOptions:
        run_training(parse(kind, words))
    elif kind is DistillOptions:
        run_training(parse(kind, words), distillation_recipe)
    else:
        (run_test if kind is ScoringOptions else run_detect)(parse(kind, words))


@pytest.mark.parametrize("kind", [TrainOptions, DistillOptions, ScoringOptions, DetectOptions])
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    kind, small_set, weights, tmp_path, capsys, monkeypatch
):
    project = tmp_path / "the runs"
    words = ["--weights", str(weights), "--img", "64", "--device", "cpu", "--project", str(project)]
    if kind is DetectOptions:
        words += ["--source", str(small_set.parent / "images/val"), "--conf", "0.5"]
    else:
        words += ["--data", str(small_set), "--batch", "4", "--workers", "0"]
    if issubclass(kind, TrainOptions):
        words += ["--epochs", "20"]
    if kind is DistillOptions:
        words += ["--teacher", str(weights)]
    monkeypatch.setenv("YOLO_CACHE_DIR", str(tmp_path / "cache"))
    cached = ["--cache", "disk"] if issubclass(kind, TrainOptions) else []
    before = files_below(small_set.parent, weights.parent, tmp_path)
    words += cached
    run_words([*words, "--dry-run"], kind, project)
    assert files_below(small_set.parent, weights.parent, tmp_path) == before
    said = capsys.readouterr().out
    assert "dry run: all is ready, nothing was written" in said and f"would be in {project}/exp" in said
    # What it says to start with gives the same options, without the dry run.
    assert parse(kind, next_commands(said)["start it"][1:]) == parse(kind, words)
    if issubclass(kind, TrainOptions):
        assert re.search(
            r"a step takes about [\d.]+ s, an epoch of 2 steps .+, 20 epochs [\d.]+ (s|min)", said
        )
        assert re.search(r"memory: [\d.]+ GiB", said)
    if kind is DistillOptions:
        assert re.search(r"teacher .*mAP50 \d", said)


def test_a_dry_run_finds_what_a_run_would_stumble_over(small_set, weights, tmp_path):
    mistyped = ["--weights", str(weights.with_name("a strat.pt"))]
    with pytest.raises(UserError, match=rf"did you mean {weights}\?"):
        run_training(parse(TrainOptions, ["--data", str(small_set), *mistyped, "--dry-run"]))
    with pytest.raises(UsageError, match="--dry-run"):
        parse(TrainOptions, ["--resume", str(tmp_path), "--dry-run"])


def test_a_dry_run_scores_as_the_options_say(small_set, weights, tmp_path, capsys):
    """With --single-cls the labels are of one class; the network's own two would have no place."""
    words = ["--weights", str(weights), "--data", str(small_set), "--img", "64", "--device", "cpu"]
    more = ["--workers", "0", "--project", str(tmp_path), "--single-cls", "--dry-run"]
    run_test(parse(ScoringOptions, [*words, *more]))
    assert "dry run: all is ready" in capsys.readouterr().out


def test_a_stream_that_cannot_be_opened_leaves_no_folder(weights, tmp_path):
    words = ["--weights", str(weights), "--source", "rtsp://127.0.0.1:1/x", "--img", "64", "--device", "cpu"]
    with pytest.raises(UserError, match="cannot be opened"):
        run_detect(parse(DetectOptions, [*words, "--project", str(tmp_path)]))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_evolution_by_the_script_and_what_it_says_to_do_next(small_set, weights, run_script, tmp_path):
    words = ["--data", small_set, "--weights", weights, *SMALL, "--epochs", "1", "--project", tmp_path]
    done = run_script("train.py", *words, "--evolve", "2", "--noplots")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "exp/evolve.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["generation"] for row in rows] == ["0", "1"]
    assert rows[0]["lr0"] == "0.01" and rows[0]["metrics/mAP_0.5:0.95"] and rows[0]["val/obj_loss"]
    assert "generation 1 (2 of 2): " in done.stdout and "all 2 generations are over" in done.stdout
    assert not list((tmp_path / "exp").rglob("*.pt"))
    # Again, by a command that does not have to name anything else.
    again = run_script("train.py", "--resume", tmp_path / "exp", "--evolve", "2")
    assert again.returncode == 0 and "2 of them are over" in again.stdout, again.stderr


def test_the_last_lines_of_a_run_can_be_copied(small_set, weights, tmp_path, capsys):
    words = [*SMALL, "--data", str(small_set), "--weights", str(weights), "--noplots", "--epochs", "2"]
    run_training(parse(TrainOptions, [*words, "--project", str(tmp_path / "my runs")]))
    said = capsys.readouterr()
    assert re.search(r"^  .*about [\d.]+ s left$", said.out, re.M)
    commands = next_commands(said.out)
    best = tmp_path / "my runs/exp/weights/best.pt"
    assert f"best weights: {best}\n" in said.out and best.is_file()
    script, *scoring = commands["score them"]
    assert script == "test.py"
    run_test(parse(ScoringOptions, [*scoring, "--project", str(tmp_path)]))
    script, *drawing = commands["use them"]
    assert script == "detect.py"
    run_detect(parse(DetectOptions, [*drawing, "--project", str(tmp_path / "found")]))
    assert len(list((tmp_path / "found/exp").glob("*.png"))) == 1
