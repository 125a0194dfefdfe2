"""results.csv: rows that survive a kill, resumed runs, files of others."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from utils.errors import UserError
from utils.reporting.results import ResultsWriter, read_results

ROOT = Path(__file__).parents[2]
COLUMNS = ["epoch", "train/box", "metrics/mAP_0.5"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.csv"


def _write(path: Path, epochs: int) -> None:
    writer = ResultsWriter(path, COLUMNS)
    for epoch in range(epochs):
        writer.append({"epoch": epoch, "train/box": epoch + 0.5, "metrics/mAP_0.5": 0.1})


def test_the_header_is_there_before_the_first_row(path: Path) -> None:
    ResultsWriter(path, COLUMNS)
    assert path.read_text() == "epoch,train/box,metrics/mAP_0.5\n"
    assert {name: len(values) for name, values in read_results(path).items()} == dict.fromkeys(COLUMNS, 0)


def test_values_come_back_to_eight_digits_and_gaps_as_nan(path: Path) -> None:
    writer = ResultsWriter(path, COLUMNS)
    writer.append({"epoch": 0, "train/box": 1 / 3, "metrics/mAP_0.5": None})
    writer.append({"epoch": 1, "train/box": float(np.float32(1.2345678e-7))})
    writer.append({"epoch": 2, "train/box": math.inf, "metrics/mAP_0.5": math.nan})
    columns = read_results(path)
    assert columns["epoch"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(columns["train/box"][:2], [1 / 3, np.float32(1.2345678e-7)], rtol=5e-8)
    assert math.isinf(columns["train/box"][2]) and np.isnan(columns["metrics/mAP_0.5"]).all()
    assert path.read_text().splitlines()[1] == "0,0.33333333,"


def test_names_with_commas_and_other_letters_keep_their_columns(path: Path) -> None:
    writer = ResultsWriter(path, ["epoch", "ap/Zelle, rot", "ap/血"])
    writer.append({"epoch": 0, "ap/Zelle, rot": 1.0, "ap/血": 2.0})
    assert {name: values.tolist() for name, values in read_results(path).items()} == {
        "epoch": [0],
        "ap/Zelle, rot": [1],
        "ap/血": [2],
    }


def test_a_row_with_an_unknown_column_or_no_epoch_is_a_programming_error(path: Path) -> None:
    writer = ResultsWriter(path, COLUMNS)
    for row in ({"epoch": 0, "train/bix": 1.0}, {"train/box": 1.0}):
        with pytest.raises(AssertionError):
            writer.append(row)
    assert len(read_results(path)["epoch"]) == 0


def test_a_resumed_run_replaces_the_rows_from_its_first_epoch_on(path: Path) -> None:
    _write(path, 5)
    writer = ResultsWriter(path, COLUMNS, start_epoch=3)
    assert read_results(path)["epoch"].tolist() == [0, 1, 2]
    writer.append({"epoch": 3, "train/box": 9.0})
    assert read_results(path)["train/box"].tolist() == [0.5, 1.5, 2.5, 9.0]


def test_a_new_run_starts_an_empty_file(path: Path) -> None:
    _write(path, 5)
    ResultsWriter(path, ["epoch", "other"])
    assert path.read_text() == "epoch,other\n"


def test_columns_that_a_resumed_run_lacks_are_kept_behind_its_own(path: Path) -> None:
    _write(path, 2)
    writer = ResultsWriter(path, ["epoch", "train/new", "train/box"], start_epoch=2)
    writer.append({"epoch": 2, "train/new": 7.0})
    assert writer.columns == ("epoch", "train/new", "train/box", "metrics/mAP_0.5")
    columns = read_results(path)
    np.testing.assert_array_equal(columns["train/new"], [np.nan, np.nan, 7])
    np.testing.assert_array_equal(columns["metrics/mAP_0.5"], [0.1, 0.1, np.nan])


@pytest.mark.parametrize("rest", [b"3,0.1", b"3,0.12,0.", b"3", b"\0\0\0\0", b"3,\xe8\xa1"])
def test_half_a_line_is_no_row_and_goes_when_the_run_continues(path: Path, rest: bytes) -> None:
    _write(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole + rest)
    assert read_results(path)["epoch"].tolist() == [0, 1, 2]
    ResultsWriter(path, COLUMNS, start_epoch=3)
    assert path.read_bytes() == whole


def test_a_line_with_cells_too_few_or_too_many_is_no_row(path: Path) -> None:
    path.write_text("epoch,a\n0,1\n1\n2,3,4\n\n3,5\n")
    assert read_results(path)["a"].tolist() == [1, 5]


def test_a_file_with_blanks_around_its_commas_can_be_read(path: Path) -> None:
    path.write_text(
        "               epoch,      train/box_loss\r\n                   0,             0.12345\r\n"
    )
    assert {name: values.tolist() for name, values in read_results(path).items()} == {
        "epoch": [0],
        "train/box_loss": [0.12345],
    }


def test_a_killed_process_leaves_every_row_it_appended(path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
from utils.reporting.results import ResultsWriter
writer = ResultsWriter(Path({str(path)!r}), {COLUMNS!r})
for epoch in range(20):
    writer.append({{"epoch": epoch, "train/box": 1.0}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_results(path)["epoch"].tolist() == list(range(20))
    assert os.listdir(path.parent) == ["results.csv"]


@pytest.mark.fault(
    "disk full when a row of `results.csv` is written",
    "one-line error; the file keeps its previous rows intact",
)
def test_a_row_that_finds_no_room_leaves_the_file_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ResultsWriter(path, COLUMNS)
    writer.append({"epoch": 0, "train/box": 1.0})
    before = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"results\.csv.*No space left.*make room"):
            writer.append({"epoch": 1})
    assert path.read_bytes() == before and os.listdir(path.parent) == ["results.csv"]
    writer.append({"epoch": 1})
    assert read_results(path)["epoch"].tolist() == [0, 1]


@pytest.mark.fault("`results.csv` is a named pipe or not a table", "error naming the file, without blocking")
def test_what_is_no_table_is_named(path: Path) -> None:
    path.write_text('epoch,a\n0,"' + "x" * 300_000 + '"\n')
    with pytest.raises(UserError, match=r"results\.csv.*not a table"):
        ResultsWriter(path, COLUMNS, start_epoch=1)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"results\.csv.*not a regular file"):
        ResultsWriter(path, COLUMNS, start_epoch=1)


def test_a_place_that_cannot_be_written_is_named(path: Path) -> None:
    writer = ResultsWriter(path, COLUMNS)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"results\.csv.*cannot be written"):
        writer.append({"epoch": 0})


def test_a_file_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(path, 2)
    asked: list[Path] = []

    def read(place: Path, most: int) -> bytes:
        asked.append(place)
        return place.read_bytes()

    monkeypatch.setattr("utils.reporting.results.read_regular", read)
    assert read_results(path)["epoch"].tolist() == [0, 1] and asked == [path]
