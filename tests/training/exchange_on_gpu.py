"""One rank's part of test_exchange.py: batches on a GPU that two ranks share, with CUDA graphs and without.

python exchange_on_gpu.py RANK STORE OUT
"""

import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from benchmarks.step import PROGRESS, Bench
from utils.cuda_graphs.capture import WARM_CALLS
from utils.training.replayed import ReplayedStudent


def gradients_after(bench, preset, replayed):
    """The gradients that some batches add up to. Updates would amplify rounding a thousandfold."""
    trainer = bench.trainer(distill_loss=preset)
    trainer.amp_dtype, trainer.schedule = None, replace(trainer.schedule, nominal_batch=10**6)
    assert trainer.exchange is not None and trainer.parallel is None
    if replayed:
        bench.with_cuda_graphs(trainer)
        assert isinstance(trainer.step.body, ReplayedStudent)
    batch = bench.batch.to(bench.device).to_float()
    for _ in range(WARM_CALLS + 2):
        trainer.run_batch(batch, PROGRESS)
    return {name: value.grad.cpu() for name, value in trainer.step.model.named_parameters()}


def main():
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # NCCL refuses two ranks on one GPU.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    bench = Bench("demo-student", "demo-teacher", 64, 4, torch.device("cuda:0"))
    torch.manual_seed(rank)
    bench.batch = bench._batch()
    found = {
        preset: [gradients_after(bench, preset, replayed) for replayed in (False, True)]
        for preset in ("response", "boxes")
    }
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
