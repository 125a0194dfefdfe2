"""What a run is made of, as far as its options decide it."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from models.yolo import Model
from utils.batch import Progress
from utils.config.hyperparameters import Hyperparameters
from utils.config.options import DistillOptions, TrainOptions
from utils.datasets import sampling
from utils.datasets.index import DatasetIndex
from utils.datasets.sampling import RectGroups, TrainingOrder
from utils.errors import UsageError, UserError
from utils.reporting.console import Console
from utils.training import setup
from utils.training.ema import ModelEma
from utils.training.optimizer import WEIGHTS
from utils.training.setup import check_batches, images_per_epoch, synchronised_norms
from utils.training.step import TrainingStep
from utils.words import counted


def index_of(labelled, unlabelled=0):
    count = labelled + unlabelled
    paths, labels = [f"{number}.png" for number in range(count)], [np.zeros((0, 5), np.float32)] * count
    return DatasetIndex(paths, labels, np.full((count, 2), 64), np.arange(count) < labelled, [], ["a"])


def distilled(**given):
    return DistillOptions(teacher="t.pt", **given)


@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 0.75])
def test_pictures_of_an_epoch_are_those_that_its_order_has(share, rect):
    index = index_of(11, 7)
    order = TrainingOrder(18, 4, (64, 64), 0, index.labelled, share)
    if rect:
        order.group = lambda numbers: RectGroups(np.arange(len(numbers)), [(64, 64)] * -(-len(numbers) // 4))
    used = index if share != 0 else index_of(11)  # a run that wants none does not read them
    options = distilled(unlabeled_share=share, rect=rect, batch_size=4)
    assert images_per_epoch(options, used) == sum(len(batch.rows) for batch in order)


def test_a_batch_of_a_single_picture_and_cell_is_refused_and_an_unlabelled_one_beside_it_helps():
    for options in (TrainOptions(batch_size=4), distilled(batch_size=4)):
        with pytest.raises(UsageError, match="single image"):
            check_batches(options, index_of(9), 32, 32)
    check_batches(distilled(batch_size=4, unlabeled_share=0.5), index_of(9, 8), 32, 32)
    check_batches(TrainOptions(batch_size=4), index_of(9), 64, 32)


def test_a_head_whose_levels_are_not_in_order_is_not_trained(tmp_path):
    text = Path("models/yolov5n.yaml").read_text(encoding="utf-8")
    assert "[[17, 20, 23], 1, Detect" in text
    (tmp_path / "turned.yaml").write_text(text.replace("[[17, 20, 23], 1,", "[[23, 20, 17], 1,"))
    options = TrainOptions(cfg=str(tmp_path / "turned.yaml"), weights="")
    with pytest.raises(UserError, match=r"turned\.yaml: its levels have strides 32, 16, 8; list"):
        setup.build_network(options, Hyperparameters(), ["a"], Console())


def test_mosaics_and_unlabelled_pictures_end_when_the_options_say():
    """The loader's orders: a mosaic has partners for each image."""
    index = index_of(6, 2)
    data = setup.Data(None, index, index_of(4), ("a",), ())
    options = distilled(epochs=9, close_mosaic=3, stop_distill=2, batch_size=4, workers=0)
    loader, _ = setup.loaders(options, Hyperparameters(), data, 64, 32)
    partners, pictures = [], []
    for epoch in range(9):
        loader.set_epoch(epoch)
        orders = list(loader._order)
        partners.append({order.rows.shape[1] - 1 for order in orders})
        pictures.append(sorted({int(row) for order in orders for row in order.rows[:, 0]}))
    assert partners == [{7}] * 6 + [{0}] * 3
    assert pictures == [[*range(8)]] * 7 + [[*range(6)]] * 2


def test_norms_are_synchronised_between_gpus_and_keep_their_names(monkeypatch, capsys):
    model = Model("models/yolov5n.yaml", nc=2)
    keys, options = list(model.state_dict()), TrainOptions(sync_bn=True)
    synchronised_norms(model, options, torch.device("cuda"), Console())
    assert "--sync-bn changes nothing" in capsys.readouterr().err
    assert not any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in model.modules())
    monkeypatch.setattr(setup, "is_distributed", lambda: True)
    with pytest.raises(UsageError, match="GPUs alone"):
        synchronised_norms(model, options, torch.device("cpu"), Console())
    synchronised_norms(model, options, torch.device("cuda"), Console())
    kinds = {type(layer) for layer in model.modules()}
    assert torch.nn.SyncBatchNorm in kinds and torch.nn.BatchNorm2d not in kinds
    assert list(model.state_dict()) == keys


def test_pictures_that_are_to_be_scored_are_learnt_from_in_no_way(tmp_path):
    """`unlabeled: images` is every image of the set, those of `val` and `test` among them."""
    rng, splits = np.random.default_rng(0), {"train": 3, "val": 2, "test": 1, "more": 2}
    for split, count in splits.items():
        for folder in ("images", "labels"):
            (tmp_path / folder / split).mkdir(parents=True)
        for number in range(count):
            picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / f"images/{split}/{number}.png"), picture)
            (tmp_path / f"labels/{split}/{number}.txt").write_text("0 .5 .5 .5 .5")
    of_splits = "".join(f"{split}: images/{split}\n" for split in ("train", "val", "test"))
    data = tmp_path / "set.yaml"
    data.write_text(f"path: {tmp_path}\n{of_splits}unlabeled: images\nnames: [a]\n")
    read = setup.read_data(distilled(data=data), print)
    assert len(read.train) == 5 and read.train.unlabelled_count == 2
    told = " ".join(read.train.problems)
    for count, split in ((2, "val"), (1, "test")):
        assert f"{counted(count, 'unlabelled image')} in '{split}' too, left out" in told
    shutil.rmtree(tmp_path / "images/more")
    with pytest.raises(UserError, match="every image of 'unlabeled' is in another split too"):
        setup.read_data(distilled(data=data, unlabeled_share=0.5), print)


