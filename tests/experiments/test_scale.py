"""The estimate of many GPUs: its formula by hand, and what it stops at."""

import math

import pytest

from benchmarks.scale import Machine, Pieces, estimate, exchange_s

MACHINE = Machine(gpus=8, cores=16, inside_gb_s=20, between_gb_s=2, latency_us=10)
PIECES = Pieces(
    step_s=0.1,
    overlap_s=0.06,
    gradient_bytes=40_000_000,
    batch=16,
    samples_s=300,
    small_allreduces=2,
)


def test_the_exchange_is_that_of_a_ring_over_the_slowest_link():
    assert exchange_s(PIECES, MACHINE, 1) == 0
    assert exchange_s(PIECES, MACHINE, 8) == pytest.approx(14 / 8 * 0.04 / 20 + 14e-5)
    assert exchange_s(PIECES, MACHINE, 16) == pytest.approx(30 / 16 * 0.04 / 2 + 30e-5)


def test_what_hides_behind_the_backward_pass_costs_nothing_and_meetings_do():
    one, eight = estimate(PIECES, MACHINE, [1, 8])
    assert (one.images_s, one.efficiency, one.limit) == (pytest.approx(160), 1, "network")
    assert eight.efficiency == pytest.approx(0.1 / (0.1 + 2 * 2 * math.log2(8) * 1e-5))


@pytest.mark.parametrize(
    ("changed", "limit", "pictures"),
    [({"samples_s": 10}, "loader", 160), ({"gradient_bytes": 4_000_000_000}, "exchange", None)],
)
def test_it_says_what_it_stops_at(changed, limit, pictures):
    (eight,) = estimate(Pieces(**{**vars(PIECES), **changed}), MACHINE, [8])
    assert eight.limit == limit and eight.efficiency < 1
    assert pictures is None or eight.images_s == pytest.approx(pictures)


def test_an_exchange_after_the_backward_pass_takes_its_whole_time():
    given = {**vars(PIECES), "overlap_s": 0.0, "small_allreduces": 0}
    one, two = estimate(Pieces(**given), MACHINE, [1, 2])
    assert one.efficiency == 1
    assert two.efficiency == pytest.approx(0.1 / (0.1 + 0.04 / 20 + 2e-5))
