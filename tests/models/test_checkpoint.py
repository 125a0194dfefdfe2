"""Weight files of our own: written, read, built from, transferred."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from models import checkpoint as files
from models.checkpoint import build_model, described_by, read_checkpoint, save_checkpoint
from models.places import resolve_weights
from models.transfer import transfer_weights
from models.yolo import Model
from utils.errors import UserError

NAMES = ["cat", "dog", "bird"]


def trained(cfg="yolov5n.yaml", nc=3, seed=0):
    """A network whose every entry is its own: norms too, as after training."""
    torch.manual_seed(seed)
    model = Model(cfg, nc=nc)
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "bn.bias")):
            value.normal_(0, 0.2)
        elif name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 1.5)
        elif name.endswith("num_batches_tracked"):
            value.fill_(7)
    model.names = NAMES[:nc]
    return model


def halved(model):
    """The network after a trip through float16, which is all that a file may lose."""
    model = copy.deepcopy(model)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not name.endswith("anchors"):
            value.copy_(value.half().float())
    return model


def save(path, model, **changes):
    settings = {"epoch": 5, "best_fitness": 0.25, "meta": {"options": {"batch": 16}}} | changes
    save_checkpoint(path, model=model, **settings)
    return path


def assert_same_state(model, other):
    wanted = other.state_dict()
    assert list(model.state_dict()) == list(wanted)
    for name, value in model.state_dict().items():
        assert value.dtype == wanted[name].dtype and torch.equal(value, wanted[name]), name


def test_what_is_saved_comes_back(tmp_path):
    model = trained()
    model.head.anchors *= 1.2345678  # as AutoAnchor would: no cfg knows these
    saved = read_checkpoint(save(tmp_path / "a.pt", model))
    assert (saved.source, saved.epoch, saved.best_fitness) == ("own", 5, 0.25)
    assert saved.names == NAMES and saved.meta == {"options": {"batch": 16}}
    assert all(value.dtype in (torch.float32, torch.int64) for value in saved.state.values())
    again = build_model(saved)
    assert_same_state(again, halved(model))
    assert torch.equal(again.head.anchors, model.head.anchors)
    assert again.names == NAMES and torch.equal(again.stride, model.stride)
    assert again.yaml["anchors"][0][0] == pytest.approx(10 * 1.2345678, abs=1e-4)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.eval()(images)[0], halved(model).eval()(images)[0])


def test_a_file_holds_only_plain_values_and_small_tensors(tmp_path):
    meta = {"folder": Path("runs"), "score": np.float64(0.5), "sizes": (1, 2), 3: None}
    path = save(tmp_path / "a.pt", trained(), best_fitness=np.float32(0.5), meta=meta)
    content = torch.load(path, weights_only=True)
    assert content["format"] == "yolov5-distillation" and content["version"] == 1
    assert content["meta"] == {"folder": "runs", "score": 0.5, "sizes": [1, 2], "3": None}
    assert type(content["best_fitness"]) is float
    floats = {name: v.dtype for name, v in content["model"].items() if v.is_floating_point()}
    assert {name for name, dtype in floats.items() if dtype != torch.float16} == {"model.24.anchors"}
    assert path.stat().st_size < 2 * 1.9e6 + 2e5
    with pytest.raises(TypeError, match="object has no place in a weight file"):
        save(tmp_path / "b.pt", trained(), meta={"bad": object()})


def test_values_that_float16_cannot_hold_stay_as_they_are(tmp_path):
    model = trained()
    model.model[0].bn.running_var.fill_(1e6)
    again = build_model(read_checkpoint(save(tmp_path / "a.pt", model)))
    assert again.model[0].bn.running_var.tolist() == [1e6] * 16


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(tmp_path / "a.pt", trained())
    before = path.read_bytes()

    def broken(content, stream):
        stream.write(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.torch, "save", broken)
    with pytest.raises(UserError, match="No space left"):
        save(path, trained(seed=1))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


def test_models_of_one_checkpoint_share_no_memory(tmp_path):
    saved = read_checkpoint(save(tmp_path / "a.pt", trained()))
    first, second = build_model(saved), build_model(saved)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert_same_state(second, build_model(saved))
    assert all(p.requires_grad and p.is_leaf for p in first.parameters())


def test_a_channels_last_and_a_fused_model_can_be_saved(tmp_path):
    model = trained().eval()
    images = torch.rand(1, 3, 64, 64)
    laid_out = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert_same_state(build_model(read_checkpoint(save(tmp_path / "a.pt", laid_out))), halved(model))
    fused = build_model(read_checkpoint(save(tmp_path / "b.pt", copy.deepcopy(model).fuse())))
    assert list(fused.state_dict()) == list(model.state_dict())  # it has norms again and can be trained
    with torch.no_grad():
        # fused weights in float16 round otherwise than the two factors do
        torch.testing.assert_close(fused.eval()(images)[0], model(images)[0], rtol=2e-2, atol=2)


def test_entries_that_agree_are_transferred_and_the_rest_stays(tmp_path):
    source, target = trained(), Model("yolov5n.yaml", nc=2)
    before = copy.deepcopy(target)
    matched, total = transfer_weights(target, read_checkpoint(save(tmp_path / "a.pt", source)))
    assert (matched, total) == (343, 349)  # all but weight and bias of three head convolutions
    wanted = halved(source).state_dict()
    for name, value in target.state_dict().items():
        is_head = name.startswith("model.24.m.")
        assert torch.equal(value, (before.state_dict() if is_head else wanted)[name]), name


def test_anchors_are_transferred_unless_they_are_the_users(tmp_path):
    source = trained()
    source.head.anchors *= 2
    saved = read_checkpoint(save(tmp_path / "a.pt", source))
    target = Model("yolov5n.yaml", nc=3)
    own = target.head.anchors.clone()
    assert transfer_weights(target, saved, exclude_anchors=True) == (348, 349)
    assert torch.equal(target.head.anchors, own) and target.yaml["anchors"][0][:2] == [10, 13]
    assert transfer_weights(target, saved) == (349, 349)
    assert torch.equal(target.head.anchors, own * 2) and target.yaml["anchors"][0][:2] == [20, 26]


def test_a_transfer_between_sizes_takes_little_and_breaks_nothing(tmp_path):
    saved = read_checkpoint(save(tmp_path / "a.pt", trained()))
    matched, total = transfer_weights(Model("yolov5s.yaml", nc=3), saved)
    assert 0 < matched < 120 and total == 349


@pytest.mark.parametrize("cfg", ["yolov5n.yaml", "v5.0/yolov5n.yaml", "hub/yolov3-tiny.yaml"])
@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s, "names": NAMES}, lambda s: {"state_dict": s}]
)
def test_a_state_dict_alone_is_recognised(tmp_path, cfg, wrap):
    model = trained(cfg)
    model.head.anchors *= 1.5
    torch.save(wrap(model.state_dict()), tmp_path / "bare.pt")
    saved = read_checkpoint(tmp_path / "bare.pt")
    assert saved.source == "public" and saved.epoch == -1
    again = build_model(saved)
    assert_same_state(again, model)
    assert again.names == (NAMES if saved.names else ["class0", "class1", "class2"])


def test_names_of_wrapped_and_fused_state_dicts_are_understood(tmp_path):
    model = trained().eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(images)[0]
    parallel = {f"module.{name}": value for name, value in model.state_dict().items()}
    inner = {name.removeprefix("model."): value.half() for name, value in model.state_dict().items()}
    old = {**model.state_dict(), "model.24.anchor_grid": torch.ones(3, 1, 3, 1, 1, 2)}
    without_counts = {n: v for n, v in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    fused = copy.deepcopy(model).fuse().state_dict()
    for state in (parallel, old, without_counts, fused, inner):
        torch.save(state, tmp_path / "bare.pt")
        again = build_model(read_checkpoint(tmp_path / "bare.pt")).eval()
        with torch.no_grad():
            tolerance = {"rtol": 2e-2, "atol": 2} if state is inner else {"rtol": 1e-3, "atol": 1e-2}
            torch.testing.assert_close(again(images)[0], wanted, **tolerance)


def test_the_average_goes_before_the_model(tmp_path):
    model, average = trained(seed=0), trained(seed=1)
    torch.save({"model": model.state_dict(), "ema": average.state_dict()}, tmp_path / "a.pt")
    assert_same_state(build_model(read_checkpoint(tmp_path / "a.pt")), average)
    torch.save({"model": model.state_dict(), "ema": None}, tmp_path / "a.pt")
    assert_same_state(build_model(read_checkpoint(tmp_path / "a.pt")), model)


def test_the_state_of_a_run_names_the_network_and_its_classes(tmp_path):
    model = trained(seed=0)
    run = {"network": dict(model.yaml), "names": [f"kind {n}" for n in range(model.nc)], "epoch": 3}
    torch.save({"version": 1, "run": run, "ema": model.state_dict(), "optimizer": {}}, tmp_path / "state.pt")
    checkpoint = read_checkpoint(tmp_path / "state.pt")
    assert checkpoint.names == run["names"] and checkpoint.cfg["backbone"] == model.yaml["backbone"]
    assert_same_state(build_model(checkpoint), model)


def test_an_unknown_network_needs_its_config(tmp_path):
    cfg = yaml.safe_load((files.FOLDER / "yolov5n.yaml").read_text()) | {"width_multiple": 0.375, "nc": 80}
    (tmp_path / "wide.yaml").write_text(yaml.safe_dump(cfg))
    model = trained(cfg)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    saved = read_checkpoint(tmp_path / "bare.pt")
    assert saved.cfg == {}
    with pytest.raises(UserError, match=r"bare\.pt: it does not say what network it is; .*--cfg"):
        build_model(saved)
    described = described_by(saved, tmp_path / "wide.yaml")
    assert described.cfg["nc"] == 3
    assert_same_state(build_model(described), model)


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    saved = read_checkpoint(save(tmp_path / "a.pt", trained()))
    with pytest.raises(UserError, match=r"a\.pt: its weights .* model\.0\.conv\.weight is \(16, 3, 6, 6\)"):
        build_model(described_by(saved, "yolov5s.yaml"))
    with pytest.raises(UserError, match=r"not those of its network: .* is missing"):
        build_model(described_by(saved, "hub/yolov5n6.yaml"))


def test_broken_weights_are_refused(tmp_path):
    model = trained()
    with torch.no_grad():
        model.model[3].conv.weight[0, 0, 0, 0] = float("nan")
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(UserError, match=r"model\.3\.conv\.weight is not finite"):
        read_checkpoint(tmp_path / "bare.pt")


def test_files_that_are_no_weights_are_refused(tmp_path):
    good = save(tmp_path / "good.pt", trained()).read_bytes()
    wrong = {
        "empty.pt": (b"", "the file is empty"),
        "text.pt": (b"hello, I am a text file\n" * 9, "it is not a weight file"),
        "cut.pt": (good[: len(good) // 2], "damaged or cut off"),
        "begun.pt": (good[:100], "damaged or cut off"),
        "zip.pt": (b"PK\x05\x06" + bytes(18), "no data.pkl"),
        "legacy.pt": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "format before 1.6"),
    }
    for name, (content, message) in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            read_checkpoint(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(UserError, match="Is a directory|cannot be read"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        read_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, "text", {"model": {"a": 1}}, {"format": "other"}])
def test_a_file_without_a_network_says_so(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"odd\.pt: it holds no network"):
        read_checkpoint(tmp_path / "odd.pt")


def test_files_of_a_newer_format_and_damaged_ones_are_refused(tmp_path):
    content = torch.load(save(tmp_path / "a.pt", trained()), weights_only=True)
    torch.save({**content, "version": 2}, tmp_path / "new.pt")
    with pytest.raises(UserError, match="format version 2; update this project"):
        read_checkpoint(tmp_path / "new.pt")
    del content["cfg"]
    torch.save(content, tmp_path / "less.pt")
    with pytest.raises(UserError, match="not an intact weight file"):
        read_checkpoint(tmp_path / "less.pt")


def test_weights_are_found_as_given_or_in_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for name in ("mine.pt", "weights/yolov5n.pt", "weights/yolov5s.pt"):
        (tmp_path / name).touch()
    assert resolve_weights("mine.pt") == Path("mine.pt")
    assert resolve_weights("yolov5n.pt") == Path("weights/yolov5n.pt")
    assert resolve_weights("weights/yolov5s.pt") == Path("weights/yolov5s.pt")
    with pytest.raises(
        UserError, match=r"yolov5m\.pt: no such weight file \(looked for .*; did you mean weights/yolov5"
    ):
        resolve_weights("yolov5m.pt")


@pytest.mark.fault(
    "a weight file that does not exist, while `weights/` has one of the same name",
    "an error that suggests that file; it is never used silently",
)
def test_a_file_of_the_same_name_elsewhere_is_proposed_and_never_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "models.places.FOLDER", tmp_path / "project/models"
    )  # whoever's own weights lie there
    (tmp_path / "weights").mkdir()
    for name in ("yolov5s.pt", "best.pt"):
        (tmp_path / "weights" / name).touch()
    for name in ("nowhere/yolov5s.pt", tmp_path / "mine/yolov5s.pt", "runs/train/exp/weights/best.pt"):
        with pytest.raises(
            UserError, match=rf"^{name}: no such weight file; did you mean weights/{Path(name).name}\?"
        ):
            resolve_weights(name, download=True)


def test_a_name_without_its_suffix_gets_the_name_with_it_proposed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    with pytest.raises(UserError, match=r"did you mean yolov5x6\.pt\?"):
        resolve_weights("yolov5x6", download=True)
    (tmp_path / "mine.pt").touch()
    with pytest.raises(UserError, match=r"did you mean mine\.pt\?"):
        resolve_weights("mine")


@pytest.mark.fault(
    "a weight file whose weights are whole numbers, or whose anchors are negative",
    "refused with the name of the tensor",
)
@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (
            "model.0.conv.weight",
            lambda value: value.long(),
            "is of torch.int64 and the network",
        ),
        ("model.0.bn.weight", lambda value: value > 0, "is of torch.bool"),
        ("model.24.anchors", lambda value: -value, "has sizes that are not above 0"),
    ],
)
def test_weights_that_no_network_can_have_are_refused(tmp_path, name, change, told):
    content = torch.load(save(tmp_path / "a.pt", trained()), weights_only=True)
    content["model"][name] = change(content["model"][name])
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(UserError, match=rf"b\.pt: its weights .*{name} {told}"):
        build_model(read_checkpoint(tmp_path / "b.pt"))
