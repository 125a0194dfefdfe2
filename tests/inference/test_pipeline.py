"""Work beside a loop: order, limits and errors are those of the loop alone."""

import threading
import time

import pytest

from utils.inference import pipeline
from utils.inference.pipeline import BackgroundTasks, in_groups, map_ahead, read_ahead


def counted(limit, made):
    for number in range(limit):
        made.append(number)
        yield number


def test_items_come_in_order_and_are_made_ahead_in_another_thread():
    made, threads = [], set()

    def items():
        for number in range(20):
            threads.add(threading.get_ident())
            made.append(number)
            yield number

    ahead = []
    for number in read_ahead(items(), lambda _: 1, 4):
        time.sleep(0.002)
        ahead.append(len(made) - number - 1)
        assert number == len(ahead) - 1
    assert len(ahead) == 20 and threading.get_ident() not in threads
    assert 1 <= max(ahead) <= 4


def test_few_large_items_wait(monkeypatch):
    monkeypatch.setattr(pipeline, "BUDGET_BYTES", 100)
    made = []
    for number in read_ahead(counted(10, made), lambda _: 60, 8):
        time.sleep(0.01)
        assert len(made) <= number + 2


def test_an_error_comes_in_its_turn():
    def items():
        yield 1
        yield 2
        raise ValueError("third")

    seen = []
    with pytest.raises(ValueError, match="third"):
        for number in read_ahead(items(), lambda _: 1, 8):
            seen.append(number)
    assert seen == [1, 2]


def test_a_loop_that_ends_early_ends_the_thread():
    made, before = [], threading.active_count()
    for number in read_ahead(counted(1000, made), lambda _: 1, 2):
        if number == 3:
            break
    time.sleep(0.05)
    assert threading.active_count() <= before + 1 and len(made) < 10


@pytest.mark.parametrize("threads", [1, 4])
def test_results_come_in_order_whichever_thread_is_done_first(threads):
    workers = set()

    def work(number):
        workers.add(threading.get_ident())
        time.sleep(0.001 * (number % 5))
        return 10 * number

    made = []
    results = map_ahead(work, counted(30, made), lambda _: 1, 6, threads)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(made) <= 6 + threads + 3
    assert list(results) == [10 * number for number in range(1, 30)]
    assert 1 <= len(workers) <= threads and threading.get_ident() not in workers


def test_an_error_of_the_work_or_of_its_items_comes_in_its_turn():
    def broken(number):
        return 1 // (3 - number)

    def items():
        yield from (0, 1)
        raise ValueError("no more")

    for given, error in ((range(10), ZeroDivisionError), (items(), ValueError)):
        seen = []
        with pytest.raises(error):
            seen.extend(map_ahead(broken, given, lambda _: 1, 8, 3))
        results = map_ahead(broken, range(10), lambda _: 1, 8, 3)
        assert [next(results) for _ in range(3)] == [0, 0, 1]
        results.close()


def test_few_large_results_wait(monkeypatch):
    monkeypatch.setattr(pipeline, "BUDGET_BYTES", 100)
    made = []
    for number in map_ahead(lambda item: item, counted(10, made), lambda _: 60, 8, 4, lambda _: 60):
        time.sleep(0.01)
        assert len(made) <= number + 3


def test_neighbours_of_one_kind_are_grouped():
    groups = list(in_groups("aaaaabbac", str, 3))
    assert groups == [list("aaa"), list("aa"), list("bb"), ["a"], ["c"]]
    assert list(in_groups([], str, 3)) == []


def test_work_is_done_in_order_and_all_of_it():
    done = []

    def work(number):
        time.sleep(0.001)
        done.append(number)

    with BackgroundTasks(3) as behind:
        for number in range(20):
            behind(lambda number=number: work(number))
            assert number - len(done) <= 4
    assert done == list(range(20))


def test_an_error_of_the_work_is_raised_and_what_was_in_line_is_done():
    done = []

    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), BackgroundTasks(8) as behind:
        behind(fail)
        behind(lambda: done.append(1))
    assert done == [1]


def test_an_error_of_the_loop_leaves_what_was_in_line_done():
    done = []
    with pytest.raises(KeyError), BackgroundTasks(8) as behind:
        behind(lambda: (time.sleep(0.02), done.append(1)))
        raise KeyError
    assert done == [1]


def test_the_rest_of_the_work_is_done_by_several_threads_and_all_of_it():
    begun, done, workers = [], [], set()

    def begin(number):
        begun.append(number)

        def rest():
            workers.add(threading.get_ident())
            time.sleep(0.004 - 0.001 * (number % 4))
            done.append(number)

        return rest if number % 3 else None

    with BackgroundTasks(6, threads=3) as behind:
        for number in range(20):
            behind(lambda number=number: begin(number))
    assert begun == list(range(20))
    assert sorted(done) == [number for number in range(20) if number % 3] and 1 < len(workers) <= 3


def test_an_error_of_the_rest_is_raised_too():
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), BackgroundTasks(8, threads=2) as behind:
        behind(lambda: fail)
        behind(lambda: None)
