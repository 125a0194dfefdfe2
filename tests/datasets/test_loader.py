"""Batches as training and evaluation get them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import utils.datasets.loader as loader_module
import utils.datasets.store as store_module
from utils.batch import Batch
from utils.datasets.index import DatasetIndex
from utils.datasets.loader import AugmentSettings, TrainLoader, eval_loader, train_loader
from utils.datasets.sampling import TrainingOrder
from utils.errors import UserError

STRONG = AugmentSettings(
    hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, degrees=10, translate=0.1, scale=0.5, shear=2, perspective=0.0003,
    flipud=0.5, fliplr=0.5, mosaic=0.7, mixup=0.5,
)  # fmt: skip
PLAIN = AugmentSettings(translate=0.1, scale=0.5, fliplr=0.5, mosaic=1.0)
COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220)]


@pytest.fixture
def index(tmp_path: Path) -> DatasetIndex:
    """Eleven grey images of several sizes, up to three coloured rectangles each; the last is unlabelled."""
    rng = np.random.default_rng(0)
    paths, labels, sizes = [], [], []
    for number in range(11):
        width, height = [(96, 72), (72, 96), (64, 64), (200, 150)][number % 4]
        image = np.full((height, width, 3), 120, np.uint8)
        rows = []
        for colour in range(number % 4):
            left = colour * width // 3
            x1, y1 = left + int(rng.integers(0, 5)), int(rng.integers(0, height // 2))
            x2, y2 = (
                left + width // 3 - int(rng.integers(0, 5)),
                y1 + int(rng.integers(height // 4, height // 2)),
            )
            image[y1:y2, x1:x2] = COLOURS[colour][::-1]
            rows.append(
                [colour, (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
            )
        path = tmp_path / f"{number:02d}.png"
        cv2.imwrite(str(path), image)
        paths.append(str(path))
        labels.append(np.array(rows, np.float32).reshape(-1, 5))
        sizes.append((width, height))
    labelled = np.arange(11) < 10
    return DatasetIndex(paths, labels, np.array(sizes), labelled, [], ["red", "green", "blue"])


def make(index: DatasetIndex, workers: int = 0, seed: int = 0, augment=STRONG, **kwargs) -> TrainLoader:
    return train_loader(
        index, image_size=64, batch_size=4, augment=augment, workers=workers, seed=seed, **kwargs
    )


def assert_equal(ones: list[Batch], others: list[Batch]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(one.labelled, other.labelled)
        assert one.paths == other.paths


def test_batches_are_a_pure_function_of_seed_and_epoch_whatever_the_workers(index):
    alone, shared = make(index), make(index, workers=2)
    epochs = []
    for epoch in (0, 1, 0):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        epochs.append(list(alone))
        assert_equal(epochs[-1], list(shared))
    assert_equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0][0].images, epochs[1][0].images)
    assert not torch.equal(epochs[0][0].images, next(iter(make(index, seed=1))).images)


def test_a_batch_has_the_promised_shapes_and_memory_order(index):
    loader = make(index)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [len(batch.images) for batch in batches] == [4, 4, 3]
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape[1:] == (3, 64, 64)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert (batch.targets.dtype, batch.targets.shape[1]) == (torch.float32, 6)
        assert batch.letterboxes == ()
        assert [bool(flag) for flag in batch.labelled] == [
            not path.endswith("10.png") for path in batch.paths
        ]
        boxes = batch.targets[:, 2:]
        assert (
            (boxes[:, :2] - boxes[:, 2:] / 2 > -1e-6) & (boxes[:, :2] + boxes[:, 2:] / 2 < 1 + 1e-6)
        ).all()
        assert (batch.targets[:, 0] == batch.targets[:, 0].sort().values).all()


@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_the_middle_of_every_box_has_the_colour_of_its_class(index, mosaic, rect):
    settings = replace(PLAIN, mosaic=mosaic, flipud=0.5)
    count = 0
    for epoch in range(3):
        loader = make(index, augment=settings, rect=rect)
        loader.set_epoch(epoch)
        for batch in loader:
            height, width = batch.images.shape[2:]
            for place, name, cx, cy, *_ in batch.targets.tolist():
                found = batch.images[int(place), :, int(cy * height), int(cx * width)].tolist()
                assert np.abs(np.subtract(found, COLOURS[int(name)])).max() < 12
                count += 1
    assert count > 30


def test_a_mixture_shows_two_mosaics_and_has_the_boxes_of_both(index, monkeypatch):
    """With a share of one or none it shows a single mosaic, of those that it otherwise blends."""

    def batch(share: float) -> Batch:
        monkeypatch.setattr("utils.datasets.samples.mixup_share", lambda _: share)
        augment = replace(PLAIN, mixup=1.0)
        return next(
            iter(train_loader(index, image_size=96, batch_size=8, augment=augment, workers=0, seed=3))
        )

    first, second, both = batch(1.0), batch(0.0), batch(0.25)
    assert torch.equal(first.targets, both.targets) and torch.equal(second.targets, both.targets)
    blend = 0.25 * first.images.float() + 0.75 * second.images.float()
    assert (both.images.float() - blend).abs().max() <= 0.5
    shown = [set(), set()]
    for number, target in enumerate(both.targets.tolist()):
        place, label = int(target[0]), int(target[1])
        x, y = (int(value * 96) for value in target[2:4])
        for seen, one in zip(shown, (first, second), strict=True):
            if one.images[place, :, y, x].argmax() == label and one.images[place, label, y, x] > 160:
                seen.add(number)
    assert shown[0] | shown[1] == set(range(len(both.targets)))
    assert shown[0] - shown[1] and shown[1] - shown[0]


def test_rect_training_uses_little_padding_and_every_picture_once(index):
    batches = list(make(index, augment=AugmentSettings(), rect=True))
    assert sorted(path for batch in batches for path in batch.paths) == sorted(index.paths)
    for batch in batches:
        height, width = batch.images.shape[2:]
        assert height % 32 == width % 32 == 0
        assert max(height, width) == 64


@pytest.mark.parametrize("cache", ["ram", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_pictures_give_the_same_batches(index, cache, workers, cache_folder):
    loader = make(index, workers, cache=cache)
    assert "11 images cached" in loader.notes[0]
    assert_equal(list(loader), list(make(index)))
    assert sorted(path.suffix for path in cache_folder.rglob("*") if path.is_file()) == [".raw"] * (
        cache == "disk"
    )


def test_a_disk_cache_is_used_again_and_never_for_other_pictures(index, monkeypatch):
    first = list(make(index, cache="disk"))
    with monkeypatch.context() as patch:
        patch.setattr(store_module.ImageStore, "_all", lambda self: pytest.fail("made again"))
        assert_equal(list(make(index, cache="disk")), first)
    for path in index.paths:
        cv2.imwrite(path, 255 - cv2.imread(path))
    assert_equal(list(make(index, cache="disk")), list(make(index)))


def test_pictures_are_not_cached_where_memory_or_disk_is_short(index, monkeypatch):
    monkeypatch.setattr(store_module, "free_memory", lambda: 1000)
    loader = make(index, cache="ram")
    assert "not cached in memory" in loader.notes[0]
    monkeypatch.setattr(store_module, "free_bytes", lambda folder: 1000)
    loader_on_disk = make(index, cache="disk")
    assert "not cached on disk" in loader_on_disk.notes[0]
    assert_equal(list(loader), list(loader_on_disk))


def test_free_memory_is_a_plausible_number_of_bytes():
    free = store_module.free_memory()
    assert free is None or 2**20 < free < 2**50


@pytest.mark.fault(
    "an image becomes unreadable after an evaluation has started",
    "one-line error naming the file, rather than a score over fewer images",
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_goes_away_in_an_evaluation_is_named_in_one_line(index, workers):
    Path(index.paths[3]).write_bytes(b"")
    loader = eval_loader(index, image_size=64, batch_size=4, workers=workers)
    # Not pytest.raises: what it keeps would keep the workers.
    try:
        list(loader)
        message = "no error"
    except UserError as error:
        message = str(error)
    assert message.startswith(f"{index.paths[3]}: ")
    assert "\n" not in message


LOSSES = {
    "vanished": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.fault(
    "a training image vanishes, is emptied or truncated, or becomes a named pipe mid-run",
    "another image takes its place; one warning per file, with the number lost so far",
)
@pytest.mark.parametrize(("way", "rect"), [*((way, False) for way in LOSSES), ("vanished", True)])
def test_a_picture_that_goes_away_in_training_is_replaced_and_told_once(index, way, rect, capfd):
    LOSSES[way](Path(index.paths[3]))
    settings = replace(STRONG, mosaic=0.0 if rect else 0.7)
    epochs = []
    for workers in (0, 2):
        loader = make(index, workers, augment=settings, rect=rect)
        batches = []
        for epoch in (0, 1, 2):
            loader.set_epoch(epoch)
            batches += list(loader)
        epochs.append(batches)
        told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
        [line] = told
        assert line.startswith(f"warning: {index.paths[3]}: cannot be read any longer (")
        assert line.endswith("; 1 lost so far")
    assert_equal(*epochs)
    assert sum(len(batch.images) for batch in epochs[0]) == 33
    if rect:  # of a mosaic the image may be one that does not show, which is not read at all
        assert index.paths[3] not in {path for batch in epochs[0] for path in batch.paths}


def test_an_unlabelled_picture_that_goes_away_is_not_replaced_by_a_labelled_one(index):
    Path(index.paths[10]).unlink()
    with pytest.raises(UserError, match=r"10\.png: cannot be read any longer .*any of 1 tried"):
        list(make(index))


@pytest.mark.fault(
    "all images disappear mid-run, as when a disk is unmounted",
    "the run ends within 30 s with a one-line error",
)
@pytest.mark.parametrize("workers", [0, 1])
def test_when_all_pictures_go_away_the_run_ends_soon(index, workers):
    loader = make(index, workers)
    for path in index.paths:
        Path(path).unlink()
    begun = time.monotonic()
    try:
        list(loader)
        message = "no error"
    except UserError as error:
        message = str(error)
    assert "see whether the disk is still there" in message and "\n" not in message
    assert time.monotonic() - begun < 30


@pytest.mark.fault(
    "a loader worker is killed, as when the system is out of memory",
    "the run ends with a one-line error suggesting fewer `--workers`; exit code 1",
)
def test_a_killed_worker_ends_the_run_with_a_line(index, tmp_path):
    (tmp_path / "index.pickle").write_bytes(pickle.dumps(index))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "index.pickle")],
        capture_output=True, text=True, timeout=180, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert len(done.stderr.splitlines()) == 1, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: --workers: a loader worker has died") and done.returncode == 1
    assert "fewer --workers" in line


KILLED = """
import os, pickle, signal, sys
from utils.config.cli import run
from utils.config.options import TrainOptions
from utils.datasets.loader import AugmentSettings, train_loader
from utils.device import advice_on_memory

