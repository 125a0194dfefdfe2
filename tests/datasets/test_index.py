"""The index: what it holds, what it refuses, and that it never meets a stale cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

import utils.datasets.index as index_module
from utils.config.dataset import DatasetConfig, load_dataset_config
from utils.datasets import annotations
from utils.datasets.check import check_split
from utils.datasets.index import build_index, join_unlabelled, without_images
from utils.datasets.sources import is_split_there, label_path
from utils.errors import UserError

GOOD = "0 0.5 0.5 0.5 0.5\n"


def message_of(config: DatasetConfig, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        build_index(config, split, progress=False)
    return str(caught.value)


def tree_of(folder: Path) -> dict[str, tuple[int, int, str]]:
    return {
        str(path): (
            path.stat().st_mtime_ns,
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def set_content_secretly(path: Path, content: bytes) -> None:
    """Changes a file without a trace in its size or its time of writing."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def checks(monkeypatch):
    """Counts how many images were really looked at."""
    looked_at: list[str] = []
    check = index_module.check_image

    def counting(path):
        looked_at.append(path)
        return check(path)

    monkeypatch.setattr(index_module, "check_image", counting)
    return looked_at


def test_pictures_come_sorted_with_sizes_and_labels(make_dataset):
    index = build_index(make_dataset({"b.png": "1 0.5 0.5 0.25 0.5\n", "a.jpg": "", "c.png": None}), "train")
    assert [Path(path).name for path in index.paths] == ["a.jpg", "b.png", "c.png"]
    assert index.sizes_wh.tolist() == [[64, 48]] * 3
    assert [len(labels) for labels in index.labels] == [0, 1, 0]
    assert index.labelled.all()
    [problem] = index.problems
    assert problem.startswith("1 of 3 images has no label file and counts as background: ")
    assert problem.endswith("c.png")
    assert index.names == ["cat", "dog"]
    np.testing.assert_allclose(index.box_sizes_px(128), [[32, 48]])


def test_wrong_lines_are_refused_by_file_and_line_all_at_once(make_dataset):
    config = make_dataset({"a.jpg": GOOD + "7 0.5 0.5 0.1 0.1\n", "b.jpg": "0 0.5 0.5 0.1\n"})
    message = message_of(config)
    assert message.count("a.txt:2: class 7 is not one of 0..1") == 1
    assert message.count("b.txt:1: 4 numbers") == 1
    assert message.startswith(f"{config.yaml_path}: 2 wrong label lines")


def test_only_the_first_of_many_wrong_lines_are_listed(make_dataset):
    message = message_of(make_dataset({"a.jpg": "9 0.5 0.5 0.1 0.1\n" * 50}))
    assert "50 wrong label lines" in message
    assert message.count("a.txt:") == 10


def test_label_files_that_change_meanwhile_are_not_remembered_for_what_they_were(make_dataset, monkeypatch):
    config = make_dataset({"a.jpg": GOOD, "b.jpg": GOOD})
    (label,) = config.root.rglob("a.txt")
    looked = index_module._refuse_wrong_labels

    def then_away(*given):
        looked(*given)
        label.rename(label.with_suffix(".bak"))

    monkeypatch.setattr(index_module, "_refuse_wrong_labels", then_away)
    assert [len(rows) for rows in build_index(config, "train").labels] == [0, 1]
    monkeypatch.setattr(index_module, "_refuse_wrong_labels", looked)
    label.with_suffix(".bak").rename(label)
    assert [len(rows) for rows in build_index(config, "train").labels] == [1, 1]


def test_broken_pictures_are_skipped_counted_and_named_and_stay_as_they_are(make_dataset):
    config = make_dataset({"a.jpg": GOOD, "b.jpg": GOOD, "c.jpg": GOOD})
    folder = config.splits["train"][0]
    (folder / "b.jpg").write_bytes(b"")
    (folder / "c.jpg").write_bytes((folder / "a.jpg").read_bytes()[:200])
    before = tree_of(config.root)
    index = build_index(config, "train", progress=False)
    assert [Path(path).name for path in index.paths] == ["a.jpg"]
    [problem] = index.problems
    assert problem.startswith("2 images skipped")
    assert "b.jpg: the file is empty" in problem
    assert "c.jpg: the file is cut off" in problem
    assert tree_of(config.root) == before


def test_a_set_of_broken_pictures_alone_is_an_error(make_dataset):
    config = make_dataset({"a.jpg": GOOD})
    (config.splits["train"][0] / "a.jpg").write_bytes(b"x")
    assert "no readable image" in message_of(config)


