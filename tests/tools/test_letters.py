"""Letters come from usable fonts only, at any size, and training never sees a held-out font."""

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from diffquant.errors import ZooError
from diffquant.zoo.prompts import LETTERS
from tools.train_zoo.letters import Letters, draw_letters, render_font, render_letters


def test_fonts_that_cannot_be_used_are_passed_over(tmp_path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"not a font")
    assert render_font(broken) is None
    with pytest.raises(ZooError, match="0 usable fonts below .*; at least 50 are needed; install the font packages"):
        render_letters((tmp_path,))


def box_font(path):
    """A font whose letters are boxes, 700 units high and of 26 widths."""
    builder = FontBuilder(unitsPerEm=1000)
    builder.setupGlyphOrder([".notdef", *LETTERS])
    builder.setupCharacterMap({ord(letter): letter for letter in LETTERS})
    glyphs = {".notdef": TTGlyphPen(None).glyph()}
    for index, letter in enumerate(LETTERS):
        pen = TTGlyphPen(None)
        right = 100 + 20 * index
        pen.moveTo((0, 0))
        for corner in ((0, 700), (right, 700), (right, 0)):
            pen.lineTo(corner)
        pen.closePath()
        glyphs[letter] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (1000, 0) for name in glyphs})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Box", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_letters_are_drawn_at_any_size(tmp_path):
    box_font(tmp_path / "box.ttf")
    assert render_font(tmp_path / "box.ttf") is None  # some boxes are equal at 32x32
    for size in (32, 64):
        ink = draw_letters(tmp_path / "box.ttf", size) < 128
        assert ink.shape == (26, size, size)
        assert (ink.any(axis=2).sum(axis=1) == 0.75 * size).all()  # the longer side, the height


def test_split_keeps_fonts_apart():
    fonts = torch.arange(20).repeat_interleave(len(LETTERS))
    letters = Letters(torch.zeros(len(fonts), 32, 32, dtype=torch.uint8), torch.arange(26).repeat(20), fonts, ("x",) * 20)
    training, held_out = letters.split()
    assert set(held_out.fonts.tolist()) == {0, 10} and not set(training.fonts.tolist()) & {0, 10}
    assert training.samples().max() == -1.0
