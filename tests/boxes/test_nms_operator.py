"""torchvision's NMS without torchvision's import."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from script_server import Request, ScriptServer, read_streams

from utils import nms_operator
from utils.nms_operator import nms

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


@dataclass(frozen=True)
class Ended:
    """What is left of a process: its exit code and what it wrote to standard error."""

    code: int
    said: str


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Ended]]:
    """Runs code in a process that has imported torch, and nothing of ours or of torchvision."""
    server = ScriptServer(os.environ, ["torch"])

    def run(code: str) -> Ended:
        folder = tmp_path_factory.mktemp("alone")
        (folder / "code.py").write_text(code)
        request = Request((str(folder / "code.py"),), str(folder), str(ROOT), dict(os.environ))
        return Ended(server.run(request, 300).code, read_streams(folder)[1])

    yield run
    server.close()


def test_scripts_start_without_the_slow_packages(alone: Callable[[str], Ended]) -> None:
    done = alone(LEAN)
    assert done.code == 0, done.said


FAILING = "raise RuntimeError('operator torchvision::nms does not exist')"


@pytest.mark.parametrize(
    ("package", "told"),
    [
        (None, "the package torchvision: is not installed; pip install -r requirements.txt"),
        (FAILING, "the package torchvision: cannot be imported (torchvision cannot be loaded into torch"),
        ("raise AttributeError('partially initialized module')", "cannot be loaded into torch"),
        ("", "file too short"),
    ],
)
def test_a_torchvision_that_is_missing_or_does_not_match_is_told_in_one_line(
    package: str | None, told: str, tmp_path: Path, alone: Callable[[str], Ended]
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
    done = alone(script + "'__main__')")
    assert done.code == 1 and told in done.said, done.said
    assert done.said.count("\n") == 1 and "pip install -r requirements.txt" in done.said


def test_the_operator_is_registered_once_wherever_it_comes_from(
    tmp_path: Path, alone: Callable[[str], Ended]
) -> None:
    """A second registration ends the process, and no exception tells of it."""
    import torchvision

    folder = Path(torchvision.__file__).parent
    library = next(file for file in folder.glob("_C*") if file.suffix in (".so", ".pyd"))
    twice = tmp_path / "torchvision"
    twice.mkdir()
    for name in (library.name, f"_C_of_old{library.suffix}"):
        shutil.copy(library, twice / name)
    (twice / "__init__.py").write_text("")
    use = (
        "from utils.nms_operator import nms; assert nms(torch.eye(4)[:1], torch.ones(1), 0.5).tolist() == [0]"
    )
    in_its_place = "sys.modules['torchvision'] = types.ModuleType('torchvision')"
    for before in (
        f"sys.path.insert(0, {str(tmp_path)!r})",
        f"torch.ops.load_library({str(twice / library.name)!r})",
        "import torchvision",
        f"torch.ops.load_library({str(library)!r}); {in_its_place}",
    ):
        done = alone(f"import sys, torch, types; {before}; {use}")
        assert done.code == 0, done.said


def test_half_precision_is_computed_in_float32() -> None:
    boxes, confidence = (
        torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30]]),
        torch.tensor([0.5, 0.75, 0.25]),
    )
    for dtype in (torch.float16, torch.bfloat16):
        assert nms(boxes.to(dtype), confidence.to(dtype), 0.5).tolist() == [1, 2]
        with torch.autocast("cpu", torch.bfloat16):
            assert nms(boxes.to(dtype), confidence, 0.5).tolist() == [1, 2]


def test_a_torchvision_for_another_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = SimpleNamespace(_cuda_version=lambda: 12060)
    monkeypatch.setattr(nms_operator.torch.ops, "torchvision", operators)
    for cuda, fits in (("12.8", True), (None, True), ("13.0", False)):
        monkeypatch.setattr(nms_operator.torch.version, "cuda", cuda)
        with nullcontext() if fits else pytest.raises(ImportError, match="was built for CUDA 12"):
            nms_operator._check_cuda()
