"""Names in letters that DejaVu Sans lacks: drawn with an installed font, else as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from utils.reporting import draw, fonts
from utils.reporting.draw import draw_boxes, drawable, name_of
from utils.reporting.plots import chart_style, new_figure, save_figure

NAME = "猫"


def make_font(path: Path, letters: set[int]) -> None:
    """Writes a font in which every letter is the same square."""
    pen = TTGlyphPen(None)
    for number, corner in enumerate([(100, 0), (100, 700), (800, 700), (800, 0)]):
        (pen.moveTo if number == 0 else pen.lineTo)(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap(dict.fromkeys(letters, "square"))
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (900, 0), "square": (900, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The fonts of the system, at first none; nothing of them is remembered before and after."""
    found: list[str] = []
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: list(found))

    def forget() -> None:
        for cache in (fonts._installed, fonts._installed_font, draw._text_mask, draw._warn_of_numbers):
            cache.cache_clear()

    forget()
    yield found
    forget()


@pytest.fixture
def squares(tmp_path: Path, installed: list[str]) -> str:
    """A font that has the name's letter is installed, among some that do not serve."""
    for stem, letters in (
        ("NotoSansCJK-Regular", {ord(NAME)}),  # no digits for a confidence
        ("WQY-MicroHei", {ord(NAME), *fonts.ASCII}),
        ("unknown", {ord(NAME), *fonts.ASCII}),
    ):
        make_font(tmp_path / f"{stem}.ttf", letters)
        installed.append(str(tmp_path / f"{stem}.ttf"))
    (tmp_path / "notosanssc-regular.otf").write_bytes(b"damaged")
    installed.append(str(tmp_path / "notosanssc-regular.otf"))
    return str(tmp_path / "WQY-MicroHei.ttf")


def test_a_name_without_a_font_is_its_number_with_one_warning(
    installed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["cat", NAME, "dog", NAME * 2]
    assert [name_of(number, names) for number in range(4)] == ["cat", "1", "dog", "3"]
    said = capsys.readouterr().err
    assert said.count("warning: no font here has all letters of the class names") == 1
    assert "fonts-noto-cjk" in said


def test_an_installed_font_draws_what_is_lacking(squares: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fonts.font_for(NAME) == fonts.font_for(f"{NAME} 0.87") == squares
    assert name_of(0, [NAME]) == NAME and drawable(f"{NAME}\n") == "??"
    image = np.full((240, 320, 3), 114, np.uint8)
    by_name, by_number = (
        draw_boxes(image.copy(), np.array([[50.0, 100, 150, 160]]), [0], names) for names in ([NAME], [])
    )
    assert (by_name != by_number).any() and capsys.readouterr().err == ""


def test_charts_show_it_too(
    squares: str, tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """matplotlib warns of every letter that it cannot draw."""
    with chart_style():
        figure = new_figure(4, 3)
        axes = figure.subplots()
        axes.plot([0, 1], label=f"0.9 {NAME}")
        axes.set_xticks([0, 1], ["cat", NAME])
        axes.set_title(f"{NAME}\n{NAME}")
        figure.legend()
        save_figure(figure, tmp_path / "chart.png")
    assert not [str(one.message) for one in recwarn]


def test_ordinary_names_look_for_no_font(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> tuple[str, ...]:
        pytest.fail("looked for")

    monkeypatch.setattr(fonts, "_installed", never)
    assert [name_of(0, [name]) for name in ("cat", "größe", "тарелка")] == ["cat", "größe", "тарелка"]
