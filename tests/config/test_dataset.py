"""Dataset settings: paths, names and the messages when something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.config.dataset import load_dataset_config, load_names
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
GOOD = "path: here\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"


def write(folder: Path, text: str) -> Path:
    (folder / "here" / "images" / "train").mkdir(parents=True, exist_ok=True)
    path = folder / "set.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message_of(path: Path, **kwargs: str) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset_config(path, **kwargs)
    return str(caught.value)


def test_the_path_is_resolved_against_the_folder_of_the_yaml_not_the_working_folder(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_dataset_config(write(tmp_path, GOOD))
    assert config.root == tmp_path / "here"
    assert config.splits["train"] == (tmp_path / "here" / "images" / "train",)
    assert (config.layout, config.nc, config.names) == ("yolo", 2, ["cat", "dog"])


def test_without_a_path_the_folder_of_the_yaml_is_the_root(tmp_path):
    config = load_dataset_config(write(tmp_path, "train: here/images/train\nnames: [cat]\n"))
    assert config.entries("train") == (tmp_path / "here" / "images" / "train",)


def test_of_several_paths_the_first_that_exists_counts(tmp_path):
    config = load_dataset_config(write(tmp_path, GOOD.replace("path: here", "path: [nowhere, here, .]")))
    assert config.root == tmp_path / "here"


def test_a_data_dir_goes_before_the_path(tmp_path):
    copy = tmp_path / "copy"
    (copy / "images" / "train").mkdir(parents=True)
    config = load_dataset_config(write(tmp_path, GOOD), str(copy))
    assert config.entries("train") == (copy / "images" / "train",)


def test_missing_data_says_what_was_looked_for_and_how_to_get_it(tmp_path):
    path = write(tmp_path, GOOD.replace("here", "[gone, lost]") + "download: wget it\n")
    message = message_of(path)
    for part in (str(path), str(tmp_path / "gone"), str(tmp_path / "lost"), "wget it", "--data-dir"):
        assert part in message


def test_a_missing_split_is_reported_when_it_is_asked_for(tmp_path):
    config = load_dataset_config(write(tmp_path, GOOD))
    with pytest.raises(UserError, match="images/val"):
        config.entries("val")
    with pytest.raises(UserError, match="no split 'test'"):
        config.entries("test")


def test_names_may_be_a_mapping_in_any_order(tmp_path):
    config = load_dataset_config(write(tmp_path, GOOD.replace("[cat, dog]", "{1: dog, 0: cat}")))
    assert config.names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("names: [cat, dog]", "", "names"),
        ("names: [cat, dog]", "names: []", "line 4: 'names' is empty"),
        ("names: [cat, dog]", "names: cat", "line 4: 'names' must be a list"),
        ("names: [cat, dog]", "names: [cat, [dog]]", "line 4: every class name must be text"),
        ("names: [cat, dog]", "names: {0: cat, 2: dog}", "line 4: the ids of 'names' must run from 0 to 1"),
        (
            "names: [cat, dog]",
            "names: [yes, no]",
            "line 4: yes, no, on, off and the like are no",
        ),
        ("names: [cat, dog]", "names: {0: cat, 1: off}", "line 4: yes, no, on, off"),
        (
            "names: [cat, dog]",
            "names: [cat, cat]\nlayout: voc",
            "annotations cannot tell them apart: cat",
        ),
        ("path: here", "nc: 3", "line 1: nc is 3 but 'names' has 2 entries"),
        ("path: here", "layuot: voc", "line 1: unknown key 'layuot', did you mean 'layout'?"),
        ("path: here", "layout: coco", "line 1: layout 'coco'"),
        ("train: images/train", "train: 3", "line 2: 'train' must be a path"),
    ],
)
def test_a_wrong_setting_is_named_with_its_line(tmp_path, old, new, expected):
    assert expected in message_of(write(tmp_path, GOOD.replace(old, new)))


def test_all_problems_come_in_one_message(tmp_path):
    message = message_of(write(tmp_path, "pth: here\nnc: 4\nnames: [a, b]\n"))
    assert "unknown key 'pth'" in message
    assert "nc is 4" in message
    assert "names no split" in message


def test_an_export_that_writes_one_folder_too_high_is_understood(tmp_path):
    text = "train: ../train/images\nval: ../train/images\nnames: [a]\nroboflow: {workspace: x}\n"
    path = tmp_path / "export" / "data.yaml"
    (path.parent / "train" / "images").mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    assert load_dataset_config(path).entries("train") == (path.parent / "train" / "images",)


@pytest.mark.parametrize(("name", "nc", "last"), [("bccd", 3, "Platelets"), ("voc", 20, "tvmonitor")])
def test_the_shipped_voc_layouts_have_their_classes(name, nc, last):
    names = load_names(REPOSITORY / "data" / f"{name}.yaml")
    assert (len(names), names[-1]) == (nc, last)


@pytest.mark.parametrize("name", ["coco", "coco128"])
def test_the_shipped_coco_settings_have_80_classes_in_the_order_of_the_public_weights(name):
    names = load_names(REPOSITORY / "data" / f"{name}.yaml")
    assert len(names) == 80
    assert [names[number] for number in (0, 11, 56, 79)] == ["person", "stop sign", "chair", "toothbrush"]


def test_a_bare_name_finds_the_shipped_file_and_a_misspelt_one_gets_a_hint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_names("voc.yaml")[0] == load_names("voc")[0] == "aeroplane"
    with pytest.raises(UserError, match=r"did you mean data/coco128\.yaml"):
        load_names("coc128.yaml")


def test_the_default_dataset_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(load_names("data/coco128.yaml")) == 80
    for name in ("VOC.yaml", "data/VOC.yaml", "Voc"):
        assert load_names(name)[0] == "aeroplane"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "coco128.yaml").write_text("names: [mine]\n")
    assert load_names("data/coco128.yaml") == ["mine"]


def test_a_missing_yaml_is_told_with_the_places_that_were_tried_and_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_names("my/coco128.yaml")
    assert str(error.value).startswith(
        f"my/coco128.yaml: is not there, nor is {REPOSITORY / 'my/coco128.yaml'}"
    )
    assert str(REPOSITORY / "data") not in str(error.value)
    with pytest.raises(UserError) as error:
        load_names("xyz")
    assert f"{REPOSITORY / 'xyz'} nor {REPOSITORY / 'data/xyz.yaml'};" in str(error.value)
    with pytest.raises(UserError) as error:
        load_names(tmp_path / "gone.yaml")
    assert "nor" not in str(error.value)
    with pytest.raises(UserError, match="is not there"):
        load_names("x" * 300)


@pytest.mark.parametrize("name", ["bccd.v2", "data/bccd.v2", "bccd.txt"])
def test_a_name_with_another_suffix_is_no_shipped_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{name}: is not there, nor is {REPOSITORY / name}; did you mean "):
        load_names(name)
    assert len(load_names("bccd.yml")) == 3


def test_an_archive_is_refused_with_what_to_do_about_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.tar.gz").touch()
    for name in ("bccd.zip", "mine.tar.gz", "my/BCCD.ZIP"):
        with pytest.raises(UserError, match=f"^{name}: is an archive, .*; unpack it .*'download:'"):
            load_names(name)
    with pytest.raises(UserError, match=r"^https://a\.b/c\.zip: is an address, .*'download:'"):
        load_names("https://a.b/c.zip")


def test_class_names_that_appear_twice_are_remarked(tmp_path):
    config = load_dataset_config(write(tmp_path, GOOD.replace("[cat, dog]", "[cat, dog, cat]")))
    assert config.names == ["cat", "dog", "cat"]
    assert config.remarks == (f"{config.yaml_path}: class names appear twice: cat",)
    assert load_dataset_config(write(tmp_path, GOOD)).remarks == ()


def test_a_yaml_without_path_may_be_meant_from_the_working_folder(tmp_path, monkeypatch):
    path = write(tmp_path, "train: ../coco/images/train/\nval: ../coco/images/val/\nnames: [cat]\n")
    work = tmp_path / "repo" / "yolov5"
    images = tmp_path / "repo" / "coco" / "images" / "train"
    for folder in (work, images):
        folder.mkdir(parents=True)
    assert load_dataset_config(path).root == tmp_path
    monkeypatch.chdir(work)
    assert load_dataset_config(path).entries("train") == (images,)
    beside = tmp_path.parent / "coco" / "images" / "train"
    try:
        beside.mkdir(parents=True)
        assert load_dataset_config(path).root == tmp_path
    finally:
        for folder in (beside, beside.parent, beside.parent.parent):
            folder.rmdir()


def test_names_can_be_read_where_the_data_is_not(tmp_path):
    assert load_names(write(tmp_path, GOOD.replace("here", "gone"))) == ["cat", "dog"]


def test_a_path_may_be_meant_from_the_working_folder_where_the_data_is_there_alone(tmp_path, monkeypatch):
    work, data = tmp_path / "yolov5", tmp_path / "datasets" / "mine"
    for folder in (work / "data", data / "train", data / "val"):
        folder.mkdir(parents=True)
    text = "path: ../datasets/mine\ntrain: train\nval: val\nnames: [cat]\n"
    (work / "data/mine.yaml").write_text(text)
    with pytest.raises(UserError, match="the data is not there"):
        load_dataset_config(work / "data/mine.yaml")
    monkeypatch.chdir(work)
    config = load_dataset_config("data/mine.yaml")
    assert config.root == data and str(data) in config.note and "\n" not in config.note
    (work / "datasets/mine").mkdir(parents=True)  # beside the YAML's folder, without the splits
    assert load_dataset_config("data/mine.yaml").root == data
    for split in ("train", "val"):
        (work / "datasets/mine" / split).mkdir()
    config = load_dataset_config("data/mine.yaml")
    assert (config.root, config.note) == (work / "datasets/mine", "")


def test_a_mistyped_data_dir_gets_the_nearest_folder_proposed(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match=rf"did you mean --data-dir {tmp_path / 'pictures'}\?"):
        load_dataset_config(write(tmp_path, GOOD), tmp_path / "picturse")


@pytest.mark.fault(
    "a path in a dataset YAML starts with `~` but names no user", "treated as an ordinary relative path"
)
def test_a_tilde_before_no_user_is_a_part_of_the_name(tmp_path):
    text = GOOD.replace("path: here", "path: ~no-such-user/x").replace("images/val", "~old")
    assert str(tmp_path / "~no-such-user/x") in message_of(write(tmp_path, text))
    copy = tmp_path / "~no-such-user/x"
    for folder in (copy / "images/train", copy / "~old"):
        folder.mkdir(parents=True)
    config = load_dataset_config(tmp_path / "set.yaml")
    assert config.entries("val") == (copy / "~old",)
    with pytest.raises(UserError, match="~no-such-user/copy"):
        load_dataset_config(tmp_path / "set.yaml", "~no-such-user/copy")


def test_a_tilde_alone_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in (
        GOOD.replace("path: here", "path: ~/here"),
        GOOD.replace("images/train", "~/here/images/train"),
    ):
        (entry,) = load_dataset_config(write(tmp_path, text)).entries("train")
        assert entry == tmp_path / "here/images/train"
