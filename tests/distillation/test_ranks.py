"""Loss and gradient do not depend on how a batch is split over processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("rank_losses.py")
NAMES = (
    "ground truth", "l2", "kl", "objectness", "response", "boxes", "response, little seen",
    "response, hardly seen", "boxes, soft", "response, a class unknown", "objectness, a class unknown",
    "cwd", "pkd", "score-l2",
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Gradients by loss: of one process with the whole batch, and of two with 3 and 2 images."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [(0, 1, "alone.pt"), (0, 2, "first.pt"), (1, 2, "second.pt")]
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(ranks), str(folder / "store"), str(folder / name)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank, ranks, name in runs
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(folder / name, weights_only=True) for _, _, name in runs]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_with_uneven_batches_have_the_gradient_of_one_process(name, found):
    alone, first, second = (gradients[name] for gradients in found)
    for whole, *parts in zip(alone, first, second, strict=True):
        assert float(whole.abs().max()) > 0
        # Sums of a few thousand float32 terms in another order.
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-4)