def test_a_folder_without_pictures_is_an_error(make_dataset):
    config = make_dataset({"a.jpg": GOOD})
    (config.splits["train"][0] / "a.jpg").unlink()
    assert "has no images" in message_of(config)


@pytest.mark.fault("a split without a single label file", "refused, naming a path where one was expected")
def test_no_label_file_at_all_is_an_error_that_says_where_they_belong(make_dataset):
    config = make_dataset({"a.jpg": None})
    assert os.path.join("labels", "train", "a.txt") in message_of(config)


def test_a_set_of_background_alone_is_accepted_with_a_word(make_dataset):
    index = build_index(make_dataset({"a.jpg": "", "b.jpg": None}), "train", progress=False)
    assert len(index) == 2
    assert "no boxes" in index.problems[-1]


def test_of_many_missing_label_files_the_first_are_named(make_dataset):
    files = {f"{number:02}.png": GOOD if number < 5 else None for number in range(30)}
    [problem] = build_index(make_dataset(files), "train", progress=False).problems
    assert problem.startswith("25 of 30 images have no label file")
    assert "05.png" in problem and "14.png" in problem and "15.png" not in problem


def test_a_label_file_that_cannot_be_read_is_named(make_dataset):
    config = make_dataset({"a.jpg": GOOD, "b.jpg": GOOD})
    label = Path(label_path(str(config.splits["train"][0] / "b.jpg")))
    label.unlink()
    label.mkdir()
    assert message_of(config).startswith(f"{label}: cannot be read as a label file (Is a directory)")
    label.rmdir()
    label.parent.joinpath("a.txt").unlink()
    label.parent.rmdir()
    label.parent.write_text("in the way")
    assert "cannot be read as a label file (Not a directory)" in message_of(config)


def test_a_label_file_without_the_right_to_read_it_is_named(make_dataset, monkeypatch):
    config = make_dataset({"a.jpg": GOOD})

    def refuse(path, most):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(annotations, "read_regular", refuse)
    assert "a.txt: cannot be read as a label file (Permission denied)" in message_of(config)


def test_hidden_files_and_folders_are_left_out(make_dataset):
    config = make_dataset({"a.jpg": GOOD, "._a.jpg": None, ".trash/b.jpg": None, "sub/.c.png": None})
    index = build_index(config, "train", progress=False)
    assert [Path(path).name for path in index.paths] == ["a.jpg"]
    assert index.problems == []


def listed_config(config: DatasetConfig, content: str) -> DatasetConfig:
    """The dataset with a list of images as its split `train`."""
    (config.root / "list.txt").write_text(content, encoding="utf-8")
    yaml = config.yaml_path.with_name("listed.yaml")
    yaml.write_text("path: data set\ntrain: list.txt\nnames: [cat, dog]\n", encoding="utf-8")
    return load_dataset_config(yaml)


def test_a_list_from_windows_is_understood(make_dataset):
    config = make_dataset({"a.jpg": GOOD, "b c.jpg": GOOD})
    listed = listed_config(config, "images\\train\\a.jpg\r\n.\\images\\train\\b c.jpg\r\n")
    index = build_index(listed, "train", progress=False)
    assert [Path(path).name for path in index.paths] == ["a.jpg", "b c.jpg"]
    assert [len(labels) for labels in index.labels] == [1, 1]


def test_lines_of_a_list_are_numbered_as_editors_number_them(make_dataset):
    config = make_dataset({"a\x0cb.jpg": GOOD})
    listed = listed_config(config, "images/train/a\x0cb.jpg\n")
    assert len(build_index(listed, "train", progress=False)) == 1
    assert ":2: a NUL byte" in message_of(listed_config(config, "images/train/a\x0cb.jpg\nx\0\n"))


@pytest.mark.fault("an image list of which no image exists", "refused, naming the list and the first image")
def test_a_list_of_missing_pictures_is_named_with_the_first_of_them(make_dataset):
    listed = listed_config(make_dataset({"a.jpg": GOOD}), "gone/x.jpg\ngone/y.jpg\n")
    message = message_of(listed)
    assert message.startswith(f"{listed.root / 'list.txt'}: none of its 2 images is there")
    assert str(listed.root / "gone" / "x.jpg") in message and "label" not in message


