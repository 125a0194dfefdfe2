"""Gradients that ranks exchange after the backward pass."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("exchange_on_gpu.py")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ranks_with_cuda_graphs_have_the_gradients_of_those_without(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(tmp_path / "store"), str(tmp_path / f"{rank}.pt")],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for preset, (expected, found) in first.items():
        for name, value in expected.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-2 * scale + 1e-6)
            assert torch.equal(second[preset][1][name], found[name])
