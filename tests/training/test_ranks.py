"""Data-parallel training: two processes make the steps of one with the same images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("rank_step.py")


@pytest.mark.fault(
    "a smaller last batch, images without objects or without labels, on two ranks",
    "losses and gradients match those of a single process with the same batches",
)
@pytest.mark.parametrize("how", ["", "exchange"])
def test_two_ranks_have_the_losses_and_gradients_of_one_process(tmp_path, how):
    """Distillation with features, an uneven last batch, images without objects and without labels."""
    runs = [(0, 1, "alone.pt"), (0, 2, "first.pt"), (1, 2, "second.pt")]
    store = str(tmp_path / "store")
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(ranks), store, str(tmp_path / name)]
            + ([how] if how and ranks > 1 else []),
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT,
            stderr=subprocess.PIPE, text=True,
        )
        for rank, ranks, name in runs
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    alone, first, second = (torch.load(tmp_path / name, weights_only=True) for _, _, name in runs)
    # Sums of float32 in another order; losses are compared to six digits, gradients to four.
    assert alone["names"][6:] == ["distill_feature", "distill_grad_ratio"]
    torch.testing.assert_close(first["losses"][:, :7], alone["losses"][:, :7], atol=1e-8, rtol=1e-5)
    torch.testing.assert_close(first["losses"][:, 7], alone["losses"][:, 7], atol=1e-8, rtol=1e-4)
    assert set(alone["gradients"]) == set(first["gradients"])
    assert any("projections" in name for name in alone["gradients"])
    for name, wanted in alone["gradients"].items():
        scale = float(wanted.abs().max())
        torch.testing.assert_close(first["gradients"][name], wanted, atol=1e-4 * scale, rtol=1e-4)
        assert torch.equal(first["gradients"][name], second["gradients"][name])
