"""A device that is not there, to find tensors in the wrong memory: `python -m tests.training.pretended`.

Tensors on it are computed on the CPU, but like those on a GPU they do not mix with tensors in main memory,
not even with indices, for which a GPU would wait.
Runs training steps and an evaluation there and prints {case: error or ""} as JSON. In a process of its own,
since a device cannot be taken away from torch again.
"""

import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.utils.backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.step import PROGRESS, Bench
from models.checkpoint import save_checkpoint
from models.yolo import Model
from tests.training.presets import PRESETS, SAMPLED
from utils.batch import Letterbox
from utils.evaluation.evaluate import EvaluationSettings, evaluate
from utils.inference.hub import ready

NAME = "pretended"
HOME = torch.device("cpu")
# These move values between memories.
TRANSFERS = {"aten::_to_copy", "aten::copy_"}
# A host waits for a device at these: they read values, or only values tell the size of their result.
READING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "bincount"}
waits: list[str] = []
GATHERING = ("stack", "cat", "index", "gather", "scatter")
CASES = PRESETS | {
    "boxes": {"distill_loss": "boxes"},
    "boxes, soft": {"distill_loss": "boxes", "soft_loss": True},
    "larger view": {"distill_loss": "response", "teacher_img_size": 128},
}


# Every operation costs time here, and losses do not care what is in a network.
FEW_LAYERS = {
    "nc": 20, "depth_multiple": 1.0, "width_multiple": 0.125,
    "anchors": [[10, 11, 18, 18, 26, 27], [36, 38, 49, 50, 66, 66], [62, 90, 94, 94, 118, 120]],
    "backbone": [[-1, 1, "Conv", [width, 3, 2]] for width in (64, 128, 256, 512, 1024)],
    "head": [[[2, 3, 4], 1, "Detect", ["nc", "anchors"]]],
}  # fmt: skip


class SmallBench(Bench):
    """A bench of networks with few layers."""

    def _network(self, _name):
        model = Model(FEW_LAYERS, nc=len(self.names))
        model.names = list(self.names)
        return model


class MisplacedError(AssertionError):
    """An operation on tensors in different memories."""


class Pretended(torch.Tensor):
    """A tensor on the device; its values are `held` in main memory."""

    @staticmethod
    def __new__(cls, held):
        place = {"strides": held.stride(), "storage_offset": held.storage_offset(), "layout": held.layout}
        self = cls._make_wrapper_subclass(cls, held.size(), **place, dtype=held.dtype, device=f"{NAME}:0")
        self.held = held
        return self

    def tolist(self):
        waits.append("tolist")
        return self.held.tolist()

    def numpy(self, **_):
        raise MisplacedError("numpy() of a tensor that is not in main memory")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class OnDevice(TorchDispatchMode):
    """Lets tensors be created on the device, and moved there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if Pretended not in types and not is_there(kwargs.get("device")):
            return function(*args, **kwargs)
        return computed(function, args, kwargs)


def is_there(device):
    """Whether this names the pretended device."""
    return device is not None and torch.device(device).type == NAME


def computed(function, args, kwargs):
    """Compute an operation in main memory; its result is where a device would leave it."""
    name = function._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    # As on a GPU, a single number may come from main memory, where it meets each value.
    strict = any(word in name for word in GATHERING)
    elsewhere = [one for one in tensors if not isinstance(one, Pretended) and (strict or one.dim())]
    if there and elsewhere and name not in TRANSFERS:
        raise MisplacedError(f"{name} of {[(tensor.device.type, tuple(tensor.shape)) for tensor in tensors]}")
    plain = tree_map(lambda leaf: leaf.held if isinstance(leaf, Pretended) else leaf, (args, kwargs))
    asked = kwargs.get("device")
    asked_for = is_there(asked)
    lands = asked_for if asked is not None else bool(there)
    if name == "aten::copy_":
        lands = isinstance(args[0], Pretended)
    if there and is_waited_for(name, args, kwargs, lands):
        waits.append(name)
    out = function(*plain[0], **plain[1] | ({"device": HOME} if asked_for else {}))
    if lands:
        out = tree_map(lambda leaf: Pretended(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)
    return return_and_correct_aliasing(function, args, kwargs, out) if there else out


def is_waited_for(name, args, kwargs, lands):
    """Whether a host waits for an operation on tensors of the device."""
    if name in TRANSFERS:
        given = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
        return not lands and not given
    indices = args[1] if name in {"aten::index", "aten::index_put_", "aten::_index_put_impl_"} else ()
    by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
    return by_mask or name.removeprefix("aten::") in READING


class DeviceModule(registration._DummyBackendModule):
    """What torch asks of a device."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def current_device(self):
        return 0

    def device_count(self):
        return 1


