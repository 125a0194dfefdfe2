"""Which runs belong together, what they are called, and what is said of them."""

import pytest

from utils.comparison.groups import different_data, group_runs
from utils.comparison.runs import read_run
from utils.comparison.tables import duration, group_table, run_table, teacher_score, verdict_on
from utils.errors import UsageError


@pytest.fixture
def groups_of():
    def groups(*folders, **options):
        return group_runs([read_run(folder, pytest.fail) for folder in folders], **options)

    return groups


def labels(groups):
    return [group.label for group in groups]


def test_seed_name_and_places_part_no_group_and_a_teacher_does(make_run, groups_of):
    runs = [
        make_run("a", [0.5], seed=1, teacher="runs/train/exp7/weights/best.pt", project="x"),
        make_run("b", [0.1], weights="yolov5s.pt"),
        make_run(
            "c",
            [0.2],
            seed=1,
            weights="/far/yolov5s.pt",
            device="cpu",
            data="../coco128.yaml",
            download=False,
        ),
        make_run("d", [0.3], seed=2, teacher="../exp7/weights/best.pt", workers=0),
    ]
    groups = groups_of(*runs)
    assert labels(groups) == ["plain (2 seeds)", "distilled: response, teacher exp7 (2 seeds)"]
    assert [[run.folder for run in group.runs] for group in groups] == [runs[1:3], [runs[0], runs[3]]]


@pytest.mark.parametrize("option", ["compile", "cuda_graphs"])
def test_how_a_run_computes_parts_no_group(option, make_run, groups_of):
    runs = [make_run(name, [0.5], seed=seed, **{option: seed == 1}) for name, seed in (("a", 0), ("b", 1))]
    assert labels(groups_of(*runs)) == ["plain (2 seeds)"]


def test_labels_say_in_words_what_differs_and_only_that(make_run, groups_of):
    groups = groups_of(
        make_run("a", [0.1] * 3, cos_lr=True, hyp={"lr0": 0.02}),
        make_run("b", [0.1] * 3, weights="", cfg="models/yolov5n.yaml"),
        make_run("c", [0.1] * 3, teacher="t.pt", distill_loss="kl", distill_ratio="auto"),
        make_run("d", [0.1] * 3, teacher="ema", with_gt_loss=True, amp=False),
    )
    assert labels(groups) == [
        "plain, from yolov5s, cos lr, lr0 0.02",
        "plain, from scratch, cfg yolov5n.yaml, lr0 0.01",
        "distilled: kl, teacher t, from yolov5s, lr0 0.01, distill ratio auto",
        "distilled: response, its own average, from yolov5s, no amp, lr0 0.01, distill ratio 1",
    ]


def test_a_run_of_train_distill_without_distillation_is_a_plain_one(make_run, groups_of):
    plain = make_run("a", [0.1])
    off = make_run("b", [0.1], seed=3, teacher="t.pt", distill=False)
    assert labels(groups_of(plain, off)) == ["plain (2 seeds)"]


def test_settings_of_distillation_without_effect_separate_no_runs(make_run, groups_of):
    gated = {"teacher": "t.pt", "distill_loss": "objectness"}
    groups = groups_of(
        make_run("a", [0.1], **gated),
        make_run("b", [0.1], seed=1, **gated, full_output_loss=True, t_conf_thres=0.5, distill_box=2.0),
        make_run("c", [0.1], teacher="t.pt", distill_loss="boxes", t_conf_thres=0.5),
        make_run("d", [0.1], teacher="t.pt", distill_loss="boxes"),
    )
    assert labels(groups) == [
        "distilled: objectness, teacher t (2 seeds)",
        "distilled: boxes, teacher t, t conf thres 0.5",
        "distilled: boxes, teacher t, t conf thres 0.25",
    ]


def test_settings_can_be_ignored_and_groups_left_alone(make_run, groups_of):
    runs = [make_run("a", [0.1], batch_size=4), make_run("b", [0.2], seed=1, batch_size=8)]
    assert labels(groups_of(*runs)) == ["plain, batch size 4", "plain, batch size 8"]
    assert labels(groups_of(*runs, ignored=["batch-size"])) == ["plain (2 seeds)"]
    same = [make_run("c", [0.1]), make_run("d", [0.2])]
    assert labels(groups_of(*same)) == ["plain (2 runs)"]
    assert labels(groups_of(*same, together=False)) == ["plain, c", "plain, d"]
    with pytest.raises(UsageError, match="did you mean batch_size"):
        groups_of(*runs, ignored=["batchsize"])


def test_a_run_whose_settings_are_gone_stands_alone_under_its_name(make_run):
    folder = make_run("lost", [0.1])
    (folder / "opt.yaml").unlink()
    runs = [read_run(path, lambda _: None) for path in (folder, make_run("a", [0.2]))]
    assert labels(group_runs(runs)) == ["lost", "plain"]


