"""A lack of memory in any script: one line that says what needs less."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import compare
import detect
import export
from utils.config.cli import run
from utils.config.options import CompareOptions, DetectOptions, ExportOptions
from utils.device import advice_on_memory
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = str(ROOT / "weights/demo_student.pt")
TOO_MUCH = 1 << 60  # bytes
PIXEL = np.zeros((1, 1, 3), np.uint8)
WORKER = (
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    "RuntimeError: [enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: 9 bytes\n"
)


def use_up(*_: object, **__: object) -> torch.Tensor:
    """Asks torch for more main memory than there can be."""
    return torch.empty(TOO_MUCH, dtype=torch.uint8)


def in_worker() -> None:
    raise RuntimeError(WORKER)


def on_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")


@pytest.mark.parametrize(
    ("work", "where", "what"),
    [
        (use_up, "main memory", "DefaultCPUAllocator: can't allocate memory"),
        (in_worker, "main memory", "DefaultCPUAllocator: can't allocate memory: 9 bytes)"),
        (lambda: np.empty(TOO_MUCH, np.uint8), "main memory", "Unable to allocate"),
        (lambda: cv2.copyMakeBorder(PIXEL, 0, 1 << 30, 0, 1 << 30, 0), "main memory", "Failed to allocate"),
        (on_gpu, "the GPU", "CUDA out of memory. Tried to allocate 20 GiB)"),
    ],
)
def test_a_lack_of_any_memory_says_what_needs_less(work, where: str, what: str) -> None:
    with pytest.raises(UserError) as refusal, advice_on_memory("a smaller --batch-size"):
        work()
    assert str(refusal.value).startswith(f"{where}: out of memory (")
    assert what in str(refusal.value) and str(refusal.value).endswith("; a smaller --batch-size")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), advice_on_memory():
        raise RuntimeError("shapes do not fit")


@pytest.mark.fault(
    "out of memory in `detect.py`, `compare.py` or `export.py`",
    "one-line error naming an option that reduces memory use; exit code 1",
)
@pytest.mark.parametrize(
    ("script", "options", "place", "words", "fix"),
    [
        (detect, DetectOptions, "utils.inference.detector.Detector.start", ["--nosave"], "--imgsz"),
        (export, ExportOptions, "utils.export.run.torchscript_content", [], "--batch-size"),
        (compare, CompareOptions, "utils.comparison.run.run_compare", ["--runs", "x"], "--batch-size"),
    ],
)
def test_every_script_says_so(
    script, options: type, place: str, words: list[str], fix: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(place, use_up)
    if script is not compare:
        words = [*words, "--weights", WEIGHTS, "--source", str(ROOT / "data/images"), "--img", "64"]
    assert run(options, script.main, "", words) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: main memory: out of memory (DefaultCPUAllocator: can't")
    assert line.endswith("needs less") and fix in line
