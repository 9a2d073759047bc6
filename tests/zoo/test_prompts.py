"""Prompts say what a font's metadata says, and each of their words is one token."""

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib.tables.O_S_2f_2 import Panose

from diffquant.errors import ZooError
from diffquant.zoo.prompts import LETTERS, PROMPT_TOKENS, WORDS, labels_of, prompt_of, style_of, tokenize, tokenizer


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


def test_prompts_end_in_the_letter_that_they_ask_for():
    assert prompt_of("bold italic serif", 6) == "bold italic serif letter G"
    assert prompt_of("", 0) == "letter A"
    assert labels_of([prompt_of("bold", label) for label in range(26)]).tolist() == list(range(26))
    assert labels_of(["letter g"]).tolist() == [6]
    for prompt in ("", "letter", "letter AB"):
        with pytest.raises(ZooError, match=f"prompt '{prompt}': names no letter; allowed are prompts that end in one"):
            labels_of([prompt])


def test_every_word_and_letter_is_one_token():
    words = tokenizer()
    ids = [words(word).input_ids for word in (*WORDS, *LETTERS)]
    assert all(len(row) == 3 for row in ids)  # start, the word, end
    assert len({row[1] for row in ids}) == len(WORDS) + len(LETTERS)


def test_tokens_round_trip_and_survive_saving(tmp_path):
    words = tokenizer()
    longest = "bold condensed italic serif letter G"
    assert words.decode(words(longest).input_ids, skip_special_tokens=True).strip() == longest.lower()
    words.save_pretrained(tmp_path)
    assert torch.equal(tokenize(type(words).from_pretrained(tmp_path), [longest, ""]), tokenize(words, [longest, ""]))
    assert tokenize(words, ["letter G"]).shape == (1, PROMPT_TOKENS)
