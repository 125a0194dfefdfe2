"""Hyperparameter files: the public names and values, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from utils.config.hyperparameters import Hyperparameters, hyperparameter_warnings, load_hyperparameters
from utils.config.options import TrainOptions
from utils.config.schema import yaml_text
from utils.errors import UsageError, UserError

DATA = Path(__file__).resolve().parents[2] / "data"


def load(folder: Path, text: str) -> Hyperparameters:
    path = folder / "hyp.yaml"
    path.write_text(text)
    return load_hyperparameters(path)


def problem_of(folder: Path, text: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(folder, text)
    return str(caught.value)


def test_the_defaults_are_those_of_training_from_scratch() -> None:
    assert load_hyperparameters(DATA / "hyp.scratch.yaml") == Hyperparameters()


def test_the_shipped_files_have_the_published_values() -> None:
    values = load_hyperparameters(DATA / "hyp.finetune.yaml")
    assert (values.lr0, values.lrf, values.momentum, values.weight_decay) == (0.0032, 0.12, 0.843, 0.00036)
    assert (values.box, values.cls, values.obj, values.anchor_t) == (0.0296, 0.243, 0.301, 2.91)
    assert (values.scale, values.mixup, values.degrees) == (0.898, 0.243, 0.373)
    scratch = Hyperparameters()
    assert (scratch.lr0, scratch.lrf, scratch.momentum, scratch.warmup_epochs) == (0.01, 0.01, 0.937, 3.0)
    assert (scratch.hsv_h, scratch.hsv_s, scratch.hsv_v, scratch.mosaic) == (0.015, 0.7, 0.4, 1.0)


@pytest.mark.parametrize("name", ["hyp.scratch.yaml", "hyp.scratch-high.yaml", "hyp.finetune.yaml"])
def test_a_shipped_file_names_every_hyperparameter(name: str) -> None:
    keys = yaml.safe_load((DATA / name).read_text())
    assert set(keys) == set(Hyperparameters().to_dict())


def test_files_are_found_from_any_folder_by_path_or_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/hyp.finetune.yaml", "hyp.finetune.yaml"):
        assert load_hyperparameters(name).lr0 == 0.0032
    (tmp_path / "hyp.finetune.yaml").write_text("lr0: 0.5\n")
    assert load_hyperparameters("hyp.finetune.yaml").lr0 == 0.5
    with pytest.raises(
        UserError, match=r"hyp\.fintune\.yaml: is not there; did you mean hyp\.finetune\.yaml"
    ):
        load_hyperparameters("hyp.fintune.yaml")


def test_public_names_stand_for_what_ships_and_a_remark_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("hyp.scratch-low.yaml", "data/hyps/hyp.scratch-low", "hyp.scratch"):
        assert load_hyperparameters(name) == Hyperparameters()
    assert load_hyperparameters("hyp.VOC").lr0 == 0.0032
    (warning,) = hyperparameter_warnings("hyp.VOC")
    assert "taking data/hyp.finetune.yaml" in warning
    assert (
        list(hyperparameter_warnings("data/hyp.finetune.yaml"))
        == list(hyperparameter_warnings("hyp.scratch"))
        == []
    )
    strong = load_hyperparameters("hyp.scratch-high")
    assert (strong.lrf, strong.cls, strong.obj, strong.scale, strong.mixup) == (0.1, 0.3, 0.7, 0.9, 0.1)
    assert strong == load_hyperparameters("data/hyps/hyp.scratch-med.yaml")
    with pytest.raises(UserError, match="is not there"):
        load_hyperparameters("hyp.no-augmentation")
    assert list(hyperparameter_warnings("hyp.no-augmentation")) == []
    (tmp_path / "hyp.VOC.yaml").write_text("lr0: 0.5\n")
    assert load_hyperparameters("hyp.VOC").lr0 == 0.5 and list(hyperparameter_warnings("hyp.VOC")) == []


@pytest.mark.parametrize(
    "name", ["mine/experiment7/hyp.finetune.yaml", "/nowhere/hyp.scratch-low.yaml", "mine/hyp.VOC"]
)
def test_a_file_missing_from_another_folder_is_no_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^{name}: is not there; did you mean data/hyp\."):
        load_hyperparameters(name)
    assert list(hyperparameter_warnings(name)) == []


def test_copying_of_objects_is_taken_with_a_remark_that_it_has_no_effect(tmp_path: Path) -> None:
    assert load(tmp_path, "copy_paste: 0.1\n").copy_paste == 0.1
    path = tmp_path / "hyp.yaml"
    (warning,) = TrainOptions(hyp=path).warnings()
    assert warning.startswith(f"{path}: copy_paste has no effect")
    assert list(TrainOptions(hyp=path, resume="").warnings()) == []


def test_all_that_is_wrong_with_a_file_is_told_with_lines(tmp_path: Path) -> None:
    message = problem_of(
        tmp_path, "lr0: 0\nmossaic: 1\nbox: high\nmixup: 2\ncopy_paste: 1.1\nfliplr: .nan\ncls: true\n"
    )
    for part in (
        "hyp.yaml: line 1: lr0: 0 must be a number above 0",
        "line 2: unknown key 'mossaic', did you mean 'mosaic'?",
        "line 3: box: 'high' must be a number of 0 or more",
        "line 4: mixup: 2 must be a number from 0 to 1",
        "line 5: copy_paste: 1.1 must be a number from 0 to 1",
        "line 6: fliplr: nan must be",
        "line 7: cls: True must be",
    ):
        assert part in message
    assert "\n" not in message


def test_numbers_that_yaml_takes_for_text_are_understood(tmp_path: Path) -> None:
    assert load(tmp_path, "lr0: 1e-3\n").lr0 == 0.001  # YAML wants 1.0e-3


@pytest.mark.parametrize(
    ("text", "anchors"), [("anchors: 3", 3), ("anchors: 3.37", 3), ("anchors: 0", None), ("lr0: 0.1", None)]
)
def test_the_number_of_anchors_is_read_as_public_files_write_it(
    tmp_path: Path, text: str, anchors: int | None
) -> None:
    assert load(tmp_path, text).anchors == anchors


@pytest.mark.parametrize("text", ["anchors: .nan", "anchors: .inf", "anchors: many", "lr0: " + "9" * 400])
def test_odd_numbers_are_refused(tmp_path: Path, text: str) -> None:
    assert "line 1" in problem_of(tmp_path, text)


def test_values_survive_the_way_through_hyp_yaml(tmp_path: Path) -> None:
    values = Hyperparameters(lr0=0.002, anchors=4, fl_gamma=1.5)
    assert load(tmp_path, yaml_text(values.to_dict())) == values
    assert "anchors" not in Hyperparameters().to_dict()


def test_values_given_in_code_are_checked_too() -> None:
    with pytest.raises(UsageError, match="anchor_t: 1.0 must be a number above 1"):
        Hyperparameters(anchor_t=1.0)