@advice_on_memory()
def main(_options):
    index = pickle.load(open(sys.argv[1], "rb"))
    loader = train_loader(
        index, image_size=64, batch_size=1, augment=AugmentSettings(mosaic=1.0), workers=1, seed=0
    )
    for epoch in range(1000):
        loader.set_epoch(epoch)
        for _ in loader:
            if epoch == 1:
                os.kill(loader._batches._iterator._workers[0].pid, signal.SIGKILL)

sys.exit(run(TrainOptions, main, "", []))
"""


def test_a_picture_that_goes_away_before_it_is_cached_is_named(index):
    Path(index.paths[3]).unlink()
    for cache in ("ram", "disk"):
        with pytest.raises(UserError, match=r"03\.png: was readable when the index was made"):
            make(index, cache=cache)


def test_image_weights_draw_pictures_with_rare_classes(index):
    loader = make(index)
    loader.set_image_weights(np.array([0.0, 0.0, 1.0]))
    own = [Path(path).stem for epoch in range(3) for path in paths_of(loader, epoch)]
    assert set(own) <= {"03", "07", "10"} and own.count("10") == 3  # the unlabelled one comes as always
    loader.set_image_weights(np.zeros(3))  # nothing to prefer: back to each once
    assert sorted(paths_of(loader, 0)) == sorted(index.paths)


def paths_of(loader: TrainLoader, epoch: int) -> list[str]:
    loader.set_epoch(epoch)
    return [path for batch in loader for path in batch.paths]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_skipped_are_the_first_of_that_epoch_alone(index, workers):
    loader = make(index, workers=workers)
    whole = {epoch: paths_of(loader, epoch) for epoch in (1, 2)}
    loader.set_epoch(1, skip=2)
    rest = [path for batch in loader for path in batch.paths]
    assert len(whole[1]) == 11 and rest == whole[1][8:]
    assert len(loader) == 3  # the epoch's
    assert paths_of(loader, 2) == whole[2]


@pytest.mark.parametrize("rect", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_evaluate_every_so_many_th_of_the_batches_of_a_single_one(index, rect, ranks, monkeypatch):
    """With four of them one has nothing to do: an evaluation repeats no picture."""
    words = {"image_size": 64, "batch_size": 4, "workers": 0, "rect": rect}
    alone = [(batch.paths, batch.images.shape) for batch in eval_loader(index, **words)]
    monkeypatch.setattr(loader_module, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(loader_module, "rank", lambda rank=rank: rank)
        share = eval_loader(index, **words)
        own = [(batch.paths, batch.images.shape) for batch in share]
        assert own == alone[rank::ranks] and len(share) == len(own)


@pytest.mark.parametrize("rect", [True, False])
@pytest.mark.parametrize(("size", "counts"), [(2, [2, 2, 2, 2, 2, 1]), (3, [3, 1, 3, 1, 3])])
def test_batches_of_any_size_have_the_shapes_of_their_group(index, rect, size, counts):
    """So scores do not depend on how many processes share a training's batch."""
    words = {"image_size": 64, "workers": 0, "rect": rect}
    groups = list(eval_loader(index, batch_size=4, **words))
    parts = list(eval_loader(index, batch_size=size, group_size=4, **words))
    assert [len(part.paths) for part in parts] == counts
    whole, cut = (
        [(path, batch.images.shape[2:]) for batch in batches for path in batch.paths]
        for batches in (groups, parts)
    )
    assert whole == cut


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rect", [True, False])
def test_evaluation_gives_every_picture_once_with_its_way_back(index, rect, workers):
    loader = eval_loader(index, image_size=64, batch_size=4, workers=workers, rect=rect)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert sorted(path for batch in batches for path in batch.paths) == sorted(index.paths)
    for batch in batches:
        height, width = batch.images.shape[2:]
        assert max(height, width) == (96 if rect else 64)  # half a stride of padding, rounded up
        assert len(batch.letterboxes) == len(batch.paths)
        for place, (path, letterbox) in enumerate(zip(batch.paths, batch.letterboxes, strict=True)):
            number = index.paths.index(path)
            original_w, original_h = index.sizes_wh[number]
            assert letterbox.original_hw == (original_h, original_w)
            rows = batch.targets[batch.targets[:, 0] == place].numpy()
            np.testing.assert_array_equal(rows[:, 1], index.labels[number][:, 0])
            centres = rows[:, 2:4] * [width, height] - [letterbox.pad[1], letterbox.pad[0]]
            centres /= [letterbox.scale[1] * original_w, letterbox.scale[0] * original_h]
            np.testing.assert_allclose(centres, index.labels[number][:, 1:3], atol=1e-5)
            for _, name, cx, cy, *_ in rows:
                found = batch.images[place, :, int(cy * height), int(cx * width)].tolist()
                assert np.abs(np.subtract(found, COLOURS[int(name)])).max() < 12


