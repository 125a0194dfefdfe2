"""When a run saves its state and its weights, without a run around it."""

from types import SimpleNamespace

import numpy as np
import pytest

from utils.config.options import TrainOptions
from utils.device import dead_worker
from utils.evaluation.best import Best
from utils.training import run as module
from utils.training.run import TrainingRun

GONE = RuntimeError("[gloo/transport] Connection closed")


@pytest.mark.parametrize(
    ("error", "between_steps", "saved"),
    [
        (dead_worker(EOFError()), True, [7]),
        (GONE, True, [7]),
        (GONE, False, []),  # gradients or statistics are those of a step that others have not made
        (RuntimeError("own"), True, []),
        (KeyboardInterrupt(), True, []),
    ],
)
def test_a_state_is_saved_for_others_that_are_gone_and_in_no_step(error, between_steps, saved):
    states = []
    run = SimpleNamespace(trainer=SimpleNamespace(between_steps=between_steps), _save_state=states.append)
    with pytest.raises(type(error)), TrainingRun._state_kept(run, 7):
        raise error
    assert states == saved


def test_without_an_error_nothing_is_saved():
    run = SimpleNamespace(trainer=SimpleNamespace(between_steps=True), _save_state=pytest.fail)
    with TrainingRun._state_kept(run, 7):
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_the_average_is_saved_before_the_state_that_says_the_epoch_is_done(rank, monkeypatch):
    """A run killed in between writes the weights again."""
    events, best = [], Best(0.5, 2)
    monkeypatch.setattr(module, "rank", lambda: rank)
    run = SimpleNamespace(
        files=SimpleNamespace(save=lambda *given: events.append(given)),
        trainer=SimpleNamespace(ema=SimpleNamespace(model="average"), step=None),
        model="network",
        best=best,
        _save_state=events.append,
    )
    TrainingRun._save(run, 3, SimpleNamespace(fitness=0.4))
    TrainingRun._save(run, 4, None)
    weights = [("average", 3, best, 0.4), ("average", 4, best, None)]
    assert events == ([weights[0], 4, weights[1], 5] if rank == 0 else [4, 5])


@pytest.mark.parametrize(
    ("every", "wanted", "saved"),
    [(0, None, []), (3, None, [2, 5, 8]), (0, 4, [4]), (3, 4, [2, 4])],
)
def test_a_state_is_saved_every_so_many_steps_and_after_the_step_of_a_signal(every, wanted, saved):
    states, steps = [], iter(range(9))
    now = None

    class StoppedHereError(Exception):
        pass

    def leave():
        raise StoppedHereError

    run = SimpleNamespace(
        options=SimpleNamespace(save_every_steps=every),
        stop=SimpleNamespace(agreed=lambda: now == wanted, raise_if_wanted=leave),
        trainer=SimpleNamespace(meters=SimpleNamespace(over_ranks=lambda: "sums of all")),
        _save_state=lambda epoch, meters: states.append((epoch, meters, now)),
    )
    try:
        for now in steps:
            TrainingRun._after_step(run, SimpleNamespace(epoch=1, step=now))
    except StoppedHereError:
        assert now == wanted
    assert states == [(1, "sums of all", step) for step in saved]


def epochs_of(monkeypatch, scores, **given):
    """Which epochs a run with these scores validates, and which it saves, with the best one so far."""
    run, validated, saved = TrainingRun.__new__(TrainingRun), [], []
    nothing = SimpleNamespace(seconds=0.0, begin_epoch=lambda: None, optimizer=None)
    run.options, run.best, run.trainer = TrainOptions(epochs=len(scores), **given), Best(), nothing
    run.records, run.console = SimpleNamespace(add=lambda *_: None), SimpleNamespace(info=lambda *_: None)
    run._train = run._review = lambda *_: {}
    run._tell = lambda *_: None

    def validate(epoch):
        validated.append(epoch)
        return SimpleNamespace(fitness=scores[epoch], map50_95=0.0, ap_by_class=lambda: np.zeros(1))

    run._validate = validate
    run._save = lambda epoch, result: saved.append((epoch, run.best.epoch, getattr(result, "fitness", None)))
    monkeypatch.setattr(module, "row_of", lambda *_: {})
    for epoch in range(len(scores)):
        if run._epoch(epoch):
            break
    return validated, saved


def test_each_epoch_is_saved_with_its_own_score_and_the_best_epoch_so_far(monkeypatch):
    validated, saved = epochs_of(monkeypatch, [0.2, 0.4, 0.3, 0.4])
    assert validated == [0, 1, 2, 3]
    assert saved == [(0, 0, 0.2), (1, 1, 0.4), (2, 1, 0.3), (3, 3, 0.4)]


def test_without_validation_or_saving_the_last_epoch_is_validated_and_saved(monkeypatch):
    assert epochs_of(monkeypatch, [0.2] * 3, noval=True) == (
        [2],
        [(0, 0, None), (1, 0, None), (2, 2, 0.2)],
    )
    assert epochs_of(monkeypatch, [0.2, 0.1, 0.1], nosave=True) == ([0, 1, 2], [(2, 0, 0.1)])


@pytest.mark.parametrize("nosave", [False, True])
def test_an_epoch_that_ends_a_run_early_is_saved_as_the_last_one(nosave, monkeypatch):
    scores = [0.1, 0.3, 0.2, 0.2, 0.9]
    validated, saved = epochs_of(monkeypatch, scores, patience=2, nosave=nosave)
    assert validated == [0, 1, 2, 3] and saved[-1] == (3, 1, 0.2)
    assert [epoch for epoch, *_ in saved] == ([3] if nosave else [0, 1, 2, 3])
