"""What a state file may say; that a run goes on from it is tested with the scripts."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.errors import UserError
from utils.training.state import STATE_NAME, VERSION, data_digest, find_state, open_weights, read_state

RUN = {
    "epoch": 1, "best_fitness": 0.5, "best_epoch": 0, "class_scores": [0.5, 0.0], "kind": "TrainOptions",
    "options": {}, "network": {}, "names": ["a", "b"], "hyp": {}, "data": "",
}  # fmt: skip
MEANS = [[["box", "obj"], torch.zeros(2, 2)]]
CONTENT = {"version": VERSION, "run": RUN, "done": 2, "pending": 0, "ema_updates": 3, "meters": MEANS}


def test_a_state_of_the_right_form_is_read(tmp_path):
    torch.save(CONTENT, tmp_path / "state.pt")
    assert read_state(tmp_path / "state.pt")["run"] == RUN


@pytest.mark.fault(
    "a `state.pt` with impossible counters, scores, names or averages",
    "refused as not an intact run state",
)
@pytest.mark.parametrize(
    "changes",
    [
        {"done": "x"},
        {"done": -3},
        {"done": True},
        {"pending": []},
        {"ema_updates": 10**30},
        {"ema_updates": None},
        {"meters": [["box", "obj"]]},
        {"meters": [[["box"], torch.zeros(3, 3)]]},
        {"meters": 5},
        {"run": {**RUN, "epoch": -5}},
        {"run": {**RUN, "best_epoch": 10**300}},
        {"run": {**RUN, "class_scores": [0.5] * 5000}},
        {"run": {**RUN, "class_scores": ["a", "b"]}},
        {"run": {**RUN, "names": [1, 2]}},
        {"run": {**RUN, "epoch": 1.0}},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_counts_that_no_run_can_have_are_refused(changes, tmp_path):
    torch.save({**CONTENT, **changes}, tmp_path / "state.pt")
    with pytest.raises(UserError, match="not an intact run state"):
        read_state(tmp_path / "state.pt")


def test_bare_resume_means_the_newest_run_of_the_script(tmp_path):
    kinds = {"a": "TrainOptions", "b": "DistillOptions", "c": "TrainOptions", "d": "DistillOptions"}
    for number, (name, kind) in enumerate(kinds.items()):
        path = tmp_path / name / "weights" / STATE_NAME
        path.parent.mkdir(parents=True)
        torch.save({**CONTENT, "run": {**RUN, "kind": kind}}, path)
        os.utime(path, (1000 + number, 1000 + number))

    def found(project, kind):
        return find_state("", project, kind).parents[1].name

    assert (found(tmp_path, "TrainOptions"), found(tmp_path, "DistillOptions")) == ("c", "d")
    assert found(tmp_path / "a", "DistillOptions") == "a"  # there is no other


def test_a_state_that_goes_while_runs_are_looked_for_is_passed_over(tmp_path, monkeypatch):
    torch.save(CONTENT, tmp_path / STATE_NAME)
    monkeypatch.setattr(Path, "rglob", lambda *_: [tmp_path / "gone" / STATE_NAME, tmp_path / STATE_NAME])
    assert find_state("", tmp_path, "TrainOptions") == tmp_path / STATE_NAME


def test_a_name_that_no_run_can_have_is_one_without_a_state(tmp_path):
    with pytest.raises(UserError, match=r"no state\.pt to resume from"):
        find_state("x" * 300, tmp_path, "TrainOptions")


def test_the_digest_tells_pictures_apart_whatever_their_names():
    def digest(*names):
        index = SimpleNamespace(
            paths=[os.fsdecode(b"/data/" + name) for name in names],
            sizes_wh=np.zeros((len(names), 2), np.int64),
            labelled=np.ones(len(names), bool),
            label_owners=lambda: np.zeros(0, np.int64),
            all_labels=lambda: np.zeros((0, 5), np.float32),
        )
        return data_digest(index)

    assert digest(b"a.jpg", b"\xff.png") == digest(b"a.jpg", b"\xff.png")
    assert (
        len({digest(b"a.jpg", b"\xff.png"), digest(b"a.jpg", b"\xfe.png"), digest(b"\xff.png", b"a.jpg")})
        == 3
    )


def test_a_run_stopped_in_its_first_epoch_goes_on_by_the_name_of_weights_to_come(tmp_path):
    state = tmp_path / "exp/weights" / STATE_NAME
    state.parent.mkdir(parents=True)
    state.touch()
    for given in (tmp_path / "exp", state.parent, state, state.with_name("last.pt")):
        assert find_state(str(given), tmp_path, "TrainOptions") == state
    with pytest.raises(UserError, match=r"other/weights/last\.pt: no state\.pt to resume from"):
        find_state(str(tmp_path / "other/weights/last.pt"), tmp_path, "TrainOptions")


def test_a_link_in_place_of_the_weights_folder_is_not_followed(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.mine.0123456789ab.tmp").touch()
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp/weights").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="is a link"):
        open_weights(tmp_path / "exp")
    assert [path.name for path in (tmp_path / "other").iterdir()] == [".mine.0123456789ab.tmp"]


def test_weights_without_a_state_are_to_be_trained_on_from(tmp_path):
    last = tmp_path / "exp/weights/last.pt"
    last.parent.mkdir(parents=True)
    last.touch()
    for given in (tmp_path / "exp", last.parent, last):
        with pytest.raises(
            UserError, match=r"last\.pt: no state\.pt beside it: .*; .*: --weights .*last\.pt$"
        ):
            find_state(str(given), tmp_path, "TrainOptions")
