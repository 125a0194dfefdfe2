"""Bars on a terminal and in a log, tables, and who is quiet."""

from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest

from utils.bars import write_line
from utils.reporting import console as console_module
from utils.reporting.console import Console, duration, format_table


class Terminal(io.StringIO):
    """A stream that takes itself for a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@contextmanager
def streams(stream: io.StringIO) -> Iterator[io.StringIO]:
    """Both streams in one; not a fixture, since pytest sets its own streams after those."""
    with redirect_stdout(stream), redirect_stderr(stream):
        yield stream


def test_messages_go_to_standard_output_and_warnings_to_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Console().info("two\nlines")
    Console().warn("careful")
    captured = capsys.readouterr()
    assert captured.out == "two\nlines\n"
    assert captured.err == "warning: careful\n"


def test_ranks_above_zero_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console()
    monkeypatch.setattr(console_module, "rank", lambda: 1)
    _say_everything(console)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_quiet_console_still_warns(capsys: pytest.CaptureFixture[str]) -> None:
    _say_everything(Console(quiet=True))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "warning: b\n")


def _say_everything(console: Console) -> None:
    console.info("a")
    console.warn("b")
    console.table([["c", 1]], ["name", "value"])
    assert list(console.progress(range(3), 3, "d")) == [0, 1, 2]
    bar = console.epoch(range(3), 3, "1/2", ["box"])
    for _ in bar:
        bar.set_postfix({"box": 1.0, "other": 2.0})


def test_a_log_gets_one_line_a_bar_without_control_characters() -> None:
    with streams(io.StringIO()) as log:
        for _ in range(3):
            assert sum(Console().progress(range(5000), 5000, "scoring")) == 12497500
    lines = log.getvalue().split("\n")
    assert len(lines) == 4 and lines.pop() == ""
    assert all(line.startswith("scoring 100% 5000/5000 [") and line.isprintable() for line in lines)


def test_a_log_gets_a_line_when_its_time_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with streams(io.StringIO()) as log:
        for _ in Console().progress(range(100), 100, "scoring"):
            now[0] += 2.0
    shares = [line.split()[1] for line in log.getvalue().splitlines()]
    assert shares == ["15%", "30%", "45%", "60%", "75%", "90%", "100%"]


def test_a_bar_without_a_total_counts() -> None:
    with streams(io.StringIO()) as log:
        assert list(Console().progress(iter("abc"), None, "frames")) == ["a", "b", "c"]
    assert log.getvalue().startswith("frames 3 [")


def test_a_bar_can_be_moved_by_hand() -> None:
    with streams(io.StringIO()) as log, Console().progress(None, 4, "copying") as bar:
        bar.update(4)
    assert "copying 100% 4/4" in log.getvalue()


def test_a_terminal_shows_a_bar_and_messages_above_it() -> None:
    console = Console()
    with streams(Terminal()) as terminal:
        for item in console.progress(range(2), 2, "scoring"):
            if item == 1:
                console.info("in between")
    shown = terminal.getvalue()
    assert "scoring   0% |" in shown and "scoring 100% |" in shown
    assert "\rin between\n" in shown  # the bar was wiped first


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_an_epoch_shows_its_values_below_their_names(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ["box", "quite_long_objectness", "Instances"]
    monkeypatch.setenv("COLUMNS", "150")
    with streams(stream):
        bar = Console().epoch(range(30), 30, "3/100", columns)
        for step in bar:
            bar.set_postfix({"box": 0.123456, "Instances": step + 1, "ratio": 1.23456e-05}, refresh=False)
            if step > 3:
                bar.set_postfix({"quite_long_objectness": "7"}, refresh=False)
    header, *_, line = re.split(r"[\r\n]+", stream.getvalue().strip("\n"))
    for name, value in zip(["Epoch", *columns], ["3/100", "0.1235", "7", "30"], strict=True):
        end = header.index(name) + len(name)
        assert line[:end].split()[-1] == value and line[end] == " "
    assert "30/30" in line and "ratio=1.23e-05" in line


@pytest.mark.parametrize(("width", "shown"), [(60, 0), (80, 1), (100, 3), (120, 5), (170, 9), (200, 9)])
def test_on_a_narrow_terminal_progress_and_times_come_first(
    width: int, shown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["box", "obj", "cls"]
    columns = [*names, *(f"distill_{name}" for name in names), "distill_grad_ratio", "Instances", "Size"]
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setenv("COLUMNS", str(width))
    with streams(Terminal()) as terminal:
        for _ in (bar := Console().epoch(range(1500), 1500, "98/100", columns, to_come=15_000)):
            bar.set_postfix(dict.fromkeys(columns, 0.123456))
            now[0] += 0.2
    header, *lines = re.split(r"[\r\n]+", terminal.getvalue().strip("\n"))
    headings = [*names, "d_box", "d_obj", "d_cls", "d_grad", "Instances", "Size"]
    assert header.split() == ["Epoch", *headings[:shown]]
    assert max(map(len, [header, *lines])) < width
    assert re.search(r" 100% .*1500/1500 \[05:00<00:00[^\]]*\]$", lines[-1].rstrip())
    assert any(", run " in line for line in lines)
    assert lines[-1].split()[1 : 1 + shown] == ["0.1235"] * shown


def test_an_epoch_that_was_done_before_shows_no_bar() -> None:
    with streams(io.StringIO()) as log:
        assert list(Console().epoch([], 4, "2/4", ["box"], initial=4, to_come=8)) == []
    assert log.getvalue() == ""


def test_an_epoch_tells_what_is_left_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with streams(io.StringIO()) as log:
        for _ in Console().epoch(range(100), 100, "1/10", ["box"], to_come=900):
            now[0] += 3.0
    lines = log.getvalue().splitlines()[1:]
    # A line every half minute: after ten batches of 3 s, 990 are left.
    assert "10/100 [00:30<04:30, run 50 min,  3.00s/it" in lines[0]
    assert "100/100 [05:00<00:00, run 45 min,  3.00s/it" in lines[-2]
    assert "100/100 [05:00<00:00,  3.00s/it" in lines[-1]  # it is over: what follows tells more


def test_the_last_epoch_has_nothing_to_tell_of_later_ones() -> None:
    with streams(io.StringIO()) as log:
        for _ in Console().epoch(range(3), 3, "2/2", ["box"]):
            pass
    assert "run" not in log.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (6000, "1 h 40 min"),
     (12_000, "3 h 20 min"), (200_000, "2 d 7 h")],
)  # fmt: skip
def test_times_are_told_as_people_do(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_bytes_come_in_large_units_and_things_by_their_name() -> None:
    with streams(io.StringIO()) as log:
        with Console().progress(None, 3_000_000, "reading", unit="B") as bar:
            bar.update(3_000_000)
        assert list(Console().progress(range(2), 2, "looking", unit=" images")) == [0, 1]
    first, second = log.getvalue().splitlines()
    assert "3.00M/3.00M" in first and "images/s" in second


def test_values_without_news_stay_and_missing_ones_are_dashes() -> None:
    with streams(io.StringIO()) as log:
        bar = Console().epoch(range(2), 2, "1/1", ["box", "obj"])
        for step in bar:
            if step == 0:
                bar.set_postfix({"box": 0.5})
    assert log.getvalue().splitlines()[-1].split()[:3] == ["1/1", "0.5", "-"]


def test_bars_start_no_thread_that_forked_workers_would_inherit() -> None:
    before = threading.active_count()
    with streams(Terminal()):
        for _ in Console().progress(range(2), 2, "scoring"):
            assert threading.active_count() == before


def test_a_table_has_straight_columns() -> None:
    rows = [["all", 72, "0.500", 0.25], ["platelets", 1234, "1.000", 123456.789]]
    assert format_table(rows, ["class", "images", "P", "other"]).splitlines() == [
        "class      images      P     other",
        "---------  ------  -----  --------",
        "all            72  0.500      0.25",
        "platelets    1234  1.000  1.23e+05",
    ]


def test_wide_letters_and_accents_keep_columns_straight() -> None:
    lines = format_table([["血小板", 1], ["Za\u0308hler", 2]], ["name", "n"]).splitlines()
    assert lines[2:] == ["血小板  1", "Za\u0308hler  2"]


def test_a_table_without_rows_is_its_header() -> None:
    assert format_table([], ["class", "P"]).splitlines() == ["class  P", "-----  -"]


def test_a_table_with_a_short_row_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        format_table([["all"]], ["class", "P"])


def test_a_line_that_cannot_be_written_does_not_end_a_run() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    write_line("a line", Full())


def test_letters_that_the_terminal_lacks_do_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Console().info("Zähler 血")
    assert raw.getvalue() == b"Z\\xe4hler \\u8840\n"
