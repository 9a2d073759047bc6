"""What a font's own metadata says of its style, in words such as "bold italic serif".

Nobody labelled a picture: weight, width, slant and family come from the tables that every font file carries (OpenType names:
``OS/2``, ``post``, ``name``). A font that does not say something gets no word for it, nor does the normal case (regular, upright).
"""

from __future__ import annotations

from typing import Any

WEIGHT_CLASSES = ((275, "thin"), (350, "light"), (550, ""), (750, "bold"), (1000, "black"))  # usWeightClass up to, word
ITALIC_BITS = 1 << 0 | 1 << 9  # fsSelection: italic, oblique
BOLD_BIT = 1 << 5  # fsSelection
NAME_WORDS = {"mono": (" mono", " code", "typewriter"), "script": ("script", "hand"), "sans": ("sans",), "serif": ("serif",)}
SCRIPT_PANOSE, LATIN_PANOSE = 3, 2  # bFamilyType
SERIF_PANOSE, SANS_PANOSE = range(2, 11), range(11, 16)  # bSerifStyle of Latin text
SERIF_CLASSES, SANS_CLASS, SCRIPT_CLASS = (1, 2, 3, 4, 5, 7), 8, 10  # high byte of sFamilyClass


def style_of(font: Any) -> str:
    """The words that the metadata of `font` (a fontTools ``TTFont``) support: weight, width, slant, family."""
    os2, post = (font.get(table) for table in ("OS/2", "post"))
    subfamily = _name(font, 17, 2)
    words = (_weight(os2, subfamily), _width(os2, subfamily), _slant(os2, post, subfamily), _family(os2, post, _name(font, 16, 1)))
    return " ".join(word for word in words if word)


def _name(font: Any, *identifiers: int) -> str:
    """The first name there is among `identifiers`, lower case (16 and 17 are the typographic ones, 1 and 2 the legacy ones)."""
    names = (font["name"].getDebugName(identifier) for identifier in identifiers if "name" in font)
    return next((str(name).lower() for name in names if name), "")


def _weight(os2: object, subfamily: str) -> str:
    weight = getattr(os2, "usWeightClass", 400)
    if weight < 10:  # a scale of 1 to 9, from before OpenType 1.0
        weight *= 100
    word = next((word for limit, word in WEIGHT_CLASSES if weight <= limit), "")
    bold = getattr(os2, "fsSelection", 0) & BOLD_BIT or "bold" in subfamily
    return "bold" if not word and bold else word


def _width(os2: object, subfamily: str) -> str:
    width = getattr(os2, "usWidthClass", 5)  # 1 to 9, 5 is normal
    if 1 <= width <= 4 or "condensed" in subfamily or "narrow" in subfamily:
        return "condensed"
    return "expanded" if 6 <= width <= 9 or "expanded" in subfamily or "extended" in subfamily else ""


def _slant(os2: object, post: object, subfamily: str) -> str:
    slanted = getattr(os2, "fsSelection", 0) & ITALIC_BITS or getattr(post, "italicAngle", 0) != 0
    return "italic" if slanted or "italic" in subfamily or "oblique" in subfamily else ""


def _family(os2: object, post: object, family: str) -> str:
    """What is said first counts: fixed pitch, words of the family's name, then PANOSE and sFamilyClass."""
    if getattr(post, "isFixedPitch", 0):
        return "mono"
    for named, words in NAME_WORDS.items():
        if any(word in family for word in words):
            return named
    panose = getattr(os2, "panose", None)
    kind, serif = getattr(panose, "bFamilyType", 0), getattr(panose, "bSerifStyle", 0)
    family_class = getattr(os2, "sFamilyClass", 0) >> 8
    if kind == SCRIPT_PANOSE or family_class == SCRIPT_CLASS:
        return "script"
    if (kind == LATIN_PANOSE and serif in SANS_PANOSE) or family_class == SANS_CLASS:
        return "sans"
    return "serif" if (kind == LATIN_PANOSE and serif in SERIF_PANOSE) or family_class in SERIF_CLASSES else ""
