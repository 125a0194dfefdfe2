"""The training scripts as a person runs them: subprocesses on a small image set."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from models.checkpoint import save_checkpoint
from models.yolo import Model
from utils.config.cli import parse
from utils.config.options import DistillOptions
from utils.distillation.recipe import distillation_recipe
from utils.distillation.teacher import checksum
from utils.training.run import TrainingRun
from utils.training.state import set_weights_aside
from utils.training.stop import StopSignals

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--img", "64", "--batch", "4", "--workers", "0", "--device", "cpu", "--noautoanchor"]
PRESETS = {
    "response": ["--distill-loss", "response"],
    "boxes": ["--distill-loss", "boxes", "--t_conf_thres", "0.05"],
    "boxes soft": ["--distill_loss", "boxes", "--soft-loss", "--t-conf-thres", "0.05"],
    "objectness": ["--full-output-loss"],
    "l2": ["--dist_loss", "l2"],
    "kl": ["--dist-loss", "kl", "--temperature", "5"],
}


@pytest.fixture(scope="module")
def teacher(small_set, run_script_session, tmp_path_factory):
    """A network of another size, trained for a moment by train.py."""
    project = tmp_path_factory.mktemp("teacher")
    cfg = yaml.safe_load(open(ROOT / "models/yolov5n.yaml", encoding="utf-8"))
    cfg["width_multiple"] = 0.375
    (project / "wide.yaml").write_text(yaml.safe_dump(cfg))
    done = run_script_session(
        "train.py", "--data", small_set, "--cfg", project / "wide.yaml", "--weights", "", "--epochs", 2,
        "--project", project, *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return project / "exp" / "weights" / "best.pt"


def test_a_run_leaves_weights_scores_settings_and_pictures(teacher, rows_of):
    folder = teacher.parent.parent
    for name in (
        "weights/best.pt", "weights/last.pt", "weights/state.pt", "results.csv", "opt.yaml", "hyp.yaml",
        "train_batch0.jpg", "labels.jpg", "results.png", "confusion_matrix.png", "PR_curve.png",
        "val_batch0_pred.jpg", "val_batch0_labels.jpg",
    ):  # fmt: skip
        assert (folder / name).is_file(), name
    rows = rows_of(folder)
    assert len(rows) == 2
    for column in ("train/box_loss", "val/obj_loss", "metrics/mAP_0.5:0.95", "x/lr0"):
        assert np.isfinite(float(rows[-1][column]))


def test_checkpoints_hold_nothing_but_tensors_and_plain_values(teacher):
    for name in ("best.pt", "last.pt", "state.pt"):
        assert isinstance(torch.load(teacher.parent / name, weights_only=True), dict)


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_trains_with_falling_losses_and_leaves_the_teacher_as_it_was(
    preset, teacher, small_set, run_script, tmp_path, rows_of
):
    as_it_was = teacher.read_bytes()
    done = run_script(
        "train_distill.py", "--weights", "", "--cfg", "models/yolov5n.yaml", "--teacher", teacher,
        "--distill_ratio", "1", "--data", small_set, "--epochs", "2", "--project", tmp_path, *SMALL,
        "--noplots", *PRESETS[preset],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # it would not be had a weight of the teacher changed; see below
    assert teacher.read_bytes() == as_it_was
    assert re.search(r"teacher .*mAP50 \d\.\d+", done.stdout + done.stderr)
    rows = rows_of(tmp_path / "exp")
    names = [name for name in rows[0] if name.startswith("train/")]
    assert {"train/distill_box_loss", "train/distill_obj_loss", "train/distill_cls_loss"} <= set(names)
    assert all(np.isfinite(float(row[name])) for row in rows for name in names)
    assert float(rows[0]["train/distill_grad_ratio"]) > 0
    total = [sum(float(row[name]) for name in names if name.endswith("_loss")) for row in rows]
    assert total[1] < total[0]
    student = torch.load(tmp_path / "exp/weights/last.pt", weights_only=True)
    plain = Model(ROOT / "models/yolov5n.yaml", nc=2).half()
    plain.head.float()  # its anchors are exact; the convolutions are half as large all the same
    plain.head.m.half()
    plain = plain.state_dict()
    kinds = [{k: (v.shape, v.dtype) for k, v in found.items()} for found in (student["model"], plain)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("changes", [False, True])
def test_a_run_does_not_change_its_teacher_and_fails_where_something_else_does(
    changes, small_set, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    network = Model("models/demo-student.yaml", nc=2)
    network.names = ["square", "disc"]
    save_checkpoint(tmp_path / "t.pt", model=network, epoch=0, best_fitness=None, meta={})
    words = [
        "--cfg",
        "models/demo-student.yaml",
        "--weights",
        "",
        "--teacher",
        tmp_path / "t.pt",
        "--epochs",
        1,
    ]
    words += ["--data", small_set, "--project", tmp_path, "--noplots", *SMALL]
    with StopSignals() as stop:
        run = TrainingRun(parse(DistillOptions, [*map(str, words)]), distillation_recipe, stop)
        (asked,) = run.losses[1].teachers.members
        before = checksum(asked.model), checksum(run.model)
        if not changes:
            assert run.train() == 1
            assert checksum(asked.model) == before[0] and checksum(run.model) != before[1]
            return

        def spoil(*_):
            with torch.no_grad():
                next(asked.model.parameters()).add_(1)

        monkeypatch.setattr(run, "_after_step", spoil)
        with pytest.raises(AssertionError, match="changed during training"):
            run.train()


def test_the_teacher_alone_can_teach(teacher, small_set, run_script, tmp_path, rows_of):
    done = run_script(
        "train_distill.py", "--weights", "", "--cfg", "models/yolov5n.yaml", "--t_weights", teacher,
        "--no-with-gt-loss", "--data", small_set, "--epochs", "1", "--project", tmp_path, *SMALL, "--noplots",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = [name for name in rows_of(tmp_path / "exp")[0] if name.startswith("train/")]
    assert names and all(name.startswith("train/distill_") for name in names)


def test_a_public_file_is_a_start_and_a_teacher(public_yolov5n, make_shapes, run_script, tmp_path, rows_of):
    names = yaml.safe_load((ROOT / "data/coco.yaml").read_text(encoding="utf-8"))["names"]
    data = make_shapes(tmp_path / "set", images=4, names=names)
    done = run_script(
        "train_distill.py", "--weights", public_yolov5n, "--teacher", public_yolov5n, "--data", data,
        "--epochs", "1", "--project", tmp_path / "runs", *SMALL, "--noplots",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    matched, total = re.search(r"(\d+) of (\d+) weights fit", done.stdout).groups()
    assert matched == total
    (row,) = rows_of(tmp_path / "runs/exp")
    assert float(row["train/distill_grad_ratio"]) > 0


def test_a_teacher_of_other_classes_teaches_those_it_shares(
    teacher, make_shapes, run_script, tmp_path, tmp_path_factory
):
    other = make_shapes(tmp_path_factory.mktemp("other"), images=4, names=("square", "triangle"))
    done = run_script(
        "train_distill.py", "--weights", "", "--cfg", "models/yolov5n.yaml", "--teacher", teacher,
        "--data", other, "--epochs", "1", "--project", tmp_path, "--noplots", *SMALL,
        "--distill-loss", "response",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 2 classes known" in done.stdout and "disc" in done.stdout and "triangle" in done.stdout


def test_a_teacher_with_nothing_in_common_teaches_features_or_is_refused(
    teacher, make_shapes, run_script, tmp_path, tmp_path_factory, rows_of
):
    other = make_shapes(tmp_path_factory.mktemp("alien"), images=4, names=("cat", "dog"))
    common = [
        "train_distill.py", "--weights", "", "--cfg", "models/yolov5n.yaml", "--teacher", teacher,
        "--data", other, "--epochs", "1", "--project", tmp_path / "runs", "--noplots", *SMALL,
    ]  # fmt: skip
    refused = run_script(*common, "--no-with-gt-loss")
    assert refused.returncode == 1 and "none of the data's classes" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "runs").exists()
    done = run_script(*common)
    assert done.returncode == 0, done.stderr
    assert "only features" in done.stdout
    (row,) = rows_of(tmp_path / "runs/exp")
    assert [name for name in row if name.startswith("train/distill")] == [
        "train/distill_feature_loss", "train/distill_grad_ratio",
    ]  # fmt: skip


def test_several_teachers_and_the_own_average_teach_together_at_a_held_gradient_ratio(
    teacher, small_set, run_script, tmp_path, rows_of
):
    done = run_script(
        "train_distill.py", "--weights", "", "--cfg", "models/yolov5n.yaml", "--teacher", teacher, "ema",
        "--data", small_set, "--epochs", "3", "--project", tmp_path, "--noplots", *SMALL,
        "--distill-loss", "response", "--distill-ratio", "auto", "--auto-ratio", "0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"student at the start: mAP50 \d\.\d+", done.stdout)
    assert 0.1 < float(rows_of(tmp_path / "exp")[-1]["train/distill_grad_ratio"]) < 3
    weight = torch.load(tmp_path / "exp/weights/state.pt", weights_only=True)["losses"]["1.balance.weight"]
    assert weight > 0 and weight != 1
    assert float(rows_of(tmp_path / "exp")[-1]["train/distill_ratio"]) != 1
    resumed = run_script("train_distill.py", "--resume", tmp_path / "exp", "--epochs", "4")
    assert resumed.returncode == 0 and "student at the start" not in resumed.stdout, resumed.stderr
    assert 0.1 < float(rows_of(tmp_path / "exp")[-1]["train/distill_grad_ratio"]) < 3


def test_a_teacher_with_nothing_to_say_is_warned_of(teacher, small_set, run_script, tmp_path):
    done = run_script(
        "train_distill.py", "--weights", teacher, "--teacher", teacher, "--data", small_set, "--epochs", "1",
        "--project", tmp_path, "--noplots", *SMALL, "--distill-loss", "boxes", "--t-conf-thres", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "is not better than the student" in done.stderr
    assert "no box of the teacher reaches --t-conf-thres" in done.stderr
    assert "hardly counts" not in done.stderr  # no weight would help


def test_projections_of_features_resume_and_stay_out_of_the_weights(teacher, small_set, run_script, tmp_path):
    done = run_script(
        "train_distill.py", "--weights", "", "--cfg", "models/yolov5n.yaml", "--teacher", teacher,
        "--data", small_set, "--epochs", "1", "--project", tmp_path, "--noplots", *SMALL,
        "--distill-loss", "response", "--feature-loss", "pkd", "--feature-ratio", "0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "exp/weights/state.pt", weights_only=True)
    projections = {name for name in state["losses"] if "projections" in name}
    assert len(projections) == 6
    student = torch.load(tmp_path / "exp/weights/last.pt", weights_only=True)
    assert set(student["model"]) == set(torch.load(teacher, weights_only=True)["model"])
    resumed = run_script("train_distill.py", "--resume", tmp_path / "exp", "--epochs", "2")
    assert resumed.returncode == 0, resumed.stderr
    after = torch.load(tmp_path / "exp/weights/state.pt", weights_only=True)
    assert any(not torch.equal(state["losses"][name], after["losses"][name]) for name in projections)


def test_a_run_goes_on_without_the_files_it_started_from(small_set, run_script, tmp_path, rows_of):
    start, cfg = tmp_path / "start.pt", tmp_path / "net.yaml"
    shutil.copy(ROOT / "models/yolov5n.yaml", cfg)
    common = ["--data", small_set, "--noplots", *SMALL, "--project", tmp_path, "--image-weights"]
    first = run_script("train.py", *common, "--cfg", cfg, "--weights", "", "--epochs", "1", "--name", "first")
    assert first.returncode == 0, first.stderr
    assert re.search(r"the run ends at \d% of the learning rate's warm-up: take more --epochs", first.stdout)
    shutil.copy(tmp_path / "first/weights/last.pt", start)
    second = run_script("train.py", *common, "--weights", start, "--epochs", "1", "--name", "second")
    assert second.returncode == 0, second.stderr
    start.unlink()
    cfg.unlink()
    done = run_script("train.py", "--resume", tmp_path / "second", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "second")) == 2
    again = run_script("train.py", "--resume", tmp_path / "second")
    assert again.returncode == 0 and "all 2 epochs are done; --epochs 4 adds as many" in again.stdout
    before = (tmp_path / "second/opt.yaml").read_bytes()
    fewer = run_script("train.py", "--resume", tmp_path / "second", "--epochs", "1")
    assert fewer.returncode == 2 and (tmp_path / "second/opt.yaml").read_bytes() == before
    assert fewer.stderr == "error: --epochs 1: 2 epochs are done already; --epochs 4 adds as many\n"
    changed = yaml.safe_load(small_set.read_text())
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**changed, "names": ["disc", "square"]}))
    state = torch.load(tmp_path / "second/weights/state.pt", weights_only=True)
    state["run"]["options"]["data"] = str(tmp_path / "other.yaml")
    torch.save(state, tmp_path / "second/weights/state.pt")
    refused = run_script("train.py", "--resume", tmp_path / "second", "--epochs", "3")
    assert refused.returncode == 1 and "classes" in refused.stderr and "Traceback" not in refused.stderr


def test_a_folder_that_is_used_again_sets_the_weights_of_the_run_before_aside(
    teacher, small_set, run_script, tmp_path
):
    folder = tmp_path / "exp" / "weights"
    folder.mkdir(parents=True)
    for name in ("best.pt", "last.pt", "state.pt", "epoch3.pt"):
        shutil.copy(teacher, folder / name)
    (folder.parent / "references.json").write_text('{"teacher": {"map50": 0.9, "map50_95": 0.8}}')
    done = run_script(
        "train.py", "--data", small_set, "--cfg", "models/yolov5n.yaml", "--weights", "", "--epochs", "1",
        "--project", tmp_path, "--exist-ok", "--noplots", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (folder / "epoch3.pt").exists() and not (folder.parent / "references.json").exists()
    assert (folder / "best.pt").read_bytes() != teacher.read_bytes()
    kept = sorted((folder / "earlier").iterdir())
    assert [path.name for path in kept] == ["best.pt", "epoch3.pt", "last.pt", "state.pt"]
    assert all(path.read_bytes() == teacher.read_bytes() for path in kept)
    assert f"the weights of an earlier run are now in {folder / 'earlier'}" in done.stdout
    assert set_weights_aside(folder) == folder / "earlier2" and len(list((folder / "earlier").iterdir())) == 4


def test_a_run_without_a_score_yet_has_patience(small_set, run_script, tmp_path, rows_of):
    """A network that finds nothing scores 0 in every epoch."""
    done = run_script(
        "train.py", "--data", small_set, "--cfg", "models/yolov5n.yaml", "--weights", "", "--epochs", "3",
        "--patience", "1", "--project", tmp_path, "--noplots", *SMALL, "--hyp", _still(tmp_path),
        "--save-period", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "exp")
    scores = [float(row["metrics/mAP_0.5"]) for row in rows]
    assert len(rows) == 3 or scores != [0.0] * len(scores)
    kept = sorted(path.name for path in (tmp_path / "exp/weights").glob("epoch*.pt"))
    assert kept == ["epoch0.pt", "epoch2.pt"][: len(rows)]


def _still(folder):
    """Hyperparameters with which nothing is learnt."""
    settings = yaml.safe_load((ROOT / "data/hyp.scratch.yaml").read_text(encoding="utf-8"))
    path = folder / "still.yaml"
    path.write_text(yaml.safe_dump({**settings, "lr0": 1e-9, "warmup_bias_lr": 0.0}))
    return path


def test_what_a_run_was_started_with_cannot_change_when_it_goes_on(teacher, run_script):
    done = run_script("train.py", "--resume", teacher.parent.parent, "--batch-size", "2")
    assert done.returncode == 2 and "--batch-size" in done.stderr and "Traceback" not in done.stderr


def test_a_distilled_run_is_not_resumed_by_the_plain_script(
    teacher, small_set, run_script, tmp_path, rows_of
):
    done = run_script(
        "train_distill.py", "--weights", "", "--cfg", "models/yolov5n.yaml", "--teacher", teacher,
        "--data", small_set, "--epochs", "1", "--project", tmp_path, *SMALL, "--noplots",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused = run_script("train.py", "--resume", tmp_path / "exp")
    assert refused.returncode != 0 and "train_distill.py --resume" in refused.stderr
    refused = run_script("train.py", "--resume", "--project", tmp_path)  # there is no other
    assert refused.returncode != 0 and "train_distill.py --resume" in refused.stderr
    extended = run_script("train_distill.py", "--resume", tmp_path / "exp", "--epochs", "2")
    assert extended.returncode == 0, extended.stderr
    assert len(rows_of(tmp_path / "exp")) == 2


def test_training_works_without_distillation(small_set, run_script, tmp_path):
    """The two know each other in train_distill.py alone."""
    for folder in ("models", "utils", "data"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path / "train.py")
    shutil.rmtree(tmp_path / "utils/distillation")
    done = run_script(
        tmp_path / "train.py", "--data", small_set, "--cfg", "models/yolov5n.yaml", "--weights", "",
        "--epochs", "1", *SMALL, "--noplots", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/train/exp/weights/best.pt").is_file()


@pytest.mark.slow
def test_a_run_with_compile_and_no_compiler_says_so_and_ends_as_without(small_set, run_script, tmp_path):
    losses, net = [], tmp_path / "tiny.yaml"  # few layers: torch looks at them before it asks for a compiler
    net.write_text(
        "nc: 2\ndepth_multiple: 1.0\nwidth_multiple: 1.0\nanchors: [[8,8, 16,16]]\n"
        "backbone: [[-1, 1, Conv, [8, 3, 2]], [-1, 1, Conv, [8, 3, 2]]]\n"
        "head: [[[1], 1, Detect, [nc, anchors]]]\n",
        encoding="utf-8",
    )
    for name, extra, env in (
        ("plain", [], {}),
        ("compiled", ["--compile"], {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}),
    ):
        done = run_script(
            "train.py", "--data", small_set, "--cfg", net, "--weights", "",
            "--epochs", 1, "--project", tmp_path, "--name", name, "--noplots", *SMALL, *extra, env=env,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("--compile has failed") == len(extra), done.stderr
        losses.append((tmp_path / name / "results.csv").read_text().splitlines()[1])
    assert losses[0] == losses[1]
