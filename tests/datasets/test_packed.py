"""Packed sequences are what the lists would be."""

import numpy as np
import pytest

from utils.datasets.packed import PackedRows, PackedTexts

TEXTS = ["a.jpg", "", "bild ü.png", "\udcff.jpg", "z"]


def test_texts_come_back_as_they_were():
    packed = PackedTexts(TEXTS)
    assert packed == TEXTS and list(packed) == TEXTS and len(packed) == 5
    assert packed[-1] == "z" and packed[1:4] == TEXTS[1:4] and "z" in packed
    assert packed[np.int64(2)] == TEXTS[2]
    for wrong in (5, -6):
        with pytest.raises(IndexError):
            packed[wrong]
    assert list(PackedTexts([])) == [] and PackedTexts(["ab"]) != PackedTexts(["a", "b"])


def test_rows_come_back_as_they_were():
    arrays = [np.full((count, 5), count, np.float32) for count in (2, 0, 3)]
    packed = PackedRows.of(arrays)
    assert all(np.array_equal(own, other) for own, other in zip(packed, arrays, strict=True))
    assert packed[-1].shape == (3, 5) and len(packed[0:2]) == 2 and packed.values.dtype == np.float32
    assert packed.counts.tolist() == [2, 0, 3]
    assert np.shares_memory(packed[0], packed.values)
    assert PackedRows.of([]).values.shape == (0, 5)
