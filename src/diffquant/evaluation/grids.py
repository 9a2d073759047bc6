"""Grids of pictures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

CELL = 96  # pixels: smaller pictures are enlarged by a whole factor up to this side
GAP = 2  # pixels between pictures
NAME_WIDTH, NAME_LINES = 34, 4  # letters in a line of a name, and lines
INK, GREY, RULE = "#1a1a1a", "#6b6b6b", "#dddddd"


def draw_pairs(pictures: Mapping[str, UInt8[np.ndarray, "n c h w"]], captions: Mapping[str, str]) -> Image.Image:
    """One row of pictures per model, name and caption at the left, the same noise in each column; enlarged without smoothing."""
    images = {name: _enlarged(batch) for name, batch in pictures.items()}
    first = next(iter(images.values()))
    columns, (width, height) = len(first), first[0].size
    large, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    names = {name: folded(name) for name in pictures}
    texts = [(line, large) for lines in names.values() for line in lines] + [(text, small) for text in captions.values()]
    margin = 12
    left = 2 * margin + math.ceil(max(font.getlength(text) for text, font in texts))
    size = (left + columns * (width + GAP) - GAP + margin, 2 * margin + len(images) * (height + GAP) - GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left, margin, size[0] - margin - 1, size[1] - margin - 1), fill=RULE)  # shows through the gaps
    for row, (name, batch) in enumerate(images.items()):
        top = margin + row * (height + GAP)
        caption = captions.get(name, "")
        middle = top + height // 2 - (9 if caption else 0)  # of the name
        draw.multiline_text((margin, middle), "\n".join(names[name]), fill=INK, font=large, anchor="lm")
        draw.text((margin, middle + 9 * len(names[name]) + 14), caption, fill=GREY, font=small, anchor="ls")
        for column, image in enumerate(batch):
            canvas.paste(image, (left + column * (width + GAP), top))
    return canvas


def draw_grid(pictures: UInt8[np.ndarray, "n c h w"]) -> Image.Image:
    """The pictures in a nearly square grid, small ones enlarged without smoothing."""
    images = _enlarged(pictures)
    width, height = images[0].size
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    canvas = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), RULE)
    for index, image in enumerate(images):
        canvas.paste(image, (index % columns * (width + GAP), index // columns * (height + GAP)))
    return canvas


def _enlarged(pictures: UInt8[np.ndarray, "n c h w"]) -> list[Image.Image]:
    factor = max(1, CELL // max(pictures.shape[2:]))
    pixels = pictures.repeat(factor, axis=2).repeat(factor, axis=3)
    return [Image.fromarray(each[0] if len(each) == 1 else each[:3].transpose(1, 2, 0).copy()) for each in pixels]


def folded(name: str) -> list[str]:
    """A name in lines that leave room for what it names; of a very long one the beginning and the last line."""
    lines = textwrap.wrap(name, NAME_WIDTH)
    return lines if len(lines) <= NAME_LINES else [*lines[: NAME_LINES - 2], "...", lines[-1]]