@pytest.mark.parametrize(
    ("ranks", "images", "options", "refused"),
    [
        (2, 10, {}, True),  # two batches of two, and one image more for each
        (2, 9, {}, True),  # five images for the first, four for the second
        (2, 8, {}, False),
        (2, 9, {"rect": True}, True),  # batches are made of all images together
        (2, 10, {"rect": True}, False),
        (3, 11, {"batch_size": 9}, True),
        (3, 12, {"batch_size": 9}, True),
        (3, 15, {"batch_size": 9}, False),
    ],
)
def test_a_batch_of_a_single_picture_is_refused_whichever_process_would_have_it(
    ranks, images, options, refused, monkeypatch
):
    monkeypatch.setattr(setup, "world_size", lambda: ranks)
    monkeypatch.setattr(sampling, "world_size", lambda: ranks)
    given = TrainOptions(**{"batch_size": 4, **options})
    if not refused:
        check_batches(given, index_of(images), 32, 32)
        return
    with pytest.raises(UsageError, match=f"with {images} images among {ranks} processes: a batch would be"):
        check_batches(given, index_of(images), 32, 32)


@pytest.mark.parametrize("share", [None, 0.4])
@pytest.mark.parametrize("images", range(4, 30))
def test_last_batches_are_as_large_as_the_orders_of_the_processes_say(images, share, monkeypatch):
    ranks, batch = 3, 9
    monkeypatch.setattr(setup, "world_size", lambda: ranks)
    monkeypatch.setattr(sampling, "world_size", lambda: ranks)
    index, sizes = index_of(images, 5 if share else 0), set()
    for number in range(ranks):
        monkeypatch.setattr(sampling, "rank", lambda number=number: number)
        order = TrainingOrder(len(index), batch // ranks, (64, 64), 0, index.labelled, share)
        sizes.add(len([*order][-1].rows))
    options = distilled(batch_size=batch, unlabeled_share=share)
    assert {size or batch // ranks for size in setup._images_of_last_batches(options, index)} == sizes


def network_of(tmp_path, change):
    content = yaml.safe_load(Path("models/yolov5n.yaml").read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    return TrainOptions(cfg=str(tmp_path / "own.yaml"), weights="")


def test_a_network_for_images_of_other_channels_is_not_trained(tmp_path):
    options = network_of(tmp_path, lambda content: content.update(ch=1))
    with pytest.raises(UserError, match=r"own\.yaml: takes images of 1 channel; images have three"):
        setup.build_network(options, Hyperparameters(), ["a"], Console())


def test_a_head_of_more_levels_than_the_loss_has_weights_for_is_not_trained(tmp_path):
    def six_levels(content):
        head = content["head"]
        head[-1] = [-1, 1, "Conv", [512, 3, 2]]
        head += [[-1, 1, "Conv", [512, 3, 2]], [-1, 1, "Conv", [512, 3, 2]]]
        head.append([[17, 20, 23, 24, 25, 26], 1, "Detect", ["nc", "anchors"]])
        content["anchors"] = [[10, 13, 16, 30]] * 6

    with pytest.raises(UserError, match="its head has 6 levels, the loss has weights for 5"):
        setup.build_network(network_of(tmp_path, six_levels), Hyperparameters(), ["a"], Console())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"cfg": "modles/yolov5n.yaml"}, r"no such network config; did you mean models/yolov5n\.yaml"),
        ({"cfg": "yolov5n.yaml", "freeze": (99,)}, "--freeze: asks for the first 99 of 25 layers"),
        ({"cfg": "yolov5n.yaml", "freeze": (3, 25)}, "--freeze: there is no layer 25 among 25 layers"),
        ({"cfg": "yolov5n.yaml", "data": "data/vok.yaml"}, r"data/vok\.yaml"),
    ],
)
def test_mistyped_names_are_told_before_anything_is_read_or_downloaded(given, told):
    with pytest.raises(UserError, match=told):
        setup.check_yamls(TrainOptions(weights="", **given))


def test_images_of_both_splits_are_counted():
    said = []
    setup._warn_of_shared(index_of(5), index_of(3), said.append)
    setup._warn_of_shared(index_of(1), index_of(3), said.append)
    assert said == [
        "3 of 3 validation images were given for training too: their scores say little",
        "1 of 3 validation images was given for training too: their scores say little",
    ]
    nothing = [np.zeros((0, 5), np.float32)]
    other = DatasetIndex(["z.png"], nothing, np.full((1, 2), 64), np.ones(1, bool), [], ["a"])
    setup._warn_of_shared(index_of(5), other, pytest.fail)


@pytest.mark.parametrize(
    ("batch", "nominal", "batches"),
    [(16, 64, 4), (24, 64, 3), (40, 64, 2), (128, 64, 1), (24, 128, 5)],
)
def test_decay_is_for_the_images_of_an_update_relative_to_the_nominal_batch(batch, nominal, batches):
    model, options = Model("models/demo-student.yaml", nc=2), TrainOptions(batch_size=batch)
    hyp = Hyperparameters(weight_decay=0.001, nbs=nominal)
    step = TrainingStep(model, [])
    trainer = setup.build_trainer(step, ModelEma(model), options, hyp, 64, torch.device("cpu"))
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    assert decays.pop(WEIGHTS) == pytest.approx(0.001 * batch * batches / nominal) and not any(decays)
    # As many are summed once the warm-up is over.
    assert trainer.schedule.accumulate(Progress(4000, 8, 500, 10)) == batches
