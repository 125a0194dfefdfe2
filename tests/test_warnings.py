"""Deprecation warnings from our own code are errors, here and in the scripts that tests start."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

STRICT = Path(__file__).parent / "strict_warnings"
CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def _warn_from(module: str, category: type[Warning]) -> None:
    warnings.warn_explicit("going away", category, "file.py", 1, module=module)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("module", ["models.yolo", "utils.training.loop", "utils", "__main__"])
def test_a_deprecation_in_our_code_is_an_error(module: str, category: type[Warning]) -> None:
    with pytest.raises(category):
        _warn_from(module, category)


@pytest.mark.parametrize("module", ["torch.nn", "modelstore", "utilsome.thing", "numpy"])
def test_a_deprecation_in_the_code_of_others_is_not(module: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        _warn_from(module, DeprecationWarning)
    assert len(caught) <= 1


@pytest.mark.parametrize(("module", "expected"), [("utils.boxes", 1), ("torch.nn", 0)])
def test_scripts_run_under_the_same_rule(module: str, expected: int) -> None:
    code = f"import warnings; warnings.warn_explicit('x', FutureWarning, 'f.py', 1, module={module!r})"
    environment = {**os.environ, "PYTHONPATH": str(STRICT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == expected
