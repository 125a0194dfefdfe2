"""Tables and images made of records."""

import json
import shlex
from pathlib import Path

import pytest

from experiments import report
from experiments.arms import Arm
from experiments.plans import PLANS, TEACHERS, Plan, TeacherRun
from experiments.run import Runner, words_of
from utils.errors import UserError

PLAN = Plan("a set", "set.yaml", 64, 4, (), (Arm("plain", "plain"), Arm("taught", "`taught`", (), "big")))


def record(arm, seed, score, curve):
    return {"arm": arm, "seed": seed, "map50": 0.5, "map50_95": score, "val_map50_95": curve}


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    contents = [
        record("plain", 0, 0.20, [0.1, 0.1, 0.2, 0.2]),
        record("plain", 1, 0.30, [0.1, 0.1, 0.2, 0.3]),
        record("taught", 0, 0.24, [0.1, 0.2, 0.2, 0.3]),
        record("taught", 1, 0.36, [0.1, 0.3, 0.3, 0.3]),
        record("taught", 2, 0.30, [0.1, 0.1, 0.3, 0.3]),
    ]
    (tmp_path / "set").mkdir()
    for content in contents:
        path = tmp_path / "set" / f"{content['arm']}-s{content['seed']}.json"
        path.write_text(json.dumps(content))
    teacher = {"title": "big one", "map50": 0.9, "map50_95": 0.45}
    (tmp_path / "set" / "teacher-big.json").write_text(json.dumps(teacher))
    monkeypatch.setitem(TEACHERS, "big", TeacherRun("big one", "big.pt", ("--epochs", "2")))
    return report.read_records("set", PLAN)


def test_an_arm_is_compared_with_the_plain_runs_of_its_own_seeds(records):
    rows = [line.strip("| ").split(" | ") for line in report.table(PLAN, *records).splitlines()[2:]]
    assert rows[0][0] == "teacher: big one" and "45.0" in rows[0]
    assert rows[1] == ["plain", "2", "50.0 ± 0.0", "25.0 ± 7.1", "", "", ""][: len(rows[1])]
    # +4 and +6 points against .20 and .30; the teacher is 20 points above their mean; plain's ends, .2 and
    # .3, are reached at the second of four epochs. The third seed has no twin.
    assert rows[2] == [
        "`taught`",
        "3",
        "50.0 ± 0.0",
        "30.0 ± 6.0",
        "+5.0 ± 1.0 (least +4.0)",
        "25%",
        "50% of the epochs",
    ]


def test_rows_under_different_teachers_are_told(records):
    results, teachers = records
    assert report.remarks(results, teachers) == ""
    teachers["big"]["teacher_sha256"] = results[1].by_seed[0]["teacher_sha256"] = "a"
    assert "do not tell which training of the teacher `big`" in report.remarks(results, teachers)
    for record in results[1].by_seed.values():
        record["teacher_sha256"] = "a"
    assert report.remarks(results, teachers) == ""
    results[1].by_seed[1]["teacher_sha256"] = "b"
    assert "`big` was trained again" in report.remarks(results, teachers)


def test_runs_in_different_precisions_are_told(records):
    results, teachers = records
    for entry in results:
        for record in entry.by_seed.values():
            record |= {"machine": "cpu (1 threads)", "command": "train.py --amp-dtype bf16"}
    assert report.remarks(results, teachers) == ""
    results[1].by_seed[1]["command"] = "train.py"
    assert "1 of the 5 runs were made on a CPU without bf16" in report.remarks(results, teachers)


def test_a_folder_of_another_command_is_neither_taken_nor_trained_on(tmp_path, monkeypatch):
    calls, folder = [], tmp_path / "plain-s0"
    runner = Runner("cpu", tmp_path)
    monkeypatch.setattr(runner, "_call", lambda _, *words: calls.append(words))
    runner._train(["train.py"], ["--epochs", "2"], folder)
    runner._train(["train.py"], ["--epochs", "2"], folder)
    assert len(calls) == 1 and calls[0][:3] == ("train.py", "--epochs", "2")
    with pytest.raises(UserError, match="another command"):
        runner._train(["train.py"], ["--epochs", "3"], folder)


def test_the_target_may_be_another_arm(records):
    plan = Plan("a set", "set.yaml", 64, 4, (), PLAN.arms, target="taught")
    assert "100%" in report.table(plan, *records).splitlines()[-1]


def test_a_score_that_is_never_reached_is_said(records):
    results, teachers = records
    results[1].by_seed[0]["val_map50_95"] = [0.1] * 4
    assert "not by every seed" in report.table(PLAN, results, teachers)


def test_a_picture_of_the_curves_is_drawn(records, tmp_path):
    report.plot_curves(tmp_path / "images/set.png", PLAN, records[0])
    assert (tmp_path / "images/set.png").read_bytes().startswith(b"\x89PNG")


def test_text_between_the_marks_alone_is_replaced():
    page = "before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n"
    assert report.between_marks(page, "a", "new\n") == page.replace("old", "new")


def test_every_plan_has_its_place_in_the_docs_and_its_teachers():
    for name, plan in PLANS.items():
        page = report.OTHER_PAGES.get(name, report.PAGE).read_text(encoding="utf-8")
        assert f"<!-- {name} -->" in page and f"<!-- end of {name} -->" in page
        assert {arm.teacher for arm in plan.arms} <= {None, *TEACHERS}
        assert plan.reference in {arm.name for arm in plan.arms}


def bare(words):
    """A command's words without the folders of weight files and the precision, which the machine decides."""
    kept = [Path(word).name if word.endswith(".pt") else word for word in words]
    if "--amp-dtype" in kept:
        at = kept.index("--amp-dtype")
        del kept[at : at + 2]
    return kept


@pytest.mark.parametrize("name", PLANS)
def test_the_command_of_each_record_is_that_of_its_plan(name):
    """A figure can be repeated by the command that stands with it, whatever defaults have changed since."""
    plan = PLANS[name]
    results, _ = report.read_records(name, plan)
    for entry in results:
        weights = None if entry.arm.teacher is None else TEACHERS[entry.arm.teacher]
        teacher = None if weights is None else Path("best.pt" if weights.options else weights.weights)
        for seed, record in entry.by_seed.items():
            script, words = words_of(plan, entry.arm, seed, plan.start, teacher)
            assert bare(shlex.split(record["command"])) == bare(["python", *script, *words])
