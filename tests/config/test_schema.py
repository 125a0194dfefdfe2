"""YAML files: plain values, lines in messages, nothing executed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from utils.config.schema import MAX_BYTES, load_yaml, yaml_text
from utils.errors import UserError


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "set.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_data_comes_with_the_line_of_each_key(tmp_path: Path) -> None:
    data, lines = load_yaml(write(tmp_path, "\ufeff# set\nnames: [a, b]\n\nnested:\n  names: 3\n7: seven\n"))
    assert data == {"names": ["a", "b"], "nested": {"names": 3}, "7": "seven"}
    assert lines == {"names": 2, "names.0": 2, "names.1": 2, "nested": 4, "nested.names": 5, "7": 6}


@pytest.mark.fault(
    "YAML with syntax errors, deep nesting, duplicate keys, over 4 MiB or 200,000 values, or not in UTF-8",
    "refused with the file name and, where there is one, the line",
)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", ("line 3", "not valid YAML")),
        ("a: 1\n\tb: 2\n", ("line 2", "not valid YAML")),
        ("a: !!python/object/apply:os.system ['touch gone']\n", ("line 1", "python/object/apply")),
        ("a: &x [1]\na: *y\n", ("not valid YAML", "undefined alias")),
        ("a: 1\nb: &x [1, [*x]]\n", ("line 2", "a value contains itself")),
        ("b: &x {c: 1, d: {e: *x}}\n", ("line 1", "a value contains itself")),
        ("a: 1\n---\nb: 2\n", ("not valid YAML", "another document")),
        ("d: 2001-99-99\n", ("not valid YAML", "month")),
        ("n: " + "9" * 5000 + "\n", ("not valid YAML", "5000 digits")),
        ("x: 1:" + "59:" * 200 + "59.5\n", ("not valid YAML", "too large")),
        ("a: 1\nb: {9999999999999999: 1}\n", ("line 2", "a number of 16 digits")),
        ("[" * 3000 + "]" * 3000, ("not valid YAML", "deep")),
        ("- a\n- b\n", ("'key: value'",)),
        ("just text\n", ("'key: value'",)),
        ("", ("'key: value'",)),
        ("lr0: 1\nbox: 2\nlr0: 3\n", ("lines 1 and 3", "'lr0' is given twice")),
        ("names:\n  0: cat\n  0: dog\n", ("lines 2 and 3", "'0' is given twice")),
        ("x: {a: 1, a: 2}\n", ("lines 1 and 1", "'a' is given twice")),
        (b"a: 1\nb: caf\xe9\n", ("line 2", "UTF-8")),
        (b"a: 1\nb: \x00\n", ("line 2", "character 0x00")),
        (b"#" * (MAX_BYTES + 1), ("4 MiB",)),
        (b"a: 1\nx: [" + b"1, " * 1_300_000 + b"]\n", ("line 2", "more than 200,000 values")),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, str | bytes) else "",
)  # fmt: skip
def test_what_is_no_settings_file_is_refused_with_its_place(
    tmp_path: Path, text: str, words: tuple[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_yaml(path)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert not (tmp_path / "gone").exists() and not Path("gone").exists()


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: cannot be read \(No such file"):
        load_yaml(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        load_yaml(tmp_path)


def test_mappings_may_be_taken_over_more_than_once(tmp_path: Path) -> None:
    text = "a: &a {x: 1}\nb: &b {y: 2}\nc:\n  <<: *a\n  <<: *b\n"
    data, _ = load_yaml(write(tmp_path, text))
    assert data["c"] == {"x": 1, "y": 2}


def test_written_text_is_read_back_in_its_order() -> None:
    data = {"z": [1, 2], "a": None, "name": "größer", "path": "1e-3", "no": "no", "deep": {"b": 1.5}}
    assert list(yaml.safe_load(yaml_text(data)).items()) == list(data.items())
    assert "größer" in yaml_text(data)


def test_a_pipe_is_refused_without_waiting_for_someone_to_write(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"a\.yaml: cannot be read \(it is not a regular file\)"):
        load_yaml(tmp_path / "a.yaml")
