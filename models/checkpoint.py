"""Reading and writing of weight files, all of which goes through this module."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from models.archive import load_content, module_state, plain_value, submodules
from models.common import NORM_EPSILON
from models.config import FOLDER, read_config
from models.inert import Inert, shown, text_items
from models.layers import ACTIVATION_KEYS, ACTIVATIONS
from models.yolo import Model
from utils.config.files import replace_atomically
from utils.errors import UserError

FORMAT, VERSION = "yolov5-distillation", 1
_HALF_LIMIT = 65504.0  # the largest float16
MAX_NAME = 200  # characters of a class's name
_SHOWN = 3
_WRAPPERS = ("module.", "_orig_mod.")  # name prefixes from DataParallel / DDP and torch.compile


@dataclass(frozen=True)
class Checkpoint:
    """The content of a weight file.

    cfg: the network's config, empty if the file has none and no shipped one fits;
    state: tensors by name (floating point as float32), from the EMA if there is one, with batch norms
    unfused; epoch: -1 once training is over; meta: plain values such as training options; source: who
    wrote the file.
    """

    path: Path
    cfg: dict[str, Any]
    state: dict[str, Tensor]
    names: list[str]
    epoch: int = -1
    best_fitness: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    source: Literal["own", "public"] = "own"


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a weight file without executing anything in it.

    Accepts our own files, public YOLOv5 files and state dicts, bare or wrapped. Raises UserError for anything
    else.
    """
    path = Path(path)
    content = load_content(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return _own(content, path)
    return _public(content, path)


def described_by(checkpoint: Checkpoint, cfg: dict[str, Any] | Path | str) -> Checkpoint:
    """Return the checkpoint with `cfg` as its network config, whatever its file says. Raises UserError."""
    content = read_config(cfg, nc=_class_count(checkpoint)).content
    return dataclasses.replace(checkpoint, cfg=content)


def build_model(checkpoint: Checkpoint) -> Model:
    """Build the network of a checkpoint with exactly its weights, anchors and names, in training mode.

    Raises UserError if the weights don't fit the network.
    """
    model, state = _laid_out(checkpoint)
    model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    model.yaml["anchors"] = listed_anchors(model)
    if len(checkpoint.names) == model.nc:
        model.names = list(checkpoint.names)
    return model


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the weights of a checkpoint fit the network that it describes."""
    try:
        check_network(checkpoint)
    except UserError:
        return False
    return True


def check_network(checkpoint: Checkpoint) -> None:
    """Raise UserError if a file's weights don't fit the network that it describes.

    The config of such a file can ask for any amount of memory, its weights only for what the file holds.
    """
    _laid_out(checkpoint)


def _laid_out(checkpoint: Checkpoint) -> tuple[Model, dict[str, Tensor]]:
    """Return the network of a checkpoint on the meta device, and the state dict to load into it."""
    if not checkpoint.cfg:
        fix = "train.py takes its config beside it (--cfg), train_distill.py also a teacher's (--teacher-cfg)"
        raise UserError("it does not say what network it is", checkpoint.path, fix)
    described = {**checkpoint.cfg, "yaml_file": f"network config in {checkpoint.path}"}
    with torch.device("meta"):  # skip allocation and random initialisation: the weights come from the file
        model = Model(described, nc=_class_count(checkpoint))
    wanted = model.state_dict()
    state = {name: value for name, value in checkpoint.state.items() if name in wanted}
    for name, value in wanted.items():
        if name not in state and (name.endswith("num_batches_tracked") or not value.is_meta):
            state[name] = torch.zeros_like(value, device="cpu") if value.is_meta else value
    _check_fit(wanted, state, checkpoint)
    return model, state


def save_checkpoint(
    path: Path, *, model: Model, epoch: int, best_fitness: float | None, meta: Mapping[str, Any]
) -> None:
    """Write the model atomically, as plain values and tensors; loads with `weights_only=True`.

    Floating-point tensors are stored as float16, except anchors and those out of float16's range.
    """
    cfg = {**model.yaml, "nc": model.nc, "anchors": listed_anchors(model)}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "cfg": _plain(cfg),
        "names": list(model.names),
        "stride": [float(stride) for stride in model.stride.tolist()],
        "model": {name: _compact(name, value) for name, value in model.state_dict().items()},
        "epoch": int(epoch),
        "best_fitness": None if best_fitness is None else float(best_fitness),
        "meta": _plain(meta),
    }
    replace_atomically(Path(path), lambda stream: torch.save(content, stream))


def _compact(name: str, value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous().clone()
    if not value.is_floating_point() or name.endswith(".anchors") or not value.numel():
        return value
    return value.half() if value.abs().max() <= _HALF_LIMIT else value.float()


def _plain(value: Any) -> Any:
    """Convert paths, NumPy scalars and containers to plain dicts, lists, numbers and text."""
    if isinstance(value, np.generic):  # first, since np.float64 is a float and would be pickled as NumPy's
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a weight file")


def listed_anchors(model: Model) -> list[list[float]]:
    """Return the model's anchors in px, in the form of a config."""
    return [[round(size, 4) for size in level] for level in model.anchors_px.flatten(1).tolist()]


def _own(content: dict[str, Any], path: Path) -> Checkpoint:
    version = content.get("version")
    if not isinstance(version, int) or not 0 < version <= VERSION:
        told = version if isinstance(version, int) and abs(version) < 10**9 else "unknown"
        raise UserError(f"it is of format version {told}", path, "update this project")
    try:
        # Through plain_value, since a few nested shared lists can expand to more than fits into memory.
        values = {key: plain_value(content[key]) for key in ("cfg", "names", "epoch", "best_fitness", "meta")}
        fitness = values["best_fitness"]
        return Checkpoint(
            path=path,
            cfg=dict(values["cfg"]),
            state=_clean_state(dict(text_items(content["model"])), path),
            names=_listed_names(values["names"]),
            epoch=int(values["epoch"]),
            best_fitness=None if fitness is None else float(fitness),
            meta=dict(values["meta"]),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        fault = f"it is not an intact weight file ({shown(repr(error))})"
        raise UserError(fault, path, "fetch or copy the file again") from error


def _public(content: Any, path: Path) -> Checkpoint:
    """Return the checkpoint in a public file or a saved state dict."""
    holder = content if isinstance(content, dict) else {}
    network = content
    for key in ("ema", "model", "state_dict", "model_state_dict"):
        if isinstance(holder.get(key), dict | Inert):
            network = holder[key]
            break
    if isinstance(network, Inert):
        cfg, names, state = _from_module(_unwrapped(network), path)
    elif isinstance(network, dict) and any(isinstance(value, Tensor) for value in network.values()):
        state = _clean_state(dict(text_items(network)), path)
        run = plain_value(holder.get("run"))  # in a run's state.pt
        told = run if isinstance(run, dict) else {}
        own, names = told.get("network"), _names(holder.get("names", told.get("names")))
        cfg = own if isinstance(own, dict) and own.get("backbone") else _guess_config(state)
    else:
        raise UserError("it holds no network", path, "give weights of this project or public YOLOv5 ones")
    epoch, fitness = plain_value(holder.get("epoch")), plain_value(holder.get("best_fitness"))
    fitness = fitness[0] if isinstance(fitness, list) and fitness else fitness
    known = {"ema", "model", "optimizer", "epoch", "best_fitness", "names"}
    rest = {} if network is holder else {key: value for key, value in text_items(holder) if key not in known}
    return Checkpoint(
        path=path,
        cfg=cfg,
        state=state,
        names=names,
        epoch=epoch if isinstance(epoch, int) else -1,
        best_fitness=float(fitness) if isinstance(fitness, int | float) else None,
        meta=plain_value(rest),
        source="public",
    )


def _unwrapped(record: Inert) -> Inert:
    """Return the network inside a wrapper such as DistributedDataParallel or an EMA, else the record."""
    averaged = record.attributes.get("ema")
    inside = averaged if isinstance(averaged, Inert) else record
    return next((module for module in submodules(inside) if "yaml" in module.attributes), inside)


def _from_module(module: Inert, path: Path) -> tuple[dict[str, Any], list[str], dict[str, Tensor]]:
    """Return config, class names and state dict of a recorded module."""
    cfg = plain_value(module.attributes.get("yaml"))
    state = _clean_state(module_state(module), path)
    if not isinstance(cfg, dict) or not cfg.get("backbone"):
        cfg = _guess_config(state)
    else:
        cfg.update(_activations(module, path))
    return cfg, _names(module.attributes.get("names")), state


# Blocks that end in an activation of their own, and its config key; MixConv2d has none.
_OWN_ACTIVATIONS = {"BottleneckCSP": "csp_activation", "MixConv2d": "MixConv2d"}


def _activations(module: Inert, path: Path) -> dict[str, str]:
    """Return the config entries for the activations of a recorded network; nothing for SiLU."""
    found: dict[str, set[tuple[str, float | None]]] = {}
    for block in submodules(module):
        kind, children = block.kind.rsplit(".", 1)[-1], block.attributes.get("_modules")
        act = children.get("act") if isinstance(children, dict) else None
        key = "activation" if kind.endswith("Conv") else _OWN_ACTIVATIONS.get(kind)
        if key and isinstance(act, Inert) and not act.kind.endswith(".Identity"):
            slope = act.attributes.get("negative_slope")
            entry = (act.kind.rsplit(".", 1)[-1], slope if isinstance(slope, int | float) else None)
            found.setdefault(key, set()).add(entry)
    entries = {}
    for key, kinds in found.items():
        if len(kinds) > 1 or any(name not in ACTIVATIONS for name, _ in kinds):
            names = ", ".join(sorted(name for name, _ in kinds)[:_SHOWN])
            fix = f"a network with one of {', '.join(ACTIVATIONS)} can be read"
            raise UserError(f"its blocks have the activations {names}", path, fix)
        ((name, slope),) = kinds
        if name != "SiLU":
            entries[key] = f"nn.{name}()" if slope is None else f"nn.{name}({slope})"
    for kind in set(entries) - set(ACTIVATION_KEYS):
        fix = f"a network whose {kind} has SiLU can be read"
        raise UserError(f"its {kind} has the activation {entries[kind]}", path, fix)
    return entries


def _clean_state(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Normalise a state dict: our names, float32, batch norms unfused. Raises UserError for bad values."""
    clean: dict[str, Tensor] = {}
    tensors = {
        name: value for name, value in state.items() if isinstance(value, Tensor) and not value.is_sparse
    }
    held = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()
    }
    if sum(value.nbytes for value in tensors.values()) > 2 * sum(held.values()):
        raise UserError(
            "refused: its tensors repeat one another", path, "use weights from a source you trust"
        )
    for name, value in tensors.items():
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
        if name.endswith(".anchor_grid"):  # in v5.0 files: the anchors again, in px
            continue
        value = value.float() if value.is_floating_point() else value
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{shown(name)} is not finite", path, "the training that made it diverged")
        clean[name if name.startswith("model.") else f"model.{name}"] = value
    return _unfused(clean)


def _unfused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every fused convolution a batch norm that only adds its bias, so that it can be trained."""
    for name in [name for name in state if name.endswith(".conv.bias")]:
        norm = name.removesuffix("conv.bias") + "bn."
        if norm + "weight" not in state:
            bias = state.pop(name)
            state[norm + "weight"] = torch.ones_like(bias)
            state[norm + "bias"] = bias
            state[norm + "running_mean"] = torch.zeros_like(bias)
            state[norm + "running_var"] = torch.full_like(bias, 1 - NORM_EPSILON)
    return state


def _names(value: Any) -> list[str]:
    """Return class names from a list, or from a dict keyed by class index."""
    plain = plain_value(value)
    if isinstance(plain, dict) and all(str(key).isdecimal() for key in plain):
        plain = [plain[key] for key in sorted(plain, key=int)]
    return _listed_names(plain) if isinstance(plain, list) else []


def _listed_names(names: Iterable[Any]) -> list[str]:
    """Return names as text of bounded length, "" for what is neither text nor a number."""
    return [str(name)[:MAX_NAME] if isinstance(name, str | int | float) else "" for name in names]


def _class_count(checkpoint: Checkpoint) -> int | None:
    """Return the number of classes of the head, None if it cannot be determined."""
    anchors = checkpoint.cfg.get("anchors")
    if isinstance(anchors, list) and anchors and isinstance(anchors[0], list):
        anchors = len(anchors[0]) // 2
    return _classes_of_head(checkpoint.state, anchors if isinstance(anchors, int) else 3)


def _classes_of_head(state: Mapping[str, Tensor], anchors_per_cell: int) -> int | None:
    index = _head_index(state)
    if index is None:
        return None
    anchors = state.get(f"model.{index}.anchors")
    count = anchors.shape[1] if anchors is not None and anchors.ndim == 3 else anchors_per_cell
    outputs = state[f"model.{index}.m.0.weight"].shape[0]
    return outputs // count - 5 if count and outputs % count == 0 and outputs // count > 5 else None


def _head_index(state: Mapping[str, Tensor]) -> int | None:
    """Return the index of the last layer if it looks like Detect, else None."""
    indices = [int(found[1]) for name in state if (found := re.match(r"model\.(\d{1,4})\.", name))]
    last = max(indices, default=-1)
    weight = state.get(f"model.{last}.m.0.weight")
    return last if weight is not None and weight.ndim else None


def _guess_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the shipped config whose network has exactly these entries, else an empty dict."""
    index, nc = _head_index(state), _classes_of_head(state, 3)
    if index is None or nc is None:
        return {}
    for path in sorted(FOLDER.rglob("*.yaml"), key=lambda path: (len(path.parts), path.name)):
        try:
            content = read_config(path).content
        except UserError:  # a YAML file that is no network config
            continue
        if len(content["backbone"]) + len(content["head"]) != index + 1:
            continue
        with torch.device("meta"):
            model = Model(content, nc=nc)
        if _weight_shapes(model.state_dict()) == _weight_shapes(state):
            return model.yaml
    return {}


def _weight_shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in state.items() if not k.endswith((".anchors", "num_batches_tracked"))}


def _check_fit(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Raise UserError, naming the first mismatches, if the weights don't fit the network."""
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [
        f"{name} is {tuple(state[name].shape)} and the network's is {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    problems += [
        f"{name} is of {state[name].dtype} and the network's of {wanted[name].dtype}"
        for name in wanted
        if name in state and wanted[name].is_floating_point() and not state[name].is_floating_point()
    ]
    problems += [
        f"{name} has sizes that are not above 0"
        for name in wanted
        if name.endswith(".anchors") and name in state and not bool((state[name] > 0).all())
    ]
    problems += [f"{shown(name)} is not in the network" for name in checkpoint.state if name not in wanted]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(
            f"its weights are not those of its network: {'; '.join(problems[:_SHOWN])}{more}",
            checkpoint.path,
            "give the config that belongs to them",
        )
