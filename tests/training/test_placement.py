"""On a device, no tensor of a step is left in main memory, whichever the losses."""

import json
import subprocess
import sys

import pytest
from torch.utils import backend_registration

from tests.training.presets import PRESETS

CASES = [
    *PRESETS, "boxes", "boxes, soft", "larger view", "ordinary step", "unlabelled images",
    "teacher of some classes", "teachers of different classes", "evaluation", "detection",
    "something misplaced",
]  # fmt: skip


@pytest.fixture(scope="module")
def errors():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot pretend a device")
    command = [sys.executable, "-m", "tests.training.pretended"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_everything_is_on_the_device(errors, case):
    assert errors[case] == ""


def test_every_case_is_looked_at(errors):
    assert list(errors) == CASES
