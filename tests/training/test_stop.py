"""Signals: when they end the work at once, when in good order, and what counts as one of them."""

import os
import signal

import pytest

from utils.device import dead_worker
from utils.errors import StoppedError
from utils.training import stop as module
from utils.training.stop import StopSignals


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture
def acted():
    """The signals that have acted as they always do; without it they would end the tests."""
    found = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda got, _: found.append(got)) for number in numbers]
    yield found
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_run_under_nohup_outlives_its_terminal(acted):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as stop:
        send(signal.SIGHUP)
        assert stop.wanted is None


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_work_at_once(number, code, acted):
    with pytest.raises(StoppedError, match="nothing had begun, so nothing is lost") as stopped, StopSignals():
        send(number)
        pytest.fail("went on")
    assert stopped.value.exit_code == code
    assert not acted
    send(number)
    assert acted == [number]  # everything is as it was


def test_where_signals_are_noted_the_work_goes_on_to_a_good_place(acted):
    reached = []
    with pytest.raises(StoppedError, match="go on so"), StopSignals() as stop:
        with stop.noted("go on so"):
            assert not stop.agreed()
            send(signal.SIGTERM)
            reached.append(stop.agreed())
        pytest.fail("went on")
    assert reached == [True]


def test_the_echo_of_a_signal_is_no_second_one_and_a_second_one_acts_as_always(acted, monkeypatch):
    with pytest.raises(StoppedError), StopSignals() as stop, stop.noted(""):
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert not acted
        monkeypatch.setattr(module, "ECHO", -1.0)
        send(signal.SIGINT)
        assert acted == [signal.SIGINT]


def test_another_signal_is_a_second_one(acted):
    with pytest.raises(StoppedError), StopSignals() as stop, stop.noted(""):
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert acted == [signal.SIGTERM]


@pytest.mark.parametrize(
    "error", [dead_worker(EOFError()), RuntimeError("[gloo/transport] Connection closed")]
)
def test_other_processes_that_are_gone_too_are_no_error_when_all_are_to_stop(error, acted):
    with pytest.raises(StoppedError), StopSignals() as stop, stop.noted(""):
        send(signal.SIGTERM)
        raise error
    with pytest.raises(type(error)), StopSignals():
        raise error


def test_an_error_of_ones_own_stays_one(acted):
    with pytest.raises(RuntimeError, match="own"), StopSignals() as stop, stop.noted(""):
        send(signal.SIGTERM)
        raise RuntimeError("own")


def test_after_an_error_signals_end_the_work_at_once_again(acted):
    with pytest.raises(StoppedError, match="go on so"), StopSignals() as stop:
        with pytest.raises(RuntimeError, match="diverged"), stop.noted("go on so"):
            raise RuntimeError("diverged")
        send(signal.SIGTERM)
        pytest.fail("went on")
    assert not acted