def test_evaluation_repeats_itself_and_fills_the_border_with_grey(index):
    loader = eval_loader(index, image_size=64, batch_size=11, workers=0, rect=False)
    [first], [second] = list(loader), list(loader)
    assert_equal([first], [second])
    assert (first.images[0, :, :8] == 114).all()  # 96 x 72 becomes 64 x 48
    assert (first.images[0, :, 8:56] != 114).any()


def test_a_picture_smaller_than_the_image_size_is_enlarged(index):
    [batch] = eval_loader(index, image_size=128, batch_size=11, workers=0, rect=False)
    assert batch.letterboxes[2].scale == (2.0, 2.0)
    assert batch.letterboxes[2].pad == (0.0, 0.0)


def test_more_workers_than_processors_or_batches_are_not_started(index, monkeypatch):
    loader = eval_loader(index, image_size=64, batch_size=11, workers=64)
    assert loader.num_workers == 1
    assert eval_loader(index, image_size=64, batch_size=11, workers=0).num_workers == 0
    monkeypatch.setattr("utils.datasets.loader.usable_cpus", lambda: 2)
    for processes, workers in ((1, 2), (2, 1), (16, 1)):  # of a machine, each with a loader of its own
        monkeypatch.setattr("utils.datasets.loader.processes_here", lambda count=processes: count)
        assert eval_loader(index, image_size=64, batch_size=1, workers=8).num_workers == workers


