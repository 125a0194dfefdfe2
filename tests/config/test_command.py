"""Commands for people to copy do what they say."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from utils.config.cli import parse
from utils.config.command import (
    after_detection,
    after_test,
    after_training,
    command_of,
    evolved_command,
    resume_command,
    start_command,
)
from utils.config.options import DetectOptions, DistillOptions, TrainOptions
from utils.config.options import TestOptions as ScoreOptions

ODD = "my runs/it's $HOME/best.pt"


def read(line, kind, script):
    """The options of a command, as a shell and the script would take it."""
    python, name, *words = shlex.split(line.split(": ", 1)[-1])
    assert (python, name) == ("python", script)
    return parse(kind, words)


@pytest.mark.parametrize(
    ("kind", "script", "words"),
    [
        (TrainOptions, "train.py", ["--weights", "", "--cfg", "a b.yaml", "--no-amp", "--freeze", "1", "2"]),
        (TrainOptions, "train.py", ["--data", "--odd.yaml", "--cache", "--save-period", "-1", "--rect"]),
        (DistillOptions, "train_distill.py",
         ["--teacher", "a.pt", "b 'c'.pt", "--distill-ratio", "auto", "--no-with-gt-loss", "--no-distill",
          "--unlabeled-share", "0.1"]),
        (DistillOptions, "train_distill.py", ["--teacher", "a.pt", "--distill-ratio", "0.3333333333"]),
        (DetectOptions, "detect.py", ["--img", "320", "640", "--source", "*.jpg", "--classes", "0", "2"]),
        (ScoreOptions, "test.py", ["--no-rect", "--task", "speed"]),
    ],
)  # fmt: skip
def test_a_command_gives_the_options_that_it_was_made_of(kind, script, words):
    if words[1] == "--odd.yaml":
        words = ["--data=--odd.yaml", *words[2:]]
    if "--no-with-gt-loss" in words:
        words = [word for word in words if word not in ("--no-distill", "auto", "--distill-ratio")]
    options = parse(kind, words)
    assert read(command_of(options), kind, script) == options


def test_after_training_weights_are_scored_and_used_as_they_were_trained():
    options = parse(TrainOptions, ["--data", "a set.yaml", "--img", "320", "--single-cls", "--workers", "0"])
    best, score, use = after_training(options, Path(ODD), "images/it's one.jpg", 8).splitlines()
    assert best == f"best weights: {ODD}"
    scored, used = read(score, ScoreOptions, "test.py"), read(use, DetectOptions, "detect.py")
    assert (scored.weights, scored.data, scored.imgsz) == ((ODD,), Path("a set.yaml"), 320)
    assert scored.single_cls and scored.workers == 0
    assert (used.weights, used.source, used.imgsz) == ((ODD,), "images/it's one.jpg", (320,))
    plain = after_training(TrainOptions(), Path("best.pt"), "a.jpg", 32)
    assert "test.py --weights best.pt --data data/coco128.yaml\n" in plain  # what matters is always there


def test_the_other_scripts_say_what_comes_next_too():
    scored = parse(ScoreOptions, ["--weights", ODD, "--img", "96"])
    assert read(after_test(scored, "a.jpg"), DetectOptions, "detect.py").weights == (ODD,)
    detected = parse(DetectOptions, ["--weights", ODD])
    assert read(after_detection(detected, 3), DetectOptions, "detect.py").save_txt
    assert read(after_detection(detected, 0), DetectOptions, "detect.py").conf_thres == 0.05
    assert after_detection(parse(DetectOptions, ["--save-csv"]), 3) == ""
    tried = parse(ScoreOptions, ["--weights", ODD, "--dry-run"])
    assert read(start_command(tried), ScoreOptions, "test.py") == replace(tried, dry_run=False)
    assert start_command(tried, 4).startswith("torchrun --nproc_per_node 4 ")
    resumed = read(resume_command(DistillOptions, Path("a b")), DistillOptions, "train_distill.py")
    assert resumed.resume == "a b"
    evolved = parse(TrainOptions, ["--evolve", "9", "--epochs", "3", "--project", "p", "--hyp", "a.yaml"])
    again = read(evolved_command(evolved, Path("h e.yaml")), TrainOptions, "train.py")
    assert (again.evolve, again.epochs, again.hyp) == (None, 3, Path("h e.yaml"))
    assert again.project == TrainOptions().project


def test_scripts_are_named_where_they_lie(monkeypatch):
    monkeypatch.setattr("sys.argv", ["../yolo dir/train.py"])
    assert resume_command(TrainOptions, Path("r")) == "python '../yolo dir/train.py' --resume r"
    monkeypatch.setattr("sys.argv", ["/usr/bin/pytest"])
    assert resume_command(TrainOptions, Path("r")) == "python train.py --resume r"


@pytest.mark.parametrize(
    "script", ["train.py", "train_distill.py", "test.py", "detect.py", "compare.py", "export.py"]
)
def test_every_script_names_the_others_where_they_lie(monkeypatch, script):
    monkeypatch.setattr("sys.argv", [f"/yolo/{script}"])
    assert command_of(DetectOptions()) == "python /yolo/detect.py"


def test_a_run_of_several_processes_goes_on_in_as_many():
    found = resume_command(TrainOptions, Path("r"), 4)
    assert found == "torchrun --nproc_per_node 4 train.py --resume r"


def test_values_that_look_like_options_are_all_kept():
    one = DistillOptions(teacher=("--a.pt",), weights="--b.pt")
    again = read(command_of(one), DistillOptions, "train_distill.py")
    assert (again.teacher, again.weights) == (("--a.pt",), "--b.pt")
    several = command_of(DistillOptions(teacher=("a.pt", "--b.pt", "c.pt")))
    assert read(several, DistillOptions, "train_distill.py").teacher == ("a.pt", "./--b.pt", "c.pt")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], False),
        (["--soft-loss"], False),
        (["--distill-loss", "response"], False),
        (["--distill-loss", "l2"], True),
    ],
)
def test_the_output_loss_is_named_where_it_would_be_another_without(words, named):
    options = parse(DistillOptions, ["--teacher", "a.pt", *words])
    line = command_of(options)
    assert ("--distill-loss" in line) == named
    assert read(line, DistillOptions, "train_distill.py") == options
