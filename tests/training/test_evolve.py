"""Evolution without the trainings: who takes which generation, and what becomes of its result."""

import csv
import multiprocessing
import os
import re
import signal
from dataclasses import replace

import pytest
import yaml

from utils.config.files import claim_folder, release_folder
from utils.config.hyperparameters import Hyperparameters, load_hyperparameters
from utils.config.options import DistillOptions, TrainOptions
from utils.errors import UsageError, UserError
from utils.reporting.console import Console
from utils.training import evolve as module
from utils.training.evolve import evolve, is_evolution
from utils.training.generations import Generations, Outcome
from utils.training.guard import DivergedError

HEADER = (
    "epoch,train/box_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,metrics/mAP_0.5:0.95,val/box_loss"
)


def write_results(folder, map50_95, loss=0.5):
    folder.mkdir(exist_ok=True)
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "results.csv").write_text(f"{HEADER}\n0,{loss},0.1,0.2,0.4,{map50_95},0.03\n")


def trained(options, _how=""):
    """In the place of a training: a score that is best at a box gain of .07."""
    hyp = load_hyperparameters(options.hyp)
    write_results(options.project / options.name, 0.5 - abs(hyp.box - 0.07))


def rows_of(folder):
    with open(folder / "evolve.csv", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def options_of(folder, count, **others):
    return TrainOptions(evolve=count, project=folder, name="e", epochs=2, **others)


def run(options, train=trained):
    return evolve(options, train, Console(quiet=True))


def test_generations_are_counted_and_the_best_one_can_be_trained_with(tmp_path, capsys):
    folder = run(options_of(tmp_path, 6, noplots=True))
    rows = rows_of(folder)
    assert [row["generation"] for row in rows] == list("012345")
    first = {name: float(rows[0][name]) for name in Hyperparameters().to_dict()}
    assert first == Hyperparameters().to_dict()
    fitness = [float(row["fitness"]) for row in rows]
    assert fitness[0] == pytest.approx(0.1 * 0.4 + 0.9 * 0.48)
    best = rows[fitness.index(max(fitness))]
    found = load_hyperparameters(folder / "hyp_evolved.yaml")
    assert {name: float(best[name]) for name in found.to_dict()} == found.to_dict()
    assert not list(folder.glob("generation*"))
    assert rows[0]["metrics/mAP_0.5"] == "0.4" and rows[0]["val/box_loss"] == "0.03"


def test_an_evolution_repeats_and_goes_on_as_if_it_never_had_stopped(tmp_path):
    whole = run(options_of(tmp_path / "a", 7, noplots=True))
    for count in (2, 5):
        run(options_of(tmp_path / "b", count, noplots=True))
    before = (tmp_path / "b/e/evolve.csv").read_bytes()
    run(options_of(tmp_path / "b", 5, noplots=True))
    assert (tmp_path / "b/e/evolve.csv").read_bytes() == before
    resumed = TrainOptions(evolve=7, resume=str(tmp_path / "b/e"), given=frozenset({"evolve", "resume"}))
    assert is_evolution(resumed) and run(resumed) == tmp_path / "b/e"
    assert (whole / "evolve.csv").read_bytes() == (tmp_path / "b/e/evolve.csv").read_bytes()
    other = run(options_of(tmp_path / "c", 2, noplots=True, seed=1))
    assert rows_of(other)[1] != rows_of(whole)[1]


@pytest.mark.fault(
    "a generation of an evolution diverges, or its losses or scores are not finite",
    "it counts as fitness 0; the evolution continues",
)
def test_a_generation_that_fails_counts_as_fitness_0(tmp_path):
    def some_fail(options, _how):
        if options.name == "generation1":
            raise DivergedError("10 updates in a row were not finite numbers (the batch is in x)", "epoch 1")
        trained(options)
        if options.name == "generation2":
            write_results(options.project / options.name, 0.9, loss="")
        if options.name == "generation3":
            write_results(options.project / options.name, "nan")

    rows = rows_of(run(options_of(tmp_path, 5, noplots=True), some_fail))
    assert [float(row["fitness"]) > 0 for row in rows] == [True, False, False, False, True]
    assert [row["failure"] for row in rows] == [
        "", "10 updates in a row were not finite numbers",
        "its losses are not finite numbers", "its scores are not finite numbers", "",
    ]  # fmt: skip


def test_what_is_no_fault_of_the_values_ends_the_evolution_and_leaves_nothing(tmp_path):
    def no_data(_options, _how):
        raise UserError("is not there", "data.yaml")

    with pytest.raises(UserError, match="data.yaml"):
        run(options_of(tmp_path / "runs", 3), no_data)
    assert not (tmp_path / "runs").exists()


def test_scores_that_could_not_be_compared_do_not_come_into_one_table(tmp_path):
    folder = run(options_of(tmp_path, 1, noplots=True))
    with pytest.raises(UserError, match=r"--epochs 2, now 3; give this one another --name.*--resume .*/e"):
        run(replace(options_of(tmp_path, 2), epochs=3))
    hyp = tmp_path / "mine.yaml"
    hyp.write_text("lr0: 0.5\n")
    with pytest.raises(UserError, match=r"lr0 0.01, now 0.5"):
        run(options_of(tmp_path, 2, hyp=hyp))
    with pytest.raises(UsageError, match="train.py --resume"):
        run(DistillOptions(resume=str(folder), evolve=2))
    with pytest.raises(UsageError, match="--epochs"):
        run(TrainOptions(resume=str(folder), evolve=2, epochs=3, given=frozenset({"resume", "epochs"})))
    run(options_of(tmp_path, 2, noplots=True, workers=3, device="cpu"))  # as good on any machine
    assert len(rows_of(folder)) == 2


def test_bare_resume_takes_the_newest_evolution_and_torchrun_is_refused(tmp_path, monkeypatch):
    folder = run(options_of(tmp_path, 1, noplots=True))
    run(TrainOptions(resume="", evolve=2, project=tmp_path, given=frozenset({"resume", "evolve"})))
    assert len(rows_of(folder)) == 2
    with pytest.raises(UserError, match="no evolution to resume"):
        run(TrainOptions(resume="", evolve=2, project=tmp_path / "none"))
    monkeypatch.setattr(module, "is_distributed", lambda: True)
    with pytest.raises(UsageError, match="a --device of its own"):
        run(options_of(tmp_path, 3))


def test_a_row_that_somebody_has_broken_is_named(tmp_path):
    folder = run(options_of(tmp_path, 2, noplots=True))
    text = (folder / "evolve.csv").read_text()
    row = text.splitlines()[2]
    for broken in (
        row.replace("1,", "one,", 1),
        re.sub("^1,[^,]*,", "1,inf,", row),
        re.sub("^1,[^,]*,", "1,nan,", row),
        row + "x" * 200_000,
    ):
        (folder / "evolve.csv").write_text(text.replace(row, broken))
        with pytest.raises(UserError, match=r"evolve\.csv, line \d: is not a generation"):
            run(options_of(tmp_path, 3))


def evolve_quietly(folder, count, train=trained):
    run(options_of(folder, count, noplots=True), train)


@pytest.mark.fault("several processes evolve in the same folder", "no generation is lost or duplicated")
def test_processes_share_the_generations(tmp_path):
    """Six at a time, so that they meet where they take the next one and where they write."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=evolve_quietly, args=(tmp_path, 24)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert [int(row["generation"]) for row in rows_of(tmp_path / "e")] == list(range(24))
    assert not list((tmp_path / "e").glob("generation*"))


def die(options, _how):
    (options.project / options.name / "weights").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault(
    "SIGKILL during a generation of an evolution",
    "the next process resumes the generation with the same hyperparameters",
)
def test_a_generation_whose_process_was_killed_is_taken_up_with_the_values_that_it_had(tmp_path):
    run(options_of(tmp_path, 2, noplots=True))
    worker = multiprocessing.get_context("fork").Process(target=evolve_quietly, args=(tmp_path, 4, die))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    left = yaml.safe_load((tmp_path / "e/generation2/hyp.yaml").read_text())
    seen = []

    def look(options, _how):
        seen.append((options.name, options.resume, load_hyperparameters(options.hyp).to_dict()))
        trained(options)

    (tmp_path / "e/generation2/weights/state.pt").touch()  # it had got so far
    run(options_of(tmp_path, 4, noplots=True), look)
    assert [name for name, _, _ in seen] == ["generation2", "generation3"]
    assert seen[0][1:] == (str(tmp_path / "e/generation2"), left) and seen[1][1] is None
    assert len(rows_of(tmp_path / "e")) == 4


def test_a_generation_that_is_taken_up_finds_data_that_lies_elsewhere_now(tmp_path):
    def stop(options, _how):
        (options.project / options.name / "weights").mkdir()
        (options.project / options.name / "weights/state.pt").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(options_of(tmp_path, 1, noplots=True), stop)
    seen = []

    def look(options, _how):
        seen.append({name: getattr(options, name) for name in options.given})
        trained(options)

    release_folder(tmp_path / "e/generation0")
    given = frozenset({"resume", "data_dir", "download"})
    run(TrainOptions(resume=str(tmp_path / "e"), data_dir=tmp_path, download=False, given=given), look)
    # What is not `given` a run that goes on takes from its own state.
    assert seen == [{"device": "", "workers": 8, "cache": None, "data_dir": tmp_path, "download": False}]


@pytest.mark.fault(
    "a link in place of a folder `generationN` of an evolution, or of a run's folder `weights`",
    "refused; nothing is written to where it leads",
)
def test_a_link_in_place_of_a_generation_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(options_of(tmp_path, 1))
    (tmp_path / "e/generation1").symlink_to(elsewhere)
    with pytest.raises(UserError, match="generation1"):
        run(options_of(tmp_path, 2))
    assert not list(elsewhere.iterdir())


def test_a_generation_that_another_process_has_is_left_to_it(tmp_path):
    def hold(folder, ready, done):
        claim_folder(folder)
        ready.set()
        done.wait(60)

    folder = run(options_of(tmp_path, 1, noplots=True))
    (folder / "generation1").mkdir()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(folder / "generation1", ready, done))
    other.start()
    assert ready.wait(60)
    generations = Generations(folder, Hyperparameters(), 0, print)
    task = generations.begin(3)
    assert task.number == 2 and generations.begin(2) is None and generations.at_work() == [1, 2]
    release_folder(task.folder)
    done.set()
    other.join(60)
    assert generations.begin(3).number == 1
    release_folder(folder / "generation1")


def test_a_result_is_written_once(tmp_path):
    generations = Generations(tmp_path, Hyperparameters(), 0, print)
    assert generations.begin(1).number == 0
    first = Outcome(0, Hyperparameters(), 0.5, {"metrics/recall": 0.25})
    generations.record(first, lambda _: None)
    assert generations.record(replace(first, fitness=0.7), lambda _: None) == [first]
