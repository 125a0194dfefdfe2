"""torchvision's NMS without torchvision's import."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LEAN = """
import sys
import utils.evaluation.run, utils.export.run, utils.inference.run, utils.training.run
slow = [name for name in ("torchvision", "torch._dynamo", "sympy", "matplotlib") if name in sys.modules]
assert not slow, slow
import torch
from utils.nms_operator import nms
from torchvision.ops import nms as torchvisions  # its library is there already
for seed in range(20):
    torch.manual_seed(seed)
    corners, confidence = torch.rand(200, 4) * 100, torch.rand(200)
    boxes = torch.cat((corners[:, :2], corners[:, :2] + corners[:, 2:]), 1)
    assert torch.equal(nms(boxes, confidence, 0.3), torchvisions(boxes, confidence, 0.3))
"""


def test_scripts_start_without_the_slow_packages() -> None:
    done = subprocess.run([sys.executable, "-c", LEAN], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("package", "told"),
    [
        (None, "the package torchvision: is not installed"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "does not match torch"),
        ("", "does not match torch"),
    ],
)
def test_a_torchvision_that_is_missing_or_does_not_match_is_told_in_one_line(
    package: str | None, told: str, tmp_path: Path
) -> None:
    first = "sys.modules['torchvision'] = None"
    if package is not None:
        first = f"sys.path.insert(0, {str(tmp_path)!r})"
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision/__init__.py").write_text(package)
        # Not a library of this torch, whatever its name says.
        (tmp_path / "torchvision/_C.so").write_text("nothing")
    script = (
        f"import runpy, sys; {first}; sys.argv[1:] = ['--source', '.']; runpy.run_path('detect.py', {{}}, "
    )
    script += "'__main__')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and told in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "pip install -r requirements.txt" in done.stderr
