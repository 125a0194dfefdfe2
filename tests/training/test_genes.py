"""What a generation gets from those before it."""

import numpy as np
import pytest

from utils.config.hyperparameters import Hyperparameters
from utils.training.genes import GENES, PARENTS, Ancestor, choose_parent, mutated, offspring

START = Hyperparameters()


def values_of(hyp):
    return {name: getattr(hyp, name) for name in GENES}


def test_values_stay_within_their_limits_over_many_generations():
    rng, hyp = np.random.default_rng(0), START
    for _ in range(300):
        hyp = mutated(hyp, START, rng)
        for name, value in values_of(hyp).items():
            assert GENES[name].low <= value <= GENES[name].high, name


def test_a_start_beyond_the_limits_is_reached_and_not_passed():
    start = Hyperparameters(warmup_epochs=12.0, lrf=0.001)
    rng = np.random.default_rng(0)
    seen = [mutated(start, start, rng) for _ in range(200)]
    assert max(hyp.warmup_epochs for hyp in seen) == 12.0 > min(hyp.warmup_epochs for hyp in seen)
    assert min(hyp.lrf for hyp in seen) == 0.001


def test_what_is_turned_off_stays_so_and_what_is_no_gene_stays_as_it_is():
    start = Hyperparameters(degrees=0.0, mixup=0.0, nbs=16, fliplr=0.3, anchors=4)
    child = mutated(start, start, np.random.default_rng(1))
    assert (child.degrees, child.mixup, child.nbs, child.fliplr, child.anchors) == (0.0, 0.0, 16, 0.3, 4)


def test_every_child_differs_and_four_values_of_five_change():
    rng = np.random.default_rng(2)
    children = [values_of(mutated(START, START, rng)) for _ in range(200)]
    assert all(child != values_of(START) for child in children)
    changed = np.mean([child["lr0"] != START.lr0 for child in children])
    assert 0.7 < changed < 0.9  # .8, with three times the spread of 200 draws
    # The logarithm of the change has a standard deviation of .2.
    spread = np.std([np.log(child["box"] / START.box) for child in children if child["box"] != START.box])
    assert 0.16 < spread < 0.24


def test_the_first_generation_is_the_start_and_others_repeat_by_seed_and_number():
    ancestors = [Ancestor(START, 0.5)]
    assert offspring(START, [], 0, 0) == START
    child = offspring(START, ancestors, 3, 0)
    assert child == offspring(START, ancestors, 3, 0)
    others = offspring(START, ancestors, 4, 0), offspring(START, ancestors, 3, 1)
    assert child not in others and START not in (child, *others)


def test_parents_are_the_best_few_and_the_fitter_ones_more_often():
    ancestors = [Ancestor(Hyperparameters(lr0=0.001 * (n + 1)), 0.1 * (n + 1)) for n in range(8)]
    rng = np.random.default_rng(0)
    drawn = [round(choose_parent(ancestors, rng).fitness * 10) for _ in range(500)]
    counts = [drawn.count(number) for number in (8, 7, 6, 5, 4)]
    assert sum(counts) == 500 and PARENTS == 5
    assert counts == sorted(counts, reverse=True) and counts[-1] > 0


@pytest.mark.parametrize("fitness", [0.0, 0.25])
def test_failed_generations_have_no_offspring_and_equal_ones_all_have(fitness):
    ancestors = [Ancestor(START, 0.0), Ancestor(Hyperparameters(lr0=0.02), fitness)]
    found = {choose_parent(ancestors, np.random.default_rng(n)) for n in range(20)}
    assert found == ({None} if fitness == 0 else {ancestors[1]})
    equal = [Ancestor(Hyperparameters(lr0=0.01 * n), 0.5) for n in (1, 2, 3)]
    assert len({choose_parent(equal, np.random.default_rng(n)) for n in range(40)}) == 3
