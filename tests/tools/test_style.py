"""The words for a font's style are those that its metadata says."""

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib.tables.O_S_2f_2 import Panose

from tools.train_zoo.style import style_of


def font(
    family: str = "Nameless",
    subfamily: str = "Regular",
    panose: tuple[int, int] = (0, 0),
    fixed: int = 0,
    angle: float = 0,
    **os2: int,
):
    """A font with metadata and nothing else."""
    builder = FontBuilder(unitsPerEm=1000)
    builder.setupGlyphOrder([".notdef"])
    builder.setupCharacterMap({})
    builder.setupHorizontalMetrics({".notdef": (500, 0)})
    builder.setupNameTable({"familyName": family, "styleName": subfamily})
    builder.setupOS2(panose=Panose(bFamilyType=panose[0], bSerifStyle=panose[1], **dict.fromkeys(OTHER_PANOSE, 0)), **os2)
    builder.setupPost(isFixedPitch=fixed, italicAngle=angle)
    return builder.font


OTHER_PANOSE = ("bWeight", "bProportion", "bContrast", "bStrokeVariation", "bArmStyle", "bLetterForm", "bMidline", "bXHeight")


@pytest.mark.parametrize(
    ("metadata", "style"),
    [
        ({}, ""),
        ({"usWeightClass": 250}, "thin"),
        ({"usWeightClass": 300}, "light"),
        ({"usWeightClass": 500}, ""),
        ({"usWeightClass": 600}, "bold"),
        ({"usWeightClass": 7}, "bold"),  # the old scale of 1 to 9
        ({"usWeightClass": 900}, "black"),
        ({"subfamily": "Bold"}, "bold"),
        ({"fsSelection": 1 << 5}, "bold"),
        ({"fsSelection": 1 << 0}, "italic"),
        ({"angle": -12.0}, "italic"),
        ({"subfamily": "Oblique"}, "italic"),
        ({"usWidthClass": 3}, "condensed"),
        ({"usWidthClass": 7}, "expanded"),
        ({"family": "Great Sans Serif"}, "sans"),
        ({"family": "Great Serif"}, "serif"),
        ({"family": "Great Serif", "fixed": 1}, "mono"),
        ({"family": "Monotony"}, ""),
        ({"panose": (2, 4)}, "serif"),
        ({"panose": (2, 11)}, "sans"),
        ({"panose": (3, 4)}, "script"),
        ({"sFamilyClass": 8 << 8}, "sans"),
        ({"sFamilyClass": 1 << 8}, "serif"),
        ({"usWeightClass": 700, "usWidthClass": 3, "angle": -9.0, "panose": (2, 2)}, "bold condensed italic serif"),
    ],
)
def test_style_is_what_the_metadata_says(metadata, style):
    assert style_of(font(**metadata)) == style


def test_font_without_tables_has_no_style():
    assert style_of(FontBuilder(unitsPerEm=1000).font) == ""
