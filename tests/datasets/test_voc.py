"""Annotations of the VOC layout."""

from __future__ import annotations

import numpy as np
import pytest

from utils.datasets.voc import AnnotationError, parse_voc

IDS = {"cat": 0, "dog": 1}


def annotation(objects: str, size: str = "<width>64</width><height>48</height>", start: str = "") -> bytes:
    return f"{start}<annotation>\n<size>{size}</size>\n{objects}</annotation>".encode()


def thing(name: str = "cat", box: tuple[object, ...] = (1, 1, 10, 20), difficult: str = "0") -> str:
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>\n<bndbox>{sides}</bndbox></object>\n"
    )


def test_pixels_count_from_one_and_both_ends_belong_to_the_box():
    found = parse_voc(annotation(thing() + thing("dog", (11.5, 5, 64, 48))), IDS)
    np.testing.assert_allclose(found.boxes, [[0, 0, 0, 10, 20], [1, 10.5, 4, 64, 48]])
    assert found.size_wh == (64, 48)


def test_difficult_objects_and_parts_of_objects_are_left_out():
    with_part = thing("dog").replace("</object>", "<part><name>head</name></part></object>")
    found = parse_voc(annotation(thing(difficult="1") + with_part), IDS)
    assert found.boxes[:, 0].tolist() == [1]


def test_an_annotation_may_have_no_objects_and_no_size():
    found = parse_voc(b"<annotation></annotation>", IDS)
    assert (found.boxes.shape, found.size_wh) == ((0, 5), (0, 0))


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (annotation(thing() + thing("cow")), 5, "'cow'"),
        (annotation(thing(box=(1, "x", 2, 2))), 3, "'bndbox/ymin' is 'x'"),
        (annotation("<object><name>cat</name></object>"), 3, "bndbox/xmin"),
        (annotation(thing(box=(9, 1, 2, 2))), 3, "ends before it starts"),
        (annotation(thing())[:-9], 5, "no valid XML"),
        (b"", 1, "no valid XML"),
        (annotation("", start='<!DOCTYPE a [<!ENTITY b "c">]>'), 1, "DTD"),
        (annotation("", start='<!DOCTYPE a SYSTEM "file:///etc/passwd">'), 1, "DTD"),
        (annotation("\n" + "<a/>" * 1_000_000), 4, "more than 200,000 elements"),
        (annotation(" " * (16 << 20)), 1, "more than 16 MiB"),
        (annotation("", start="<!DOCTYPE a>").decode().encode("utf-16"), 1, "DTD"),
    ],
    ids=range(11),
)
def test_what_is_wrong_is_named_with_its_line(content, line, what):
    with pytest.raises(AnnotationError) as caught:
        parse_voc(content, IDS)
    assert caught.value.line == line
    assert what in caught.value.what
