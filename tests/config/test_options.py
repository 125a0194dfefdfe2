"""Options objects: ranges, contradictions, the preset, and the way through opt.yaml."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from utils.config import options as declared
from utils.config.cli import parse
from utils.config.options import (
    CHANGEABLE_ON_RESUME,
    PRESETS,
    DetectOptions,
    DistillOptions,
    ExportOptions,
    TrainOptions,
    options_from_dict,
    options_to_dict,
    yaml_text,
)
from utils.config.settings import Limits, above, at_least, between, option, settings_of, to_plain
from utils.errors import UsageError

CLASSES = (TrainOptions, DistillOptions, declared.TestOptions, DetectOptions)


def distilled(*words: str) -> DistillOptions:
    return parse(DistillOptions, ["--teacher", "t.pt", *words])


def problem_of(options_class: type, *words: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(options_class, words)
    return str(caught.value)


def test_defaults_are_those_that_yolov5_users_know() -> None:
    train, test, detect = TrainOptions(), declared.TestOptions(), DetectOptions()
    assert (train.epochs, train.batch_size, train.imgsz, train.optimizer) == (100, 16, 640, "SGD")
    assert (test.conf_thres, test.iou_thres, test.max_det, test.rect) == (0.001, 0.6, 300, True)
    assert (detect.conf_thres, detect.iou_thres, detect.max_det, detect.imgsz) == (0.25, 0.45, 1000, (640,))


@pytest.mark.parametrize("options_class", CLASSES)
def test_every_option_has_help_and_a_group_and_numbers_have_a_range(options_class: type) -> None:
    for setting in settings_of(options_class).values():
        assert setting.help and setting.group, setting.name
        if setting.kind in (int, float):
            assert str(setting.limits), setting.name
            for value in setting.default if setting.many else (setting.default,):
                assert value is None or value in setting.limits


@pytest.mark.parametrize(
    ("words", "preset"),
    [
        ("", "response"),
        ("--dist_loss kl --temperature 4", "kl"),
        ("--distill-loss boxes", "boxes"),
        ("--distill-loss boxes --soft-loss", "boxes"),
        ("--soft-loss", "boxes"),
        ("--full-output-loss", "objectness"),
        ("--full-output-loss --distill-loss objectness", "objectness"),
    ],
)
def test_the_seeds_flags_map_onto_the_presets(words: str, preset: str) -> None:
    options = distilled(*words.split())
    assert options.preset() == options.distill_loss == preset and preset in PRESETS
    assert list(options.warnings()) == []


@pytest.mark.parametrize(
    ("options_class", "words", "told"),
    [
        (DistillOptions, "", ["--teacher", "missing"]),
        (DistillOptions, "--teacher t --full-output-loss --dist-loss kl", ["--full-output-loss", "not kl"]),
        (DistillOptions, "--teacher t --soft-loss --dist-loss l2", ["--soft-loss", "boxes", "not l2"]),
        (DistillOptions, "--teacher t --soft-loss --full-output-loss", ["--soft-loss", "not objectness"]),
        (DistillOptions, "--teacher=", ["--teacher", "missing"]),
        (DistillOptions, "--teacher t --distill-ratio auto --no-with-gt-loss", ["auto", "labels' loss"]),
        (DistillOptions, "--teacher t --stop-distill 30 --epochs 30", ["--stop-distill 30", "nothing"]),
        (DistillOptions, "--teacher t --stop-distill 3 --no-with-gt-loss", ["--stop-distill"]),
        (DistillOptions, "--teacher ema --no-with-gt-loss", ["--teacher ema", "labels"]),
        (DistillOptions, "--teacher t --distill-ratio much", ["a number of 0 or more or auto"]),
        (DistillOptions, "--teacher t --no-with-gt-loss --distill-ratio 0", ["--distill-ratio 0", "nothing"]),
        (DistillOptions, "--teacher t --no-with-gt-loss --distill-cls 0", ["--distill-cls 0", "that output"]),
        (DistillOptions, "--no-distill --no-with-gt-loss", ["--no-with-gt-loss", "nothing is left"]),
        (DistillOptions, "--teacher t --unlabeled-share .5 --batch 1", ["--unlabeled-share", "--batch-size"]),
        (DistillOptions, "--teacher t --unlabeled-share 1", ["--unlabeled-share", "0 to 0.95"]),
        (TrainOptions, "--rect --image-weights", ["--image-weights", "--rect"]),
        (TrainOptions, "--noval --image-weights", ["--image-weights", "--noval"]),
        (TrainOptions, "--weights=", ["--weights", "--cfg"]),
        (TrainOptions, "--resume --batch 8 --seed 2", ["--batch-size, --seed: cannot change", "them out"]),
        (declared.TestOptions, "--weights=", ["--weights"]),
        (DetectOptions, "--imgsz 64 64 64", ["--imgsz", "not 3 numbers"]),
        (DetectOptions, "--source= --name ..", ["--source", "--name '..'"]),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(options_class: type, words: str, told: list[str]) -> None:
    message = problem_of(options_class, *words.split())
    for part in told:
        assert part in message


def test_a_weight_is_a_number_or_follows_the_gradients() -> None:
    assert distilled("--distill-ratio", "auto").distill_ratio == "auto"
    assert distilled("--distill-ratio", "1e-3").distill_ratio == 0.001
    assert options_from_dict(DistillOptions, {"teacher": "t", "distill_ratio": "auto"}).teacher == ("t",)


def test_a_run_goes_on_with_what_may_change_and_needs_no_teacher() -> None:
    options = parse(DistillOptions, ["--resume", "runs/train/exp", "--epochs", "9", "--device", "cpu"])
    assert options.resume == "runs/train/exp" and options.given == {"resume", "epochs", "device"}
    assert parse(TrainOptions, ["--resume"]).resume == ""
    assert set(settings_of(DistillOptions)) > CHANGEABLE_ON_RESUME


def test_a_batch_size_that_was_to_be_found_gets_advice() -> None:
    assert "--batch -1: there is no AutoBatch, give a number" in problem_of(TrainOptions, "--batch", "-1")
    assert "must be" in problem_of(TrainOptions, "--batch", "-2")


def test_patience_counts_in_an_evolution_that_scores_each_epoch() -> None:
    words = ["--evolve", "3", "--patience", "5"]
    assert list(parse(TrainOptions, words).warnings()) == ["--patience has no effect with --evolve"]
    assert list(parse(TrainOptions, [*words, "--image-weights"]).warnings()) == []


@pytest.mark.parametrize(("words", "is_said"), [("--epochs 3", True), ("--epochs 12 --stop-distill 4", True),
                                                ("--epochs 9", False)])  # fmt: skip
def test_a_warm_up_that_is_never_over_is_remarked(words: str, is_said: bool) -> None:
    warnings = list(distilled("--distill-warmup", "9", *words.split()).warnings())
    assert ["--distill-warmup 9 is never over" in warning for warning in warnings] == [True] * is_said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--t_conf_thres 0.3", "--t-conf-thres has no effect with --distill-loss response"),
        ("--dist-loss boxes --temperature 3", "--temperature has no effect with --distill-loss boxes"),
        ("--distill-ratio 0", "--distill-ratio 0 leaves the teacher without any effect"),
        (
            "--distill-ratio 0 --feature-loss cwd",
            "--distill-ratio 0 leaves the teacher without any effect; for features alone: --distill-box 0 "
            "--distill-obj 0 --distill-cls 0",
        ),
        ("--feature-loss cwd --feature-ratio 0", "--feature-loss has no effect with --feature-ratio 0"),
        ("--auto-ratio 2", "--auto-ratio has no effect without --distill-ratio auto"),
        ("--no-amp --amp-dtype bf16", "--amp-dtype has no effect with --no-amp"),
        ("--close-mosaic 30 --epochs 20", "--close-mosaic 30 leaves no epoch with mosaics"),
        (
            "--batch 4 --unlabeled-share .1",
            "--unlabeled-share is one image in each batch of 4, not less",
        ),
        ("--nosave --save-period 2", "--save-period has no effect with --nosave"),
        ("--no-distill --unlabelled-share .5", "--unlabeled-share has no effect with --no-distill"),
    ],
)
def test_what_has_no_effect_is_remarked(words: str, told: str) -> None:
    assert list(distilled(*words.split()).warnings()) == [told]


def test_opsets_that_no_network_can_be_converted_to_are_refused_before_the_export() -> None:
    for words, said in (
        ("--opset 17 --nms", "--opset 17: with --nms give 18 or newer"),
        ("--opset 14 --dynamic", "with --dynamic give 15 or newer"),
        ("--opset 14 --no-simplify", "with --no-simplify give 15 or newer"),
    ):
        with pytest.raises(UsageError, match=said):
            parse(ExportOptions, ["--include", "onnx", *words.split()])
        parse(ExportOptions, ["--include", "torchscript", *words.split()])
    parse(ExportOptions, ["--include", "onnx", "--opset", "15", "--dynamic"])


def test_options_of_others_that_would_change_nothing_are_accepted() -> None:
    for options_class, words, name in (
        (DetectOptions, ["--dnn"], "--dnn"),
        (declared.TestOptions, ["--dnn"], "--dnn"),
        (ExportOptions, ["--data", "data/coco128.yaml"], "--data"),
    ):
        [warning] = parse(options_class, words).warnings()
        assert warning.startswith(f"{name} has no effect: ")


def test_unlabelled_pictures_are_for_the_teacher_alone() -> None:
    assert TrainOptions().share_of_unlabelled() == 0
    assert distilled().share_of_unlabelled() is None
    assert distilled("--unlabeled-share", "0.25").share_of_unlabelled() == 0.25
    assert distilled("--unlabelled_share", "0").share_of_unlabelled() == 0
    assert distilled("--unlabeled-share", "0.25", "--no-distill").share_of_unlabelled() == 0


@pytest.mark.parametrize("options_class", CLASSES)
def test_options_survive_the_way_through_opt_yaml(options_class: type, tmp_path: Path) -> None:
    given = {"name": "1e3", "project": tmp_path / "größer", "device": "0"}
    if issubclass(options_class, TrainOptions):
        given |= {"freeze": (0, 3), "cache": "ram", "data_dir": Path("x")}
    if options_class is DistillOptions:
        given |= {"teacher": ("t.pt", "ema"), "distill_ratio": 1e-5, "soft_loss": True}
    options = options_class(**given)
    plain = yaml.safe_load(yaml_text(options_to_dict(options)))
    assert options_from_dict(options_class, plain) == options
    assert "given" not in plain and plain["project"] == str(tmp_path / "größer")
    assert {type(value) for value in plain.values()} <= {str, int, float, bool, list, type(None)}


def test_saved_options_with_unknown_or_wrong_values_are_refused_by_name() -> None:
    with pytest.raises(UsageError) as caught:
        options_from_dict(TrainOptions, {"epoch": 3, "imgsz": "big", "rect": 1, "optimizer": "sgd"})
    for part in (
        "unknown key 'epoch', did you mean 'epochs'?",
        "imgsz: 'big'",
        "rect: 1 must be true",
        "'SGD'?",
    ):
        assert part in str(caught.value)
    with pytest.raises(UsageError, match="--epochs 0: must be a whole number of 1 or more"):
        dataclasses.replace(TrainOptions(), epochs=0)


def test_limits_hold_numbers_and_say_which() -> None:
    assert [str(limits) for limits in (at_least(1), above(0), between(0, 1), Limits(high=3), Limits())] == [
        "1 or more", "above 0", "0 to 1", "up to 3", "",
    ]  # fmt: skip
    assert 0 in between(0, 1) and 1 in between(0, 1) and 0 not in above(0) and 10**400 in at_least(0)
    for number in (float("nan"), float("inf"), float("-inf")):
        assert number not in Limits()


def test_a_class_of_settings_needs_nothing_but_annotations() -> None:
    @dataclasses.dataclass
    class Own:
        ratio: float = option(1.0, "of something", limits=above(0))
        plain: int = 3

    assert list(settings_of(Own)) == ["ratio"] and settings_of(Own)["ratio"].kind is float
    assert to_plain(Own(ratio=0.5)) == {"ratio": 0.5}


def test_help_says_nothing_that_markdown_or_a_terminal_could_not_show() -> None:
    for options_class in CLASSES:
        for setting in settings_of(options_class).values():
            assert re.fullmatch(r"[ -~]+", setting.help) and "|" not in setting.help
