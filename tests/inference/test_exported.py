"""Exported networks, whatever their format: what they give is checked at every call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from utils.errors import UserError
from utils.inference.exported import ExportedNetwork, first_words, last_words
from utils.inference.facts import ExportFacts

CPU = torch.device("cpu")


def test_a_file_that_changes_its_number_of_classes_is_refused(tmp_path: Path) -> None:
    class Growing(ExportedNetwork):
        kind = "growing"
        rows = torch.zeros(1, 4, 7)

        def run(self, images: Tensor) -> Tensor:
            return self.rows

    network = Growing(tmp_path / "net", ExportFacts(names=("a", "b"), shape=(1, 32, 32)), CPU)
    network.probe()
    network.rows = torch.zeros(1, 4, 9)
    with pytest.raises(UserError, match=r"gives \(1, 4, 9\) and not"):
        network(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("told", "first", "last"),
    [
        ("Traceback:\n  File x\n\nRuntimeError: y \n", "Traceback:", "RuntimeError: y"),
        ("", "ValueError", "ValueError"),
        ("a" * 1000, "a" * 300, "a" * 300),
    ],
)
def test_of_what_a_library_tells_one_line_is_shown(told: str, first: str, last: str) -> None:
    assert first_words(ValueError(told)) == first and last_words(ValueError(told)) == last
