"""Data-parallel training: two processes make the steps of one with the same images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.distributed import joined_ranks
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("rank_step.py")


@pytest.mark.fault(
    "a smaller last batch, images without objects or without labels, on two ranks",
    "losses and gradients match those of a single process with the same batches",
)
def test_two_ranks_have_the_losses_and_gradients_of_one_process(tmp_path):
    """Distillation with features, an uneven last batch, images without objects and without labels.

    The gradients are exchanged within the backward pass, or after it as with CUDA graphs.
    """
    pairs = {how: [(rank, 2, f"{how} {rank}.pt", how) for rank in (0, 1)] for how in ("within", "exchange")}
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(ranks), tmp_path / f"store {how}", tmp_path / name, how],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT,
            stderr=subprocess.PIPE, text=True,
        )
        for rank, ranks, name, how in ((0, 1, "alone.pt", "within"), *pairs["within"], *pairs["exchange"])
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    alone = torch.load(tmp_path / "alone.pt", weights_only=True)
    assert alone["names"][6:] == ["distill_feature", "distill_grad_ratio"]
    assert any("projections" in name for name in alone["gradients"])
    for pair in pairs.values():
        check(alone, *(torch.load(tmp_path / name, weights_only=True) for _, _, name, _ in pair))


def check(alone, first, second):
    """Sums of float32 in another order; losses are compared to six digits, gradients to four."""
    torch.testing.assert_close(first["losses"][:, :7], alone["losses"][:, :7], atol=1e-8, rtol=1e-5)
    torch.testing.assert_close(first["losses"][:, 7], alone["losses"][:, 7], atol=1e-8, rtol=1e-4)
    assert set(alone["gradients"]) == set(first["gradients"])
    for name, wanted in alone["gradients"].items():
        scale = float(wanted.abs().max())
        torch.testing.assert_close(first["gradients"][name], wanted, atol=1e-4 * scale, rtol=1e-4)
        assert torch.equal(first["gradients"][name], second["gradients"][name])


def test_variables_that_another_program_has_left_are_named(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR: is not set, although .*; start it with torchrun"):
        with joined_ranks():
            pytest.fail("went on")