def test_a_list_may_be_meant_from_the_working_folder_where_its_images_are_there_alone(
    make_dataset, tmp_path, monkeypatch
):
    lines = "data set/images/train/b.jpg\ndata set/images/train/a.jpg\ndata set/images/train/gone.jpg\n"
    listed = listed_config(make_dataset({"a.jpg": GOOD, "b.jpg": GOOD}), lines)
    assert "none of its 3 images is there" in message_of(listed)
    assert not is_split_there(listed, "train")
    monkeypatch.chdir(tmp_path)
    assert is_split_there(listed, "train")
    index = build_index(listed, "train", progress=False)
    assert list(index.paths) == [str(listed.root / "images/train" / name) for name in ("a.jpg", "b.jpg")]
    assert [len(labels) for labels in index.labels] == [1, 1]
    assert (
        index.problems[0].startswith(f"{listed.root / 'list.txt'}: ") and str(tmp_path) in index.problems[0]
    )
    assert index.problems[0] in check_split(listed, "train", progress=False).remarks
    # Some image is where lists are relative to: then no line is taken for one from the working folder.
    (listed.root / "list.txt").write_text(f"images/train/a.jpg\n{lines}")
    index = build_index(listed, "train", progress=False)
    assert [Path(path).name for path in index.paths] == ["a.jpg"] and "working" not in index.problems[0]
    (listed.root / "list.txt").write_text("./data set/images/train/a.jpg\n")
    assert "none of its 1 images is there" in message_of(listed)


@pytest.mark.parametrize(
    ("line", "told"),
    [("images/train/a\0.jpg", "list.txt:2: a NUL byte"), ("images/train/" + "a" * 300 + ".jpg", "aaa.txt")],
)
def test_names_that_no_file_can_have_are_told_in_one_line(make_dataset, line, told):
    listed = listed_config(make_dataset({"a.jpg": GOOD}), f"images/train/a.jpg\n{line}\n")
    assert told in message_of(listed)


def test_corrections_are_reported_and_not_written(make_dataset):
    config = make_dataset({"a.jpg": GOOD * 2 + "1 0.9 0.5 0.4 0.4\n"})
    before = tree_of(config.root)
    index = build_index(config, "train", progress=False)
    assert len(index.labels[0]) == 2
    assert "a.txt: 1 label repeated" in index.problems[0]
    assert "a.txt: 1 box reached out" in index.problems[0]
    assert tree_of(config.root) == before


def test_unlabelled_pictures_have_unknown_not_empty_truth(make_dataset):
    config = make_dataset({"a.jpg": "this is not read\n"})
    index = build_index(config, "unlabeled", progress=False)
    assert index.labelled.tolist() == [False]
    assert len(index.all_labels()) == 0
    assert index.problems == []


def test_an_unlabelled_index_is_not_taken_for_a_labelled_one(make_dataset):
    config = make_dataset({"a.jpg": None})
    build_index(config, "unlabeled", progress=False)
    assert "not one label file" in message_of(config)


def test_unlabelled_pictures_join_those_of_the_training_and_leave_its_statistics_as_they_were(make_dataset):
    config = make_dataset({"a.jpg": GOOD, "b.jpg": "1 0.5 0.5 0.25 0.5\n"})
    train = build_index(config, "train", progress=False)
    others = build_index(
        make_dataset({"x.jpg": "9 not read", "y.jpg": None}, split="extra"), "unlabeled", progress=False
    )
    joined = join_unlabelled(train, others)
    assert [Path(path).name for path in joined.paths] == ["a.jpg", "b.jpg", "x.jpg", "y.jpg"]
    assert joined.labelled.tolist() == [True, True, False, False]
    assert (len(joined), joined.unlabelled_count, train.unlabelled_count) == (4, 2, 0)
    assert joined.sizes_wh.shape == (4, 2) and joined.problems == []
    np.testing.assert_array_equal(joined.all_labels(), train.all_labels())
    np.testing.assert_array_equal(joined.class_counts(), train.class_counts())
    np.testing.assert_array_equal(joined.box_sizes_px(64), train.box_sizes_px(64))
    np.testing.assert_array_equal(joined.image_weights(joined.class_weights()), [0.5, 0.5, 0, 0])


def test_a_picture_that_is_listed_as_both_counts_as_labelled_only(make_dataset):
    train = build_index(make_dataset({"a.jpg": GOOD, "b.jpg": None}), "train", progress=False)
    same = build_index(make_dataset({"c.jpg": None}), "unlabeled", progress=False)
    joined = join_unlabelled(train, same)
    assert [Path(path).name for path in joined.paths] == ["a.jpg", "b.jpg", "c.jpg"]
    assert joined.labelled.tolist() == [True, True, False]
    assert joined.problems[:-1] == train.problems
    told = joined.problems[-1]
    assert told.startswith("2 unlabelled images in 'train' too, used as labelled only: ")
    assert "a.jpg" in told and "c.jpg" not in told


