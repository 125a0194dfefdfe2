"""Reduced precision is used where it says the same as float32."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.yolo import Model
from utils.errors import UserError
from utils.training import precision
from utils.training.precision import agrees, amp_dtype, settle_precision, teacher_dtype


class Net(nn.Module):
    """Logits around zero of a strength that is given."""

    def __init__(self, strength):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 1)
        self.strength = strength

    def forward_features(self, images):
        return (self.body(images),)

    def forward_head(self, features):
        return tuple(self.strength * (feature - feature.mean()) for feature in features)


def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_network_of_moderate_outputs_agrees_and_keeps_its_mode():
    torch.manual_seed(0)
    net = Net(1.0).train()
    assert agrees(net, images(), torch.bfloat16)
    assert net.training and net.body.training


@pytest.mark.fault(
    "bfloat16 outputs that differ from float32 at the start of a run",
    "detected before the first step; the run uses float32, with a warning",
)
def test_a_network_whose_outputs_hang_on_the_last_digits_does_not():
    torch.manual_seed(0)
    assert not agrees(Net(1000.0), images(), torch.bfloat16)


@pytest.mark.fault(
    "NaN outputs in bfloat16",
    "the comparison with float32 fails",
)
def test_outputs_that_are_no_numbers_do_not():
    torch.manual_seed(0)
    assert not agrees(Net(float("nan")), images(), torch.bfloat16)


def test_a_cpu_computes_in_float32_unless_it_is_asked_for_bf16_and_has_it(monkeypatch):
    cpu, able = torch.device("cpu"), {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert amp_dtype(True, "auto", cpu) is None
    for kind in ("bf16", "fp16"):
        with pytest.raises(UserError, match=f"--amp-dtype {kind}"):
            amp_dtype(True, kind, cpu)
    able["avx512_bf16"] = True
    assert amp_dtype(True, "bf16", cpu) is torch.bfloat16
    assert amp_dtype(True, "auto", cpu) is None
    assert amp_dtype(False, "bf16", cpu) is None


def test_beside_a_run_in_float32_teachers_answer_in_bf16_where_the_cpu_has_it(monkeypatch):
    cpu, able = torch.device("cpu"), {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert teacher_dtype(True, "auto", cpu) is None
    able["amx_bf16"] = True
    assert teacher_dtype(True, "auto", cpu) is torch.bfloat16
    assert teacher_dtype(True, "bf16", cpu) is torch.bfloat16
    assert teacher_dtype(False, "auto", cpu) is None


def test_a_network_in_bf16_on_a_cpu_agrees_with_itself_in_float32():
    torch.manual_seed(0)
    assert agrees(Model("models/yolov5n.yaml", nc=3), torch.rand(2, 3, 64, 64), torch.bfloat16)


def trainer_of(kind):
    """As much of a trainer as is asked for, and what its losses are told to compute in."""
    told = []
    step = SimpleNamespace(model=Net(1.0), compute_in=told.append)
    return SimpleNamespace(amp_dtype=kind, step=step, device=torch.device("cpu")), told


def test_a_rank_without_validation_batches_does_not_object_to_reduced_precision():
    trainer, told = trainer_of(torch.bfloat16)
    settle_precision(trainer, {}, torch.bfloat16, [], pytest.fail)
    assert trainer.amp_dtype is torch.bfloat16 and told == [torch.bfloat16]


@pytest.mark.parametrize("others", [True, False])
def test_teachers_of_all_ranks_answer_in_one_precision(others, monkeypatch):
    monkeypatch.setattr(precision, "from_all", lambda mine: [mine, others])
    trainer, told = trainer_of(None)
    settle_precision(trainer, {"teacher": Net(1.0)}, torch.bfloat16, [], pytest.fail)
    assert told == ([torch.bfloat16] if others else []) and trainer.amp_dtype is None


def test_a_plain_run_in_float32_looks_at_no_pictures():
    trainer, told = trainer_of(None)
    settle_precision(trainer, {}, torch.bfloat16, iter(lambda: pytest.fail("asked"), 0), pytest.fail)
    assert told == []
