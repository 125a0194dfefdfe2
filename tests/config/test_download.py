"""What `download:` of a dataset YAML may say, and what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.config.dataset import load_dataset_config, load_names
from utils.config.download import ArchiveStep, CocoStep, read_download
from utils.errors import UserError

HEAD = "path: here\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"
STEP = "download:\n  - url: https://x.org/a.zip\n"
GOOD = {"url": ["https://x.org/sets/a%20b.zip", "http://y.org/a.zip"], "file": "a.zip", "splits": "train"}


def message_of(tmp_path: Path, text: str) -> str:
    (tmp_path / "set.yaml").write_text(HEAD + text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_dataset_config(tmp_path / "set.yaml", may_be_absent=True)
    return str(caught.value)


def test_steps_are_typed_and_say_which_splits_need_them():
    found, problems = read_download(
        [GOOD, {"coco": "a.json", "pictures": "i", "labels": "l", "list_file": "t.txt"}]
    )
    assert problems == []
    first, second = found.steps
    assert isinstance(first, ArchiveStep) and (first.name, first.splits, first.bytes_about) == (
        "a.zip",
        ("train",),
        0,
    )
    assert isinstance(second, CocoStep) and second.gives == ("l", "t.txt")
    assert found.steps_for(("val",)) == (second,)
    assert found.steps_for(("train",)) == (first, second)
    assert ArchiveStep(url=("https://x.org/a.zip?x=1",), about_mb=1.5).bytes_about == 1_500_000


def test_a_single_step_and_a_bare_address_will_do_and_other_text_is_words():
    assert read_download({"url": "https://x.org/a.tgz"})[0].steps[0].name == "a.tgz"
    assert read_download("https://x.org/a.tgz")[0].steps[0].anywhere
    for words in (
        "get it yourself",
        "https://x.org/page",
        "https://x.org/a.zip and unpack it",
        "curl x | sh",
        "https://[x/a.zip",
    ):
        found, problems = read_download(words)
        assert (found.steps, found.words, problems) == ((), words, [])
    assert read_download(None)[0] == read_download("")[0]
    assert len(read_download("echo " * 1000)[0].advice()) < 220


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (STEP + "    md6: x\n", "line 7: unknown key 'md6', did you mean 'md5'?"),
        (STEP + "    md5: abc\n", "line 7: 'md5' has 32 hexadecimal digits"),
        (STEP + "    size: -3\n", "line 7: size: -3 must be a whole number of 0 or more"),
        (STEP + "    size: large\n", "line 7: size: 'large' must be a whole number"),
        (
            STEP + "    splits: [trian]\n",
            "line 7: splits: ['trian'] must be one of train, val, test, unlabeled, did you mean",
        ),
        (STEP + "    into: ../../x\n", "line 7: 'into' must lead to a place under path:"),
        (STEP + "    gives: [a, /etc]\n", "line 7: 'gives' must lead to a place under path:"),
        (STEP + "    take: a//b\n", "line 7: 'take' must lead"),
        (STEP + "  - gives: a\n", "line 7: 'url' is missing"),
        (
            STEP.replace("https", "file"),
            "line 6: 'file://x.org/a.zip' is not an address of http:// or https://",
        ),
        (STEP.replace("https://x.org", "ftp://x.org"), "is not an address"),
        (STEP.replace("https://", "https://me:pass@"), "must not hold a user or a password"),
        (STEP.replace("a.zip", "a.exe"), "line 6: 'a.exe' is not an archive of a known kind"),
        (STEP.replace("a.zip", ""), "'' is no name for a file"),
        (STEP + "    file: ../a.zip\n", "line 7: '../a.zip' is no name for a file"),
        (STEP + "    file: -a.zip\n", "is no name for a file"),
        ("download: [bash get.sh]\n", "line 5: a step of 'download' has lines such as 'url: https://...'"),
        ("download: 7\n", "line 5: 'download' must be an address, or a list of steps"),
        ("download:\n  - coco: a.json\n", "line 6: 'pictures' is missing; line 6: 'labels' is missing"),
        (
            "download: {url: 'https://x.org/a.zip', sise: 3}\n",
            "line 5: unknown key 'sise', did you mean 'size'?",
        ),
        ("download: https://me@x.org/a.zip\n", "line 5: an address must not hold a user"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path, text, expected):
    message = message_of(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'set.yaml'}: ") and expected in message


def test_the_first_folder_with_all_the_data_counts_and_absent_data_belongs_into_the_first(tmp_path):
    (tmp_path / "set.yaml").write_text(HEAD.replace("here", "[a, b, c]"), encoding="utf-8")
    assert load_dataset_config(tmp_path / "set.yaml", may_be_absent=True).root == tmp_path / "a"
    for part in ("b/images/train", "c/images/train", "c/images/val"):
        (tmp_path / part).mkdir(parents=True)
    assert load_dataset_config(tmp_path / "set.yaml").root == tmp_path / "c"
    (tmp_path / "c/images/val").rmdir()
    assert load_dataset_config(tmp_path / "set.yaml").root == tmp_path / "b"


SHIPPED = Path(__file__).resolve().parents[2] / "data"


@pytest.mark.parametrize("name", ["voc", "voc2007", "coco", "coco128", "bccd"])
def test_the_shipped_sets_have_several_sources_and_say_what_comes(name):
    config = load_dataset_config(SHIPPED / f"{name}.yaml", may_be_absent=True)
    for step in config.download.steps:
        if isinstance(step, ArchiveStep):
            assert len(step.url) >= 2 and step.bytes_about and step.unpacked_mb and step.gives
            assert bool(step.md5 or step.sha256) == (name in ("voc", "voc2007", "coco")) == bool(step.size)
    assert config.download.steps_for(("train", "val")) == config.download.steps


def test_voc_has_the_20_classes_trains_on_trainval_and_tests_on_2007():
    both, one = (
        load_dataset_config(SHIPPED / f"{name}.yaml", may_be_absent=True) for name in ("voc", "voc2007")
    )
    assert both.names == one.names == sorted(both.names) and both.nc == 20
    assert [path.relative_to(both.root).as_posix() for path in both.splits["train"]] == [
        "VOC2007/ImageSets/Main/trainval.txt",
        "VOC2012/ImageSets/Main/trainval.txt",
    ]
    assert one.splits["train"] == both.splits["train"][:1]
    assert both.splits["val"] == both.splits["test"] == one.splits["test"]
    assert one.root == both.root and load_names("voc2007") == one.names