@pytest.mark.parametrize("make_link", [os.symlink, os.link])
def test_an_image_is_the_same_by_whatever_link(make_link, make_dataset):
    config = make_dataset({"a.jpg": GOOD, "b.jpg": None})
    train = build_index(config, "train", progress=False)
    pool = config.root / "images/pool"
    pool.mkdir()
    for name in ("a", "c"):
        make_link(train.paths[int(name == "c")], pool / f"{name}2.jpg")
    config.splits["unlabeled"] = [pool]
    others = build_index(config, "unlabeled", progress=False)
    assert len(others) == 2
    kept = without_images(others, {"val": [train.paths[0]]})
    assert [Path(path).name for path in kept.paths] == ["c2.jpg"]
    assert "1 unlabelled image in 'val' too, left out" in kept.problems[-1]
    assert len(join_unlabelled(train, others)) == 2


def test_names_given_twice_are_told_once_for_a_training(make_dataset):
    config = make_dataset({"a.jpg": GOOD + "1 0.2 0.2 0.1 0.1\n"}, names=("cat", "cat"))
    [problem] = build_index(config, "train", progress=False).problems
    assert "appear twice: cat" in problem
    assert build_index(config, "unlabeled", progress=False).problems == []


def test_single_cls_makes_one_class_of_all(make_dataset):
    config = make_dataset({"a.jpg": GOOD + "1 0.2 0.2 0.1 0.1\n"})
    index = build_index(config, "train", single_cls=True, progress=False)
    assert index.nc == 1
    assert index.labels[0][:, 0].tolist() == [0, 0]
    assert build_index(config, "train", progress=False).labels[0][:, 0].tolist() == [0, 1]


def test_single_cls_takes_class_ids_without_a_name(make_dataset, cache_folder):
    config = make_dataset({"a.jpg": GOOD + "1 0.2 0.2 0.1 0.1\n2 0.7 0.7 0.1 0.1\n"}, names=("cell",))
    for _ in ("built", "from the cache"):
        index = build_index(config, "train", single_cls=True, progress=False)
        assert (index.names, index.all_labels()[:, 0].tolist()) == (["cell"], [0, 0, 0])
        assert index.class_counts().tolist() == [3]
        assert "a.txt:2: class 1 is not one of 0..0" in message_of(config)


@pytest.mark.parametrize("class_id", ["-1", "0.5", "1e9"])
def test_single_cls_takes_no_odd_class_ids(make_dataset, class_id):
    config = make_dataset({"a.jpg": f"{class_id} 0.5 0.5 0.5 0.5\n"})
    with pytest.raises(UserError, match=r"a\.txt:1: class .* is not one of 0\.\."):
        build_index(config, "train", single_cls=True, progress=False)


