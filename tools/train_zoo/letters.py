"""Capital letters rendered from installed fonts: the data the reference models are trained on.

The fonts come from Debian's font packages, which ``README.md`` here lists. A font is used when it
really has the 26 letters: one glyph each, 26 different pictures, and shapes that resemble the median shape of the letter, which
drops symbol fonts, boxes for missing glyphs, and faces that nobody can read. What a font says of its style
is kept with it (`style.style_of`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track
from torch import Tensor

from diffquant.errors import ZooError
from diffquant.zoo.models import SIZE, to_samples
from diffquant.zoo.prompts import LETTERS
from tools.train_zoo.style import style_of

LARGE_SIZE = 64  # pixels, height and width of the pictures that the latent models are trained on
INK_SHARE = 0.75  # of that, the longer side of a letter
RENDER_SIZE = 160  # points at which a letter is drawn before it is scaled down
MIN_AGREEMENT = 14  # of 26 letters must be nearest to the median shape of the right letter
HELD_OUT_EVERY = 10  # every tenth font is kept for validation
FONT_DIRECTORIES = (Path("/usr/share/fonts"), Path("/usr/share/texmf/fonts"), Path("/usr/local/share/fonts"))


def rgb_samples(pictures: UInt8[Tensor, "n h w"]) -> Float[Tensor, "n 3 h w"]:
    """Grey pictures as samples of three equal channels, channels last in memory."""
    return to_samples(pictures)[:, None].expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Letters:
    """Pictures of capital letters, and where they come from.

    ``pictures`` are grey values, 0 (ink) to 255 (paper); ``labels`` index `LETTERS`; ``fonts`` index ``names`` and ``styles``, the
    words that the fonts' metadata support.
    """

    pictures: UInt8[Tensor, "n size size"]
    labels: Int[Tensor, " n"]
    fonts: Int[Tensor, " n"]
    names: tuple[str, ...]
    styles: tuple[str, ...] = ()

    def samples(self) -> Tensor:
        """The pictures as the model sees them: float32 in [-1, 1], ``[n, 1, size, size]``."""
        return to_samples(self.pictures)[:, None]

    def split(self) -> tuple[Letters, Letters]:
        """Letters of nine tenths of the fonts, and those of the held-out tenth."""
        held_out = self.fonts % HELD_OUT_EVERY == 0
        return self._subset(~held_out), self._subset(held_out)

    def digest(self) -> str:
        """SHA-256 over pictures and labels, to name the data set in a protocol."""
        sha = hashlib.sha256(self.pictures.numpy().tobytes())
        sha.update(self.labels.numpy().tobytes())
        return sha.hexdigest()

    def _subset(self, keep: Tensor) -> Letters:
        return Letters(self.pictures[keep], self.labels[keep], self.fonts[keep], self.names, self.styles)


@dataclass(frozen=True)
class Face:
    """The 26 letters of a font file, uint8 ``[26, 32, 32]``, and the words of its style."""

    path: Path
    style: str
    letters: np.ndarray


def render_letter(font: ImageFont.FreeTypeFont, letter: str, size: int = SIZE) -> np.ndarray | None:
    """One letter, centred, its longer side `INK_SHARE` of `size`: uint8 ``[size, size]``; None where the font draws nothing."""
    left, top, right, bottom = font.getbbox(letter)
    width, height = int(right - left), int(bottom - top)
    if width < 4 or height < 4 or max(width, height) > 20 * RENDER_SIZE:
        return None
    ink = Image.new("L", (width, height), 255)
    ImageDraw.Draw(ink).text((-left, -top), letter, font=font, fill=0)
    inked = Image.eval(ink, lambda value: 255 - value).getbbox()
    if inked is None:
        return None
    ink = ink.crop(inked)
    scale = INK_SHARE * size / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.LANCZOS)
    picture = Image.new("L", (size, size), 255)
    picture.paste(ink, ((size - ink.width) // 2, (size - ink.height) // 2))
    return np.asarray(picture)


def draw_letters(path: Path, size: int = SIZE) -> np.ndarray:
    """The 26 letters of a font file, uint8 ``[26, size, size]``. Raises `ValueError` where it draws nothing for one of them."""
    font = ImageFont.truetype(str(path), RENDER_SIZE)
    pictures = [picture for letter in LETTERS if (picture := render_letter(font, letter, size)) is not None]
    if len(pictures) < len(LETTERS):
        raise ValueError(f"{path}: draws {len(pictures)} of {len(LETTERS)} letters")
    return np.stack(pictures)


def render_font(path: Path) -> Face | None:
    """The letters and the style of a font; None where the font cannot be used.

    A font is refused when it is unreadable, lacks a letter, maps two letters to one picture, or draws (nearly) blank or black ones.
    """
    from fontTools.ttLib import TTFont, TTLibError  # comes with the extra dev

    try:
        with path.open("rb") as file, TTFont(file, fontNumber=0, lazy=True) as tables:
            coverage, style = tables.getBestCmap() or {}, style_of(tables)
        if any(ord(letter) not in coverage for letter in LETTERS):
            return None
        letters = draw_letters(path)
    except (OSError, TTLibError, KeyError, ValueError, AssertionError):
        return None  # a damaged or bitmap-only font: one of many, not worth stopping for
    if len({picture.tobytes() for picture in letters}) < len(LETTERS):
        return None
    ink_share = 1.0 - letters.mean(axis=(1, 2)) / 255.0
    return Face(path, style, letters) if ink_share.min() > 0.02 and ink_share.max() < 0.5 else None


def usable_fonts(directories: tuple[Path, ...]) -> list[Face]:
    """Every usable font below `directories`; fonts with equal letters count once.

    Raises `ZooError` when there are fewer than 50.
    """
    files = sorted(path for root in directories for path in root.rglob("*") if path.suffix.lower() in {".ttf", ".otf", ".ttc"})
    by_picture: dict[bytes, Face] = {}
    for path in track(files, description="rendering fonts"):
        face = render_font(path)
        if face is not None:
            by_picture.setdefault(hashlib.sha256(face.letters.tobytes()).digest(), face)
    fonts = _legible(list(by_picture.values()))
    if len(fonts) < 50:
        raise ZooError(
            f"fonts: {len(fonts)} usable fonts below {', '.join(map(str, directories))}; at least 50 are needed; "
            "install the font packages that tools/train_zoo/README.md lists"
        )
    return fonts


def render_letters(directories: tuple[Path, ...] = FONT_DIRECTORIES, size: int = SIZE) -> Letters:
    """Render the capital letters of every usable font below `directories`.

    Which fonts are usable is decided at 32x32 whatever the `size`, so that all sizes hold out the same fonts.
    Raises `ZooError` when fewer than 50 fonts are usable.
    """
    fonts = usable_fonts(directories)
    letters = [face.letters if size == SIZE else draw_letters(face.path, size) for face in fonts]
    return Letters(
        pictures=torch.from_numpy(np.concatenate(letters)),
        labels=torch.arange(len(LETTERS)).repeat(len(fonts)),
        fonts=torch.arange(len(fonts)).repeat_interleave(len(LETTERS)),
        names=tuple(face.path.name for face in fonts),
        styles=tuple(face.style for face in fonts),
    )


def _legible(fonts: list[Face]) -> list[Face]:
    """The fonts whose letters are mostly nearest to the median shape of the right letter."""
    if not fonts:
        return []
    median = np.median(np.stack([face.letters for face in fonts]), axis=0).reshape(len(LETTERS), -1)  # [26, size * size]
    legible = []
    for face in fonts:
        flat = face.letters.reshape(len(LETTERS), -1).astype(np.float32)
        distance = ((flat[:, None] - median[None]) ** 2).sum(axis=-1)  # [26 letters, 26 medians]
        if (distance.argmin(axis=1) == np.arange(len(LETTERS))).sum() >= MIN_AGREEMENT:
            legible.append(face)
    return legible