def test_a_distilled_group_is_judged_by_its_plain_twins_of_the_same_seeds(make_run, groups_of):
    groups = groups_of(
        make_run("p0", [0.1, 0.20]),
        make_run("p1", [0.1, 0.30], seed=1),
        make_run("other", [0.1, 0.5], batch_size=4),
        make_run("d0", [0.24, 0.1], teacher="t.pt"),
        make_run("d1", [0.36, 0.1], seed=1, teacher="t.pt"),
        make_run("d2", [0.9, 0.1], seed=2, teacher="t.pt"),
    )
    verdicts = [verdict_on(group, groups, "mAP50-95") for group in groups]
    assert verdicts[:2] == [None, None]
    # Best scores: .24 and .36 against .20 and .30; the teacher is at .6, .35 above the plain runs' mean.
    verdict = verdicts[2]
    assert (round(verdict.gain.points, 6), round(verdict.gain.error, 6)) == (5.0, 1.0)
    assert verdict.closed == pytest.approx(0.05 / 0.35)
    assert "+5.0 ± 1.0 points over plain training (2 seeds), 14% of the gap" in str(verdict)
    rows, header = group_table(groups, "mAP50-95", [verdict])
    assert dict(zip(header, rows[2], strict=True))["over plain"] == "+5.0 ± 1.0"
    assert dict(zip(header, rows[0], strict=True))["best mAP50-95"] == "25.0 ± 7.1"


def test_a_run_that_is_not_done_makes_a_verdict_a_preliminary_one(make_run, groups_of):
    groups = groups_of(make_run("p", [0.1, 0.2], epochs=9), make_run("d", [0.2], epochs=9, teacher="t.pt"))
    verdict = verdict_on(groups[1], groups, "mAP50-95")
    assert "+0.0 points" in str(verdict) and "so far" in str(verdict)
    assert teacher_score(groups[1], "mAP50") == 0.9 and teacher_score(groups[1], "precision") is None


def test_the_table_of_runs_has_a_column_for_each_setting_that_differs(make_run, groups_of):
    groups = groups_of(
        make_run("a", [0.1, 0.3, 0.2], seconds=2.0, epochs=7, optimizer="Adam"),
        make_run("b", [0.4], seed=5, teacher="t.pt"),
    )
    rows, header = run_table(groups, "mAP50-95")
    first, second = (dict(zip(header, row, strict=True)) for row in rows)
    assert (first["done"], first["best mAP50-95"], first["at epoch"], first["last"]) == (
        "3/7",
        "30",
        "2",
        "20",
    )
    assert (first["s/epoch"], first["time"], first["parameters"]) == ("3.0", "0:00:09", "-")
    assert (first["optimizer"], second["optimizer"], second["teacher"], first["teacher"]) == (
        "Adam",
        "SGD",
        "t",
        "-",
    )
    assert (first["seed"], second["seed"], second["time"]) == ("0", "5", "-")
    assert "batch size" not in header


def test_scores_on_different_data_are_told_apart(make_run, groups_of):
    same = groups_of(
        make_run("a", [0.1]), make_run("b", [0.2], epochs=7), make_run("c", [0.2], data="x/coco.yaml")
    )
    assert different_data(same[:2]) == [] and different_data(same)[0].startswith("data (")


def test_runs_of_one_name_are_told_apart_by_as_much_of_their_paths_as_it_takes(make_run, groups_of):
    runs = [make_run(name, [0.1], teacher="t.pt") for name in ("c1/exp", "c2/exp", "c2/exp2")]
    found = labels(groups_of(*runs, together=False))
    assert [label.rpartition(", ")[2] for label in found] == ["c1/exp", "c2/exp", "exp2"]


def test_of_several_plain_runs_the_one_of_the_same_seed_is_the_twin(make_run, groups_of):
    groups = groups_of(
        make_run("p0", [0.1]),
        make_run("p1", [0.2], seed=1),
        make_run("d1", [0.5], seed=1, teacher="t.pt"),
        together=False,
    )
    assert str(verdict_on(groups[2], groups, "mAP50-95").gain) == "+30.0"


def test_a_run_that_stopped_early_is_done(make_run, groups_of):
    settings = {"epochs": 9, "patience": 2}
    plain = make_run("p", [0.2, 0.1, 0.1], **settings)
    for name, scores, is_over in (("d0", [0.1, 0.3, 0.2, 0.1], True), ("d1", [0.1, 0.3, 0.2], False)):
        groups = groups_of(plain, make_run(name, scores, teacher="t.pt", **settings))
        assert [run.is_over for group in groups for run in group.runs] == [True, is_over]
        assert ("so far" in str(verdict_on(groups[1], groups, "mAP50-95"))) is not is_over
    rows, header = run_table(groups_of(plain), "mAP50-95")
    assert dict(zip(header, rows[0], strict=True))["done"] == "3/9 stopped early"
    without = make_run("n", [0.2, 0.1, 0.1], **{**settings, "patience": 0})
    assert not groups_of(without)[0].runs[0].is_over


def test_times_whose_sum_is_no_number_are_a_dash(make_run):
    run = read_run(make_run("a", [0.5, 0.6], seconds=1e308), pytest.fail)
    assert duration(run) == "-"


def test_runs_that_differ_in_many_ways_are_named_and_their_settings_cut(make_run, groups_of):
    many = {"warmup_epochs": 1.0, "lr0": 0.02, "lrf": 0.2, "box": 0.1, "cls": 0.1, "obj": 0.1, "scale": 0.1}
    first, second = make_run("a", [0.1], hyp={**many, "mosaic": 0.5}), make_run("b", [0.2])
    label, _ = labels(groups_of(first, second))
    assert label.startswith("a: plain, ") and label.endswith(", 2 more differences")
    assert label.count(",") == 7
    together = groups_of(first, second, ignored=("hyp",))
    assert labels(together) == ["plain (2 runs)"]
