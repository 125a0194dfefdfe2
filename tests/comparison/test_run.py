"""compare.py's own work, on folders made up."""

import csv

import pytest

from utils.comparison.run import readable_runs, run_compare
from utils.config.options import CompareOptions
from utils.errors import UsageError, UserError
from utils.reporting.console import Console


def test_seeds_share_a_line_and_files_lie_in_a_folder_of_their_own(make_run, tmp_path, capsys):
    folders = [
        make_run("p0", [0.1, 0.2], seconds=3.0),
        make_run("p1", [0.1, 0.2, 0.3], seed=1, epochs=2),
        make_run("d0", [0.2, 0.4], teacher="t.pt"),
    ]
    options = {"runs": tuple(folders), "project": tmp_path / "out"}
    folder = run_compare(CompareOptions(**options))
    assert {path.name for path in folder.iterdir()} == {"runs.csv", "groups.csv", "comparison.png"}
    with open(folder / "groups.csv", encoding="utf-8") as stream:
        groups = list(csv.DictReader(stream))
    assert [row["group"] for row in groups] == ["plain (2 seeds)", "distilled: response, teacher t"]
    assert (groups[1]["over plain"], groups[1]["gap closed"]) == ("+20.0", "50%")
    assert [float(groups[0][name]) for name in ("best mAP50-95", "best mAP50-95 ±")] == [25.0, 7.1]
    assert groups[1]["best mAP50-95 ±"] == "" and "over plain ±" not in groups[0]
    assert "+20.0 points over plain training" in capsys.readouterr().out
    apart = run_compare(CompareOptions(**options, group=False, metric="val/box_loss"))
    assert apart.name == "exp2" and not (apart / "groups.csv").exists()


def test_what_cannot_be_compared_is_left_out_with_one_line_each(make_run, capsys):
    good, bad, empty = (make_run(name, [0.1]) for name in ("good", "bad", "empty"))
    (bad / "results.csv").write_text("epoch,a\n0,1\n")
    (empty / "results.csv").write_text("")
    (empty / "opt.yaml").unlink()
    assert [run.folder for run in readable_runs([good, bad, empty], "mAP50-95", Console())] == [good]
    lines = capsys.readouterr().err.splitlines()
    assert ["no epoch is done" in lines[0], "bad" in lines[1], len(lines)] == [True, True, 2]
    with pytest.raises(UserError, match="no run to compare"):
        run_compare(CompareOptions(runs=(bad, empty), project=good / "out"))
    assert not (good / "out").exists()


def test_a_mistyped_metric_is_told_once_whatever_the_number_of_runs(make_run, capsys):
    folders = [make_run("a", [0.1]), make_run("b", [0.1])]
    for metric, meant in (("precison", "precision"), ("mAP", "mAP50"), ("val/box_los", "val/box_loss")):
        with pytest.raises(UsageError, match=rf"^--metric {metric}: no run has .*; did you mean {meant}\?"):
            readable_runs(folders, metric, Console())
    assert capsys.readouterr().err == ""


def test_several_runs_of_one_seed_count_with_their_mean_and_are_named(make_run, tmp_path, capsys):
    folders = [make_run("p0", [0.1]), make_run("p1", [0.3]), make_run("d0", [0.4], teacher="t.pt")]
    run_compare(CompareOptions(runs=tuple(folders), project=tmp_path / "out"))
    said = capsys.readouterr()
    assert "+20.0 points over plain training (one seed)" in said.out
    assert f"seed 0 has 2 runs with the same settings ({folders[0]}, {folders[1]})" in said.err


def test_a_gain_stands_in_the_row_of_its_own_run(make_run, tmp_path):
    names = ("c1/exp", "c2/exp")
    plain = [make_run(f"plain/{name}", [0.1], seed=seed) for seed, name in enumerate(names)]
    taught = [
        make_run(name, [score], seed=seed, teacher="t.pt")
        for seed, (name, score) in enumerate(zip(names, (0.2, 0.4), strict=True))
    ]
    options = CompareOptions(runs=tuple(plain + taught), project=tmp_path / "out", group=False)
    with open(run_compare(options) / "groups.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["over plain"] for row in rows] == ["", "", "+10.0", "+30.0"]
    assert len({row["group"] for row in rows}) == 4