def install():
    """Register the device with torch."""
    registration._setup_privateuseone_for_python_backend(NAME, DeviceModule())
    # Without this, moving a module keeps its parameters and changes their data, to another class.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    library = torch.library.Library("aten", "IMPL")

    def empty_strided(size, stride, *, dtype=None, **_):
        return Pretended(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, _waits=False):
        target.held.copy_(source.held if isinstance(source, Pretended) else source)
        return target

    # For what torch creates without asking a mode: indices from lists.
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    create = torch.tensor

    def tensor(data, *, device=None, **others):
        made = create(data, device=None if is_there(device) else device, **others)
        return made.to(device) if is_there(device) else made

    torch.tensor = tensor
    return library


def specialist(bench, first, last):
    """A weight file of a teacher that knows only some of the classes."""
    model = Model(FEW_LAYERS, nc=last - first)
    model.names = list(bench.names[first:last])
    path = Path(bench.folder.name) / f"knows_{first}_to_{last}.pt"
    save_checkpoint(path, model=bench._seeing(model), epoch=0, best_fitness=0.0, meta={})
    return str(path)


def step(bench, batch=None, kinds=(SAMPLED,), **options):
    """Steps with their updates; those of the kind SAMPLED also measure gradients."""
    trainer, batch = bench.trainer(**options), bench.batch if batch is None else batch
    for progress in kinds:
        here = batch.to(bench.device).to_float()
        waits.clear()
        terms = trainer.run_batch(here, progress)
        # Only the detections of the preset `boxes` have to be read, those of all images at once.
        assert len(waits) == (options.get("distill_loss") == "boxes"), waits
        trainer.meters.update(terms)
        trainer.guard.check(here, progress, terms)
        trainer.guard.restore_buffers()
    assert all(isinstance(value, Pretended) for value in trainer.step.parameters())
    kept = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert kept and all(isinstance(value, Pretended) for value in kept if value is not None)
    assert isinstance(next(trainer.ema.model.parameters()), Pretended)


def evaluation(bench):
    """An evaluation of a network that detects something."""
    model = bench._seeing(bench._network("demo-teacher")).to(bench.device)
    side = bench.size
    boxes = tuple(Letterbox((side, side), (1.0, 1.0), (0.0, 0.0)) for _ in range(bench.count))
    batch = replace(bench.batch, letterboxes=boxes, paths=("a", "b"))
    for settings in (EvaluationSettings(), EvaluationSettings(augment=True)):
        assert evaluate(model, [batch], names=bench.names, settings=settings).images == bench.count


def detection(bench):
    """Detection by the model of hubconf.py, with and without test-time augmentation."""
    hub = ready(bench._seeing(bench._network("demo-teacher")), device="cpu")
    hub.model.to(bench.device)
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    for augment in (False, True):
        assert len(hub([image, image], size=64, augment=augment)) == 2


def misplaced(bench):
    """What has to be found."""
    values = torch.rand(4, device=bench.device)
    for wrong in (
        lambda: values + torch.rand(4),
        lambda: values[torch.tensor([1, 2])],
        lambda: torch.stack([values.sum(), torch.tensor(1.0)]),
    ):
        try:
            wrong()
        except MisplacedError:
            continue
        raise AssertionError("nothing was found")


def cases():
    """Every case by name, a function of a bench."""
    found = {name: lambda bench, options=options: step(bench, **options) for name, options in CASES.items()}

    found["ordinary step"] = lambda bench: step(bench, kinds=(PROGRESS,), distill_loss="response")

    def half_labelled(bench):
        batch = replace(bench.batch, labelled=torch.tensor([True, False]))
        step(bench, batch, distill_loss="response")

    found["unlabelled images"] = half_labelled
    found["teacher of some classes"] = lambda bench: step(
        bench, distill_loss="response", teacher=(bench.known["some"],)
    )
    found["teachers of different classes"] = lambda bench: step(
        bench, distill_loss="response", teacher=(bench.known["some"], bench.known["others"])
    )
    found["evaluation"] = evaluation
    found["detection"] = detection
    found["something misplaced"] = misplaced
    return found


def main():
    small, usual = (kind("demo-student", "demo-teacher", 64, 2, HOME) for kind in (SmallBench, Bench))
    small.known = {"some": specialist(small, 0, 12), "others": specialist(small, 8, 20)}
    library, errors = install(), {}
    small.device = usual.device = torch.device(f"{NAME}:0")
    for name, run in cases().items():
        try:
            with OnDevice():
                run(usual if name in ("ordinary step", "evaluation", "detection") else small)
            errors[name] = ""
        except Exception:
            errors[name] = traceback.format_exc()
    assert library is not None  # what is registered lives as long as this
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