def test_a_second_build_looks_at_no_picture_and_is_equal(make_dataset, checks):
    config = make_dataset({"a.jpg": GOOD * 2, "b.jpg": GOOD, "c.jpg": ""})
    (config.splits["train"][0] / "b.jpg").write_bytes(b"x")
    first = build_index(config, "train", progress=False)
    assert len(checks) == 3
    second = build_index(config, "train", progress=False)
    assert len(checks) == 3
    assert second.paths == first.paths
    assert second.problems == first.problems
    assert second.sizes_wh.tolist() == first.sizes_wh.tolist()
    for one, other in zip(first.labels, second.labels, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.fault(
    "a label file changes but keeps its size and modification time, after the index was cached",
    "detected; the index is rebuilt",
)
def test_a_changed_label_of_equal_size_and_time_is_seen(make_dataset):
    config = make_dataset({"a.jpg": GOOD})
    assert build_index(config, "train", progress=False).labels[0][0, 0] == 0
    label = Path(label_path(str(config.splits["train"][0] / "a.jpg")))
    set_content_secretly(label, GOOD.replace("0", "1", 1).encode())
    assert build_index(config, "train", progress=False).labels[0][0, 0] == 1


def test_a_changed_picture_of_equal_size_and_time_is_seen(make_dataset, checks):
    config = make_dataset({"a.png": GOOD})
    build_index(config, "train", progress=False)
    path = config.splits["train"][0] / "a.png"
    set_content_secretly(path, bytes(path.stat().st_size))
    assert "no readable image" in message_of(config)


def test_a_changed_list_of_names_and_a_new_picture_are_seen(make_dataset, checks):
    config = make_dataset({"a.jpg": "1 0.5 0.5 0.5 0.5\n"})
    build_index(config, "train", progress=False)
    assert "class 1" in message_of(make_dataset({"a.jpg": "1 0.5 0.5 0.5 0.5\n"}, names=["cat"]))
    assert len(build_index(make_dataset({"b.jpg": GOOD}), "train", progress=False)) == 2


@pytest.mark.fault("a cached index that is empty, truncated or not a zip file", "rebuilt")
def test_a_damaged_cache_file_is_made_again(make_dataset, cache_folder, checks):
    config = make_dataset({"a.jpg": GOOD})
    build_index(config, "train", progress=False)
    [remembered] = (cache_folder / "index").glob("*.npz")
    for content in (b"", b"no zip", remembered.read_bytes()[:-30]):
        remembered.write_bytes(content)
        checks.clear()
        assert len(build_index(config, "train", progress=False)) == 1
        assert len(checks) == 1


@pytest.mark.fault(
    "a cache folder that cannot be created",
    "the index is built all the same",
)
def test_a_cache_folder_that_cannot_be_made_is_no_reason_to_stop(make_dataset, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert len(build_index(make_dataset({"a.jpg": GOOD}), "train", cache_dir=blocked, progress=False)) == 1


def test_file_names_with_spaces_and_umlauts_are_found_with_their_labels(make_dataset):
    config = make_dataset({"grüße aus 東京 .1.jpg": GOOD, "sub folder/b.jpg": GOOD})
    index = build_index(config, "train", progress=False)
    assert [len(labels) for labels in index.labels] == [1, 1]
    assert build_index(config, "train", progress=False).paths == index.paths


def test_lists_name_pictures_relative_to_themselves_or_to_the_root_and_each_counts_once(
    make_dataset, tmp_path
):
    config = make_dataset({"a.jpg": GOOD, "b.jpg": GOOD, "c.jpg": GOOD})
    folder = config.splits["train"][0]
    lists = config.root / "lists"
    lists.mkdir()
    (lists / "one.txt").write_text(f"../images/train/b.jpg\nimages/train/a.jpg\n\n{folder / 'b.jpg'}\n")
    (lists / "two.txt").write_text(f"{folder / 'a.jpg'}\n{folder / 'gone.jpg'}\n")
    yaml = tmp_path / "lists.yaml"
    yaml.write_text("path: data set\ntrain: [lists/one.txt, lists/two.txt]\nnames: [cat, dog]\n")
    index = build_index(load_dataset_config(yaml), "train", progress=False)
    assert [Path(path).name for path in index.paths] == ["a.jpg", "b.jpg"]
    assert "gone.jpg: No such file" in index.problems[0]


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("/d/images/train/x.jpg", "/d/labels/train/x.txt"),
        ("/images/d/images/x.y.png", "/images/d/labels/x.y.txt"),
        ("/d/pictures/x.jpg", "/d/pictures/x.txt"),
        ("/d/my_images/images.jpg", "/d/my_images/images.txt"),
    ],
)
def test_labels_belong_to_the_folder_that_mirrors_the_last_images_folder(image, label):
    assert label_path(image) == label


def test_class_and_image_weights_prefer_what_is_rare(make_dataset):
    config = make_dataset(
        {
            "a.jpg": GOOD + "0 0.3 0.3 0.1 0.1\n0 0.6 0.6 0.1 0.1\n",
            "b.jpg": "1 0.5 0.5 0.1 0.1\n",
            "c.jpg": "",
        }
    )
    index = build_index(config, "train", progress=False)
    assert index.class_counts().tolist() == [3, 1]
    np.testing.assert_allclose(index.class_weights(), [0.25, 0.75])
    np.testing.assert_allclose(index.image_weights(index.class_weights()), [0.75, 0.75, 0])


VOC_OBJECT = """<object><name>{}</name><difficult>0</difficult>
<bndbox><xmin>17</xmin><ymin>13</ymin><xmax>48</xmax><ymax>36</ymax></bndbox></object>"""
VOC_FILE = "<annotation><size><width>{}</width><height>{}</height></size>\n{}</annotation>"


