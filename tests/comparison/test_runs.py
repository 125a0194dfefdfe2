"""What is read back of a run's folder, whole or not."""

import os

import numpy as np
import pytest

from utils.comparison.runs import find_runs, read_run
from utils.comparison.tables import duration, scores_of
from utils.errors import UserError


@pytest.fixture
def said():
    return []


def test_scores_time_and_teacher_are_those_of_the_folder(make_run, said):
    run = read_run(make_run("exp", [0.1, 0.3, 0.2], seconds=59.0, teacher="weights/big.pt"), said.append)
    scores = scores_of(run, "map50-95")
    assert (scores.best, scores.best_epoch, scores.last) == (0.3, 2, 0.2)
    assert (run.epochs, run.planned, run.seed, duration(run)) == (3, 3, 0, "0:03:00")
    assert run.references == {"teacher weights/big.pt": (0.9, 0.6)}
    assert scores_of(run, "val/box_loss").best_epoch == 3  # of a loss the best is the lowest
    assert said == []


def test_a_blank_score_is_none_and_epochs_are_counted_from_their_own_column(make_run, said):
    folder = make_run("exp", [None, 0.2, None], epochs=5)
    run = read_run(folder, said.append)
    epochs, values = run.curve("mAP50-95")
    assert (epochs.tolist(), values.tolist(), run.epochs, run.planned) == ([2.0], [0.2], 3, 5)


def test_the_time_of_a_run_that_began_without_a_clock_is_not_made_up(make_run, said):
    folder = make_run("exp", [0.1, 0.2], seconds=4.0)
    (folder / "times.csv").write_text("epoch,train_seconds,val_seconds\n1,4,1\n")
    run = read_run(folder, said.append)
    assert np.isnan(run.seconds[0]) and run.seconds[1] == 5.0 and duration(run) == "-"


@pytest.mark.parametrize(
    ("content", "what"),
    [("", "no epoch"), ("epoch,metrics/mAP_0.5:0.95\n", "no epoch"), ("epoch,x\n0,1\n", "no column"),
     ("epoch,metrics/mAP_0.5:0.95\n0,\n", "no number"), ("\0\0\n\0", "results.csv")],
)  # fmt: skip
def test_a_results_file_without_the_score_is_refused_with_its_name(make_run, said, content, what):
    folder = make_run("exp", [0.1])
    (folder / "results.csv").write_text(content)
    with pytest.raises(UserError, match=what) as caught:
        scores_of(read_run(folder, said.append), "mAP50-95")
    assert "results.csv" in str(caught.value)


def test_what_is_broken_beside_the_scores_is_told_in_one_line_and_the_run_counts(make_run, said):
    folder = make_run("exp", [0.1, 0.4], teacher="t.pt", seconds=1.0)
    (folder / "opt.yaml").write_text("epochs: [")
    (folder / "hyp.yaml").unlink()
    (folder / "references.json").write_text("{")
    (folder / "times.csv").write_bytes(b"\xff\xfe\0")
    (folder / "weights").mkdir()
    (folder / "weights/best.pt").write_bytes(b"nothing of a network")
    run = read_run(folder, said.append)
    assert scores_of(run, "mAP50-95").best == 0.4
    assert (run.options, run.hyp, run.references, run.parameters) == (None, {}, {}, None)
    (line,) = said
    for name in ("opt.yaml", "hyp.yaml", "references.json", "best.pt"):
        assert name in line


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', '{"a": {"map50": NaN, "map50_95": 0.1}}', "[" * 10**5])
def test_a_teachers_score_that_is_none_is_told_and_not_drawn(make_run, said, content):
    folder = make_run("exp", [0.1], teacher="t.pt")
    (folder / "references.json").write_text(content)
    assert read_run(folder, said.append).references == {}
    assert len(said) == 1 and "references.json" in said[0]


def test_a_path_may_be_a_run_its_weights_a_folder_of_runs_or_a_pattern(make_run, said, tmp_path):
    runs = [make_run(f"train/{name}", [0.1]) for name in ("exp", "exp2", "exp10")]
    (runs[0] / "weights").mkdir()
    weights = runs[0] / "weights/best.pt"
    weights.touch()
    assert find_runs([tmp_path / "train"], said.append) == runs
    assert find_runs([tmp_path / "train/exp*"], said.append) == runs
    assert find_runs([weights, runs[1] / "results.csv", runs[0]], said.append) == runs[:2]
    assert said == []
    assert find_runs([tmp_path, tmp_path / "nowhere", tmp_path / ("x" * 300)], said.append) == []
    assert ["no results.csv" in said[0], *("is not there" in line for line in said[1:])] == [True] * 3


@pytest.mark.fault(
    "a results.csv or references.json of a run that is huge, or a table of very many cells",
    "the table is refused; without the references, the comparison goes on with a remark",
)
@pytest.mark.parametrize(
    "content", [b",\n" * (7 << 20), b"a,\n" * 600_000, b"\n" * (2 << 20), 3 << 30], ids=range(4)
)
def test_huge_files_of_a_run_are_not_read(make_run, said, content):
    folder = make_run("exp", [0.1])
    (folder / "references.json").write_bytes(b"{}")
    os.truncate(folder / "references.json", 3 << 30)
    assert read_run(folder, said.append).references == {}
    assert len(said) == 1 and "references.json is not as a run writes it" in said[0]
    (folder / "times.csv").touch()
    os.truncate(folder / "times.csv", 3 << 30)
    assert np.isnan(read_run(folder, [].append).seconds).all()
    if isinstance(content, int):
        os.truncate(folder / "results.csv", content)
    else:
        (folder / "results.csv").write_bytes(content)
    with pytest.raises(UserError, match="more than 1,048,576 cells|more than 16 MiB"):
        read_run(folder, said.append)
