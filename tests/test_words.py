"""Counts and lists in messages."""

import pytest

from utils.words import counted, found_in_words, listed


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("image", "images"), ("epoch", "epochs"), ("batch", "batches"), ("bus", "buses"),
        ("cross", "crosses"), ("box", "boxes"), ("wine glass", "wine glasses"),
        ("toothbrush", "toothbrushes"), ("bench", "benches"), ("kite", "kites"),
    ],
)  # fmt: skip
def test_a_count_has_its_noun_in_the_right_number(noun, many):
    assert [counted(number, noun) for number in (0, 1, 2)] == [f"0 {many}", f"1 {noun}", f"2 {many}"]


def test_an_irregular_plural_is_given():
    assert counted(2, "person", "people") == "2 people"


def test_objects_are_counted_by_class_and_classes_listed():
    assert found_in_words([2, 0, 2], ["dog", "cat", "bus"]) == "1 dog, 2 buses"
    assert found_in_words([], ["dog"]) == ""
    assert listed(["dog"]) == "1 class (dog)"
    assert listed(["a", "b", "c"], most=2) == "3 classes (a, b, ...)"
