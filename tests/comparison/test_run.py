"""compare.py's own work, on folders made up."""

import csv

import pytest

from utils.comparison.run import readable_runs, run_compare
from utils.config.options import CompareOptions
from utils.errors import UserError
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
    assert ["bad" in lines[0], "no epoch is done" in lines[1], len(lines)] == [True, True, 2]
    with pytest.raises(UserError, match="no run to compare"):
        run_compare(CompareOptions(runs=(bad, empty), project=good / "out"))
    assert not (good / "out").exists()
    capsys.readouterr()
    with pytest.raises(UserError, match="no run to compare"):
        readable_runs([good], "mAP", Console())
    assert "did you mean 'mAP50'?" in capsys.readouterr().err