@pytest.fixture
def voc_dataset(make_dataset, tmp_path) -> DatasetConfig:
    """Four images of 64 x 48 px: annotated, annotated at twice the size, without size, not annotated."""
    source = make_dataset({"one.jpg": GOOD, "two.png": GOOD, "three b.jpg": GOOD, "four.jpg": GOOD})
    base = tmp_path / "VOC"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (base / name).mkdir(parents=True)
    for path in source.splits["train"][0].iterdir():
        (base / "JPEGImages" / path.name).write_bytes(path.read_bytes())
    for stem, size in (("one", (64, 48)), ("two", (128, 96)), ("three b", (0, 0))):
        (base / "Annotations" / f"{stem}.xml").write_text(VOC_FILE.format(*size, VOC_OBJECT.format("dog")))
    (base / "ImageSets/Main/train.txt").write_text("one\ntwo  1\nthree b\nfour -1\n")
    yaml = tmp_path / "voc.yaml"
    yaml.write_text("path: VOC\nlayout: voc\ntrain: ImageSets/Main/train.txt\nnames: [cat, dog]\n")
    return load_dataset_config(yaml)


def test_a_voc_folder_is_read_straight_and_left_untouched(voc_dataset):
    before = tree_of(voc_dataset.root)
    folders = sorted(path for path in voc_dataset.root.rglob("*") if path.is_dir())
    index = build_index(voc_dataset, "train", progress=False)
    assert [Path(path).name for path in index.paths] == ["one.jpg", "two.png", "three b.jpg", "four.jpg"]
    np.testing.assert_allclose(index.labels[0], [[1, 0.5, 0.5, 0.5, 0.5]])
    np.testing.assert_allclose(index.labels[1], [[1, 0.25, 0.25, 0.25, 0.25]])
    np.testing.assert_allclose(index.labels[2], index.labels[0])
    assert len(index.labels[3]) == 0
    assert any("two.xml: annotated at 128 x 96 px" in problem for problem in index.problems)
    assert any("four.jpg" in problem and "background" in problem for problem in index.problems)
    assert tree_of(voc_dataset.root) == before
    assert sorted(path for path in voc_dataset.root.rglob("*") if path.is_dir()) == folders


def test_an_unknown_voc_class_is_named_with_file_and_line(voc_dataset):
    path = voc_dataset.root / "Annotations" / "one.xml"
    path.write_text(VOC_FILE.format(64, 48, VOC_OBJECT.format("cow")))
    message = message_of(voc_dataset)
    assert f"{path}:2: class 'cow'" in message


def test_a_voc_list_may_lie_at_the_root_or_beside_the_yaml(voc_dataset, tmp_path):
    (voc_dataset.root / "train.txt").write_text("one\n")
    (tmp_path / "mine.txt").write_text("one\n")
    yaml = tmp_path / "own.yaml"
    yaml.write_text("path: VOC\nlayout: voc\ntrain: train.txt\nval: mine.txt\nnames: [cat, dog]\n")
    config = load_dataset_config(yaml)
    for split in ("train", "val"):
        (path,) = build_index(config, split, cache_dir=tmp_path / "cache", progress=False).paths
        assert "/JPEGImages/one." in path


def test_a_voc_split_without_a_folder_of_pictures_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("one\n")
    yaml = tmp_path / "wrong.yaml"
    yaml.write_text("layout: voc\ntrain: train.txt\nnames: [cat, dog]\n")
    assert "JPEGImages" in message_of(load_dataset_config(yaml))


def test_bccd_has_its_known_splits_and_stays_untouched(bccd_dir):
    config = load_dataset_config(Path(__file__).parents[2] / "data" / "bccd.yaml", bccd_dir)
    names = sorted(str(path) for path in bccd_dir.rglob("*"))
    counts = {split: build_index(config, split, progress=False) for split in ("train", "val", "test")}
    assert {split: len(index) for split, index in counts.items()} == {"train": 205, "val": 87, "test": 72}
    assert sum(index.class_counts() for index in counts.values()).tolist() == [4155, 372, 361]
    assert sorted(str(path) for path in bccd_dir.rglob("*")) == names


@pytest.mark.parametrize("together", [1, 32])
@pytest.mark.parametrize("count", [0, 1, 31, 64, 10_001])
def test_what_threads_work_out_comes_in_order_and_waits_in_blocks(count, together):
    done = []

    def work(item: int) -> int:
        done.append(item)
        return -item

    found = []
    for value in index_module.each_in_parallel(work, range(count), together=together):
        found.append(value)
        assert len(done) - len(found) <= 4096, "results pile up"
    assert found == [-item for item in range(count)]
