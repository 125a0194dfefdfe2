"""One rank's part of test_exchange.py: steps on a GPU that two ranks share, with CUDA graphs and without.

python exchange_on_gpu.py RANK STORE OUT
"""

import sys

import torch
import torch.distributed as dist

from benchmarks.step import PROGRESS, Bench
from utils.training.replayed import ReplayedStudent

STEPS = 8


def weights_after(bench, preset, replayed):
    trainer = bench.trainer(distill_loss=preset)
    trainer.amp_dtype = None
    assert trainer.exchange is not None and trainer.parallel is None
    if replayed:
        bench.with_cuda_graphs(trainer)
        assert isinstance(trainer.step.body, ReplayedStudent)
    step = bench.step(trainer, PROGRESS)
    for _ in range(STEPS):
        step()
    return {name: value.cpu() for name, value in trainer.step.model.state_dict().items()}


def main():
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # NCCL refuses two ranks on one GPU.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    bench = Bench("demo-student", "demo-teacher", 64, 4, torch.device("cuda:0"))
    torch.manual_seed(rank)
    bench.batch = bench._batch()
    found = {
        preset: [weights_after(bench, preset, replayed) for replayed in (False, True)]
        for preset in ("response", "boxes")
    }
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
