"""The command line: what is understood, what is refused and how, and what a script returns."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.config import cli
from utils.config.cli import one_line, parse, run
from utils.config.option_help import names_of, option_table
from utils.config.options import CompareOptions, DetectOptions, DistillOptions, ExportOptions, TrainOptions
from utils.config.options import TestOptions as ScoreOptions
from utils.config.settings import settings_of
from utils.config.version import VERSION
from utils.errors import UsageError, UserError

ROOT = Path(__file__).resolve().parents[2]


def problems_of(options_class: type, *words: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(options_class, words)
    return str(caught.value)


def test_the_commands_of_the_readme_and_of_the_seed_are_understood() -> None:
    seed = parse(
        DistillOptions,
        "--weights yolov5s.pt --teacher weights/yolov5l_voc.pt --distill_ratio 0.001 --teacher-cfg "
        "model/yolov5l.yaml --data data/voc.yaml --epochs 30 --batch-size 16 --t_nms_thres .5 --distill "
        "--dist_loss boxes --with-gt-loss".split(),
    )
    assert (seed.teacher, seed.distill_ratio, seed.t_nms_thres) == (("weights/yolov5l_voc.pt",), 0.001, 0.5)
    assert (seed.data, seed.with_gt_loss, seed.preset()) == (Path("data/voc.yaml"), True, "boxes")
    train = parse(TrainOptions, ["--cfg", "a.yaml", "--weights", "", "--img", "320", "--device", "cpu"])
    assert (train.weights, train.imgsz, train.device) == ("", 320, "cpu")
    assert train.given == {"cfg", "weights", "imgsz", "device"}


def test_values_are_left_as_they_are_and_names_may_have_underscores() -> None:
    options = parse(
        TrainOptions, ["--name", "my-run_1", "--data_dir=/a_b/c-d=e", "--exist_ok", "--save-period", "-1"]
    )
    assert (options.name, options.data_dir, options.exist_ok) == ("my-run_1", Path("/a_b/c-d=e"), True)
    assert options.save_period == -1
    assert parse(TrainOptions, ["--name", "-x"]).name == "-x"


def test_words_without_a_name_are_those_of_the_option_that_takes_them() -> None:
    options = parse(CompareOptions, ["a", "--metric", "recall", "b/c", "--no-group", "d", "--runs", "e"])
    assert options.runs == (Path("e"), Path("a"), Path("b/c"), Path("d"))
    assert (options.metric, options.group, options.given) == ("recall", False, {"runs", "metric", "group"})
    assert parse(CompareOptions, ["--ignore", "seed", "lr0", "--runs=a"]).ignore == ("seed", "lr0")
    assert "no such option" in problems_of(CompareOptions, "a", "--nothing")
    assert "must not be empty" in problems_of(CompareOptions, "")
    assert "'a': not expected here" in problems_of(TrainOptions, "a")


def test_runs_or_two_weight_files_are_compared_and_nothing_else() -> None:
    assert "nothing to compare" in problems_of(CompareOptions)
    assert "--teacher" in problems_of(CompareOptions, "--weights", "s.pt")
    assert "leave" in problems_of(CompareOptions, "a", "--weights", "s.pt", "--teacher", "t.pt")
    given = parse(CompareOptions, ["a", "--img", "64", "--device", "cpu"])
    assert [warning.split()[0] for warning in given.warnings()] == ["--device", "--imgsz"]
    given = parse(CompareOptions, ["--weights", "s.pt", "--teacher", "t.pt", "--metric", "recall"])
    assert list(given.warnings()) == ["--metric has no effect without runs"]


def test_values_may_be_many_optional_or_repeated() -> None:
    assert parse(TrainOptions, ["--freeze", "10"]).freeze == (10,)
    assert parse(TrainOptions, ["--freeze", "0", "1", "2", "--rect"]).freeze == (0, 1, 2)
    assert parse(DetectOptions, ["--classes", "0", "2", "--img", "64", "96"]).imgsz == (64, 96)
    assert parse(TrainOptions, ["--cache", "--rect"]).cache == "ram"
    assert parse(TrainOptions, ["--cache", "disk"]).cache == "disk"
    assert parse(TrainOptions, []).cache is None and parse(TrainOptions, []).resume is None
    assert parse(TrainOptions, ["--epochs", "3", "--epochs", "5"]).epochs == 5
    assert parse(DistillOptions, ["--teacher", "t", "--no_with_gt_loss", "--with-gt-loss"]).with_gt_loss


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--epochs 0", "--epochs 0: must be a whole number of 1 or more"),
        ("--batch -3", "--batch -3: must be a whole number of 1 or more"),
        ("--epochs 1.5", "--epochs 1.5: must be a whole number of 1 or more"),
        ("--epochs 1_000", "--epochs 1_000: must be a whole number"),
        ("--epochs ten", "--epochs ten: must be a whole number of 1 or more"),
        ("--epochs --rect", "--epochs: needs a value, a whole number of 1 or more"),
        ("--imgsz 16", "--imgsz 16: must be a whole number from 32 to 16384"),
        ("--label-smoothing nan", "--label-smoothing nan: must be a number from 0 to 1"),
        ("--label_smoothing inf", "--label_smoothing inf: must be a number from 0 to 1"),
        ("--freeze", "--freeze: needs a value"),
        ("--freeze 0 -1", "--freeze 0 -1: must be a whole number of 0 or more"),
        ("--seed " + "9" * 400, "0 to 4294967295"),
        ("--optimizer sgd", "--optimizer sgd: must be one of SGD, Adam, AdamW, did you mean 'SGD'?"),
        ("--cache disc", "--cache disc: must be one of ram, disk, did you mean 'disk'?"),
        ("--epoch 3", "--epoch: no such option, did you mean '--epochs'?"),
        ("--img_sizes 3", "--img_sizes: no such option, did you mean '--img-size'?"),
        ("-epochs 3", "-epochs: no such option, did you mean '--epochs'?"),
        ("--no-ampp", "did you mean '--no-amp'?"),
        ("--qqqq", "--qqqq: no such option, see --help"),
        ("--evolution", "--evolution: no such option, see --help"),
        ("--evolve 0", "--evolve 0: must be a whole number of 1 or more"),
        ("--upload_dataset", "--upload_dataset: is not supported"),
        ("--local_rank=0", "--local_rank: is not supported"),
        ("--adam", "--adam: does not exist, use --optimizer Adam"),
        ("--notest", "--notest: does not exist, train.py has --noval"),
        ("--no-rect", "--no-rect: no such option"),
        ("--img 640 480", "'480': not expected here, --img takes no further value"),
        ("--img 640 480 320", "'480' and 1 more word: not expected here, --img takes no further value"),
        ("--data a.yaml data/voc.yaml data/bccd.yaml", "'data/voc.yaml' and 1 more word: not expected here, "
         "--data takes no further value; quotes keep the shell from replacing a pattern: '*.jpg'"),
        ("--rect 1", "'1': not expected here, --rect takes no further value"),
        ("--rect=true", "--rect=true: --rect takes no value"),
        ("train", "'train': not expected here, options start with --"),
        ("--hyp=", "--hyp '': must not be empty"),
    ],
)  # fmt: skip
def test_wrong_words_are_told_with_what_is_expected(words: str, told: str) -> None:
    message = problems_of(TrainOptions, *words.split())
    assert told in message and "\n" not in message


@pytest.mark.parametrize(
    ("options_class", "name"),
    [
        (options_class, name)
        for options_class in (TrainOptions, ScoreOptions, DetectOptions, ExportOptions)
        for name in options_class.absent
    ],
)
def test_options_of_other_yolov5s_are_told_without_a_guess(options_class: type, name: str) -> None:
    message = problems_of(options_class, f"--{name.replace('-', '_')}", "value", "more")
    assert "did you mean" not in message and message.count("; ") == 0
    assert not [known for known in settings_of(options_class).values() if f"--{name}" in names_of(known)]


@pytest.mark.parametrize(
    ("options_class", "words", "told"),
    [
        (ScoreOptions, "--task study", "--task study: is not supported, run test.py once"),
        (ExportOptions, "--include onnx engine --half", "--include engine: is not supported: TensorRT"),
        (ExportOptions, "--include tflite", "--include tflite: is not supported: --include takes"),
        (ExportOptions, "--include onx", "--include onx: must be one of torchscript, onnx"),
    ],
)  # fmt: skip
def test_values_of_other_yolov5s_are_told_each_with_what_to_do(
    options_class: type, words: str, told: str
) -> None:
    assert problems_of(options_class, *words.split()).startswith(told)


def test_each_of_several_formats_that_are_missing_is_told() -> None:
    message = problems_of(
        ExportOptions, *"--include coreml saved_model pb tflite edgetpu tfjs paddle".split()
    )
    assert message.count("is not supported: ") == 7


def test_a_square_may_be_given_by_height_and_width() -> None:
    for options_class in (TrainOptions, ScoreOptions):
        options = parse(options_class, ["--img", "320", "320", "--batch", "4"])
        assert (options.imgsz, options.batch_size) == (320, 4)
        assert "'320': not expected here" in problems_of(options_class, "--img", "320", "320", "320")
        assert "'4': not expected here" in problems_of(options_class, "--batch", "4", "4")
    assert parse(DetectOptions, ["--img", "320", "320"]).imgsz == (320, 320)


def test_all_problems_are_told_at_once() -> None:
    message = problems_of(TrainOptions, *"--epochs 0 --epoch 5 --imgsz 64 32 --optimizer SDG --seed".split())
    for part in ("--epochs 0", "--epoch:", "'32'", "'SGD'", "--seed:"):
        assert part in message


def test_the_distillation_ratio_is_a_number() -> None:
    assert "--distill-ratio nan: must be a number of 0 or more" in problems_of(
        DistillOptions, "--teacher", "t", "--distill-ratio", "nan"
    )


def fail(error: BaseException):
    def main(options):
        raise error

    return main


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_the_libraries_load_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception there would leave them half loaded; the handler of before is back afterwards."""
    before, seen = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(
        cli.importlib, "import_module", lambda _: seen.append(signal.getsignal(signal.SIGINT))
    )
    assert run(TrainOptions, lambda _: None, "", ["--weights", "a.pt"]) == 0
    assert signal.getsignal(signal.SIGINT) is before and before not in seen
    code = (
        "import importlib, os, signal\n"
        "from utils.config import cli\n"
        "from utils.config.options import TrainOptions\n"
        "importlib.import_module = lambda _: (os.kill(os.getpid(), signal.SIGINT), print('went on'))\n"
        "raise SystemExit(cli.run(TrainOptions, print, '', []))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_sigterm_ends_the_work_as_ctrl_c_does(
    number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is open is finished, even where any Exception is caught; a signal sent twice is one."""
    finished, acted = [], []

    def main(_: TrainOptions) -> None:
        try:
            with contextlib.suppress(Exception):
                signal.raise_signal(number)
                pytest.fail("went on")
        finally:
            signal.raise_signal(number)
            finished.append(1)

    before = signal.signal(number, lambda number, _: acted.append(number))
    try:
        assert run(TrainOptions, main, "", ["--weights", "a.pt"]) == code
        assert capsys.readouterr().err == "terminated\n" and finished == [1] and not acted
        signal.raise_signal(number)
        assert acted == [number]  # everything is as it was
    finally:
        signal.signal(number, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_python_drops_is_told_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    assert run(TrainOptions, lambda _: (Finalized(), gc.collect()), "", ["--weights", "a.pt"]) == 143
    assert capsys.readouterr().err.endswith("terminated\n")


@pytest.mark.fault(
    "standard output on a full disk, or closed",
    "work goes on and is saved; exit code 1 and one line in the first case",
)
def test_output_that_cannot_be_written_costs_no_work() -> None:
    for shell, code, said in (
        ("> /dev/full", 1, "error: standard output: cannot be written (No space left on device)"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
    ):
        done = subprocess.run(
            ["sh", "-c", f'exec "{sys.executable}" train.py --help {shell}'],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code and done.stderr.startswith(said), done.stderr
        assert "Traceback" not in done.stderr and done.stderr.count("\n") == bool(said)


@pytest.mark.parametrize("who", ["a second one", "a child"])
def test_sigterm_acts_as_always_on_children_and_when_it_comes_again(who: str) -> None:
    code = (
        "import os, signal, sys, time\n"
        "from utils.config import signals\n"
        "signals.ECHO = -1.0\n"
        "with signals.sigterm_as_interrupt():\n"
        "    if sys.argv[1] == 'a child':\n"
        "        if child := os.fork():\n"
        "            os._exit(-os.waitstatus_to_exitcode(os.wait()[1]))\n"
        "    else:\n"
        "        try: signal.raise_signal(signal.SIGTERM)\n"
        "        except signals.Terminated: pass\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    os._exit(99)"
    )
    done = subprocess.run([sys.executable, "-c", code, who], cwd=ROOT, timeout=60, check=False)
    assert abs(done.returncode) == signal.SIGTERM


def test_errors_of_the_user_are_one_line_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(TrainOptions, fail(UserError("is not an image", "a\nb.jpg", "delete it")), "", []) == 1
    assert capsys.readouterr().err == "error: a b.jpg: is not an image; delete it\n"
    assert run(TrainOptions, fail(UsageError("does not exist", "--device")), "", []) == 2
    assert capsys.readouterr().err == "error: --device: does not exist\n"
    assert run(TrainOptions, fail(KeyboardInterrupt()), "", []) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert run(TrainOptions, fail(AssertionError("never called")), "", ["--epochs", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: --epochs 0")


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(TrainOptions, fail(UserError("is gone", "x.pt")), "", ["--debug", "--epochs", "3"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith("error: x.pt: is gone\n")


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(TrainOptions, fail(ZeroDivisionError()), "", [])


def test_a_run_that_ends_well_gives_0_and_remarks_what_had_no_effect(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = []
    assert run(TrainOptions, seen.append, "", ["--no-amp", "--amp-dtype", "fp16"]) == 0
    assert capsys.readouterr().err == "warning: --amp-dtype has no effect with --no-amp\n"
    assert seen[0].amp is False


def test_help_and_version_win_over_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    never = fail(AssertionError("never called"))
    assert run(TrainOptions, never, "Does this.", ["--epochs", "x", "-h"]) == 0
    said = capsys.readouterr().out
    assert "Does this." in said and "--batch-size, --batch N" in said and "1 or more, default 16" in said
    assert run(TrainOptions, never, None, ["--version"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"yolov5-distillation {VERSION}"
    assert second.startswith(f"torch {torch.__version__}, Python {platform.python_version()}")
    assert third.startswith("devices: ") and "CPU" in third
    # The one home of the version: no second one that could differ.
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"' in project and f'"{VERSION}"' not in project


def test_a_message_cannot_command_the_terminal() -> None:
    assert one_line("bad \x1b[2J name\r\n  next\tline größer") == "bad \\x1b[2J name next\\tline größer"


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "--help"],
            stdout=write,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_tables_of_options_have_a_row_for_each_option_once() -> None:
    whole, added = option_table(DistillOptions), option_table(DistillOptions, beyond=TrainOptions)
    assert "| `--imgsz`, `--img`, `--img-size` | `640` | side of" in whole
    assert "`--no-with-gt-loss` | `on` |" in added and "`--imgsz`" not in added
    assert "(`response` or `boxes` or `objectness` or `l2` or `kl`)" in added
    for line in whole.splitlines():
        assert not line or line.count("|") == 4
