"""Capital letters rendered from installed fonts: the data the reference models are trained on.

The fonts come from Debian's font packages (``zoo/README.md`` lists them) and are needed for training only. A font is kept when it
really has the 26 letters: one glyph each, 26 different pictures, and shapes that resemble the median shape of the letter, which
drops symbol fonts, boxes for missing glyphs, and faces that nobody can read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fontTools.ttLib import TTFont, TTLibError
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track
from torch import Tensor

from diffquant.core.spec import ZooError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIZE = 32  # pixels, height and width of a picture
INK_BOX = 24  # pixels, the longer side of a letter
RENDER_SIZE = 160  # points at which a letter is drawn before it is scaled down
MIN_AGREEMENT = 14  # of 26 letters must be nearest to the median shape of the right letter
HELD_OUT_EVERY = 10  # every tenth font is kept for validation
FONT_DIRECTORIES = (Path("/usr/share/fonts"), Path("/usr/share/texmf/fonts"), Path("/usr/local/share/fonts"))


@dataclass(frozen=True)
class Letters:
    """Pictures of capital letters, and where they come from.

    ``pictures`` are grey values, 0 (ink) to 255 (paper); ``labels`` index `LETTERS`; ``fonts`` index ``names``.
    """

    pictures: UInt8[Tensor, "n 32 32"]
    labels: Int[Tensor, " n"]
    fonts: Int[Tensor, " n"]
    names: tuple[str, ...]

    def samples(self) -> Tensor:
        """The pictures as the model sees them: float32 in [-1, 1], ``[n, 1, 32, 32]``."""
        return self.pictures.float().div(127.5).sub(1.0)[:, None]

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
        return Letters(self.pictures[keep], self.labels[keep], self.fonts[keep], self.names)


def render_letter(font: ImageFont.FreeTypeFont, letter: str) -> np.ndarray | None:
    """One letter, centred, its longer side `INK_BOX` pixels: uint8 ``[32, 32]``; None where the font draws nothing."""
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
    scale = INK_BOX / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.LANCZOS)
    picture = Image.new("L", (SIZE, SIZE), 255)
    picture.paste(ink, ((SIZE - ink.width) // 2, (SIZE - ink.height) // 2))
    return np.asarray(picture)


def render_font(path: Path) -> np.ndarray | None:
    """The 26 letters of a font, uint8 ``[26, 32, 32]``; None where the font cannot be used.

    A font is refused when it is unreadable, lacks a letter, maps two letters to one picture, or draws (nearly) blank or black ones.
    """
    try:
        with path.open("rb") as file, TTFont(file, fontNumber=0, lazy=True) as tables:
            coverage = tables.getBestCmap() or {}
        if any(ord(letter) not in coverage for letter in LETTERS):
            return None
        font = ImageFont.truetype(str(path), RENDER_SIZE)
        drawn = [render_letter(font, letter) for letter in LETTERS]
    except (OSError, TTLibError, KeyError, ValueError, AssertionError):
        return None  # a damaged or bitmap-only font: one of many, not worth stopping for
    pictures = [picture for picture in drawn if picture is not None]
    if len(pictures) < len(LETTERS) or len({picture.tobytes() for picture in pictures}) < len(LETTERS):
        return None
    letters = np.stack(pictures)
    ink_share = 1.0 - letters.mean(axis=(1, 2)) / 255.0
    return letters if ink_share.min() > 0.02 and ink_share.max() < 0.5 else None


def render_letters(directories: tuple[Path, ...] = FONT_DIRECTORIES) -> Letters:
    """Render the capital letters of every usable font below `directories`; fonts with equal letters count once.

    Raises `ZooError` when fewer than 50 fonts are usable.
    """
    files = sorted(path for root in directories for path in root.rglob("*") if path.suffix.lower() in {".ttf", ".otf", ".ttc"})
    by_picture: dict[bytes, tuple[str, np.ndarray]] = {}
    for path in track(files, description="rendering fonts"):
        letters = render_font(path)
        if letters is not None:
            by_picture.setdefault(hashlib.sha256(letters.tobytes()).digest(), (path.name, letters))
    fonts = _legible(list(by_picture.values()))
    if len(fonts) < 50:
        raise ZooError(
            f"fonts: {len(fonts)} usable fonts below {', '.join(map(str, directories))}; at least 50 are needed; "
            "install the font packages that src/diffquant/zoo/README.md lists"
        )
    return Letters(
        pictures=torch.from_numpy(np.concatenate([letters for _, letters in fonts])),
        labels=torch.arange(len(LETTERS)).repeat(len(fonts)),
        fonts=torch.arange(len(fonts)).repeat_interleave(len(LETTERS)),
        names=tuple(name for name, _ in fonts),
    )


def _legible(fonts: list[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    """The fonts whose letters are mostly nearest to the median shape of the right letter."""
    if not fonts:
        return []
    pictures = np.stack([letters for _, letters in fonts]).astype(np.float32)  # [fonts, 26, 32, 32]
    median = np.median(pictures, axis=0).reshape(len(LETTERS), -1)  # [26, 1024]
    kept = []
    for (name, letters), flat in zip(fonts, pictures.reshape(len(fonts), len(LETTERS), -1), strict=True):
        distance = ((flat[:, None] - median[None]) ** 2).sum(axis=-1)  # [26 letters, 26 medians]
        if (distance.argmin(axis=1) == np.arange(len(LETTERS))).sum() >= MIN_AGREEMENT:
            kept.append((name, letters))
    return kept


def write_font_list(letters: Letters, path: Path) -> None:
    """Write the names of the fonts that were used, as JSON."""
    path.write_text(json.dumps({"fonts": letters.names, "letters": len(letters.labels), "sha256": letters.digest()}, indent=1))
