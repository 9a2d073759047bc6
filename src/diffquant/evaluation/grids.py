"""Grids of what was drawn, as pictures."""

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
    first = next(iter(pictures.values()))
    columns, _, height, width = first.shape
    factor = max(1, CELL // max(height, width))
    cell_height, cell_width = height * factor, width * factor
    large, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    names = {name: folded(name) for name in pictures}
    texts = [(line, large) for lines in names.values() for line in lines] + [(text, small) for text in captions.values()]
    margin = 12
    left = 2 * margin + math.ceil(max(font.getlength(text) for text, font in texts))
    size = (left + columns * (cell_width + GAP) - GAP + margin, 2 * margin + len(pictures) * (cell_height + GAP) - GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left, margin, size[0] - margin - 1, size[1] - margin - 1), fill=RULE)  # shows through the gaps
    for row, (name, batch) in enumerate(pictures.items()):
        top = margin + row * (cell_height + GAP)
        caption = captions.get(name, "")
        middle = top + cell_height // 2 - (9 if caption else 0)  # of the name
        draw.multiline_text((margin, middle), "\n".join(names[name]), fill=INK, font=large, anchor="lm")
        draw.text((margin, middle + 9 * len(names[name]) + 14), caption, fill=GREY, font=small, anchor="ls")
        for column, picture in enumerate(batch):
            canvas.paste(_enlarged(picture, cell_width, cell_height), (left + column * (cell_width + GAP), top))
    return canvas


def draw_grid(pictures: UInt8[np.ndarray, "n c h w"]) -> Image.Image:
    """The pictures in a nearly square grid, small ones enlarged without smoothing."""
    count, _, height, width = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    factor = max(1, CELL // max(height, width))
    cell_height, cell_width = height * factor, width * factor
    canvas = Image.new("RGB", (columns * (cell_width + GAP) - GAP, rows * (cell_height + GAP) - GAP), RULE)
    for index, picture in enumerate(pictures):
        place = (index % columns * (cell_width + GAP), index // columns * (cell_height + GAP))
        canvas.paste(_enlarged(picture, cell_width, cell_height), place)
    return canvas


def _enlarged(picture: UInt8[np.ndarray, "c h w"], width: int, height: int) -> Image.Image:
    pixels = picture[0] if len(picture) == 1 else picture[:3].transpose(1, 2, 0)  # [h, w] or [h, w, 3]
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def folded(name: str) -> list[str]:
    """A name in lines that leave room for what it names; of a very long one the beginning and the last line."""
    lines = textwrap.wrap(name, NAME_WIDTH)
    return lines if len(lines) <= NAME_LINES else [*lines[: NAME_LINES - 2], "...", lines[-1]]