@pytest.mark.parametrize("cache", [None, "ram", "disk"])
def test_a_dataset_survives_the_way_to_a_worker_that_is_not_forked(index, cache):
    loader = make(index, cache=cache)
    [order, *_] = TrainingOrder(len(index), 4, (64, 64), seed=0)
    before = loader.dataset[order]
    sent = pickle.dumps(loader.dataset)
    if cache == "disk":
        assert len(sent) < 20_000  # the name of the file, not the images
    assert_equal([pickle.loads(sent)[order]], [before])


@pytest.fixture
def two_kinds(tmp_path: Path) -> DatasetIndex:
    """Six labelled red images, each with one box, and five unlabelled blue ones."""
    paths, labels = [], []
    for number in range(11):
        path = tmp_path / f"{number:02d}.png"
        cv2.imwrite(str(path), np.full((64, 64, 3), (20, 20, 230) if number < 6 else (230, 20, 20), np.uint8))
        paths.append(str(path))
        rows = [[0, 0.5, 0.5, 0.4, 0.4]] if number < 6 else []
        labels.append(np.array(rows, np.float32).reshape(-1, 5))
    return DatasetIndex(paths, labels, np.full((11, 2), 64), np.arange(11) < 6, [], ["red"])


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("workers", [0, 2])
def test_no_sample_is_made_of_both_kinds(two_kinds, share, workers):
    settings = replace(PLAIN, mixup=0.5)
    loader = make(two_kinds, workers, augment=settings, unlabelled_share=share)
    for epoch in range(3):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert [Path(path).stem < "06" for path in batch.paths] == batch.labelled.tolist()
            red, blue = batch.images[:, 0].flatten(1), batch.images[:, 2].flatten(1)
            # The grey of the border, 114, is below what even a mixed image of one kind has.
            assert ((red > 160).any(1) <= batch.labelled).all()
            assert ((blue > 160).any(1) <= ~batch.labelled).all()
            assert batch.labelled[batch.targets[:, 0].long()].all()
            if share:
                assert (~batch.labelled).sum() * 2 == len(batch.paths)


def test_batches_of_both_kinds_are_those_of_any_number_of_workers(two_kinds):
    alone, shared = (make(two_kinds, workers, unlabelled_share=0.4) for workers in (0, 2))
    for epoch in (2, 0):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        assert_equal(list(alone), list(shared))


def test_rect_batches_hold_both_kinds(two_kinds):
    batches = list(make(two_kinds, rect=True, unlabelled_share=0.5))
    assert sum(int((~batch.labelled).sum()) for batch in batches) == 6
    assert any(0 < batch.labelled.sum() < len(batch.paths) for batch in batches)
