"""Which reference models can be trained, for how long, and on letters of which size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from diffquant.zoo.models import NAMES, SIZE, check_name
from tools.train_zoo import classifier, latent, pixel
from tools.train_zoo.letters import LARGE_SIZE, Letters

TRAINABLE = (*NAMES, "glyph-vae")  # the autoencoder comes inside of the pipelines
DEFAULT_STEPS = {"glyph-ddim": 10000, "glyph-classifier": 2000, "glyph-vae": 2500, "glyph-sd": 6500, "glyph-dit": 7500}


def picture_size(name: str) -> int:
    """Height and width of the letters that `name` is trained on. Raises `ZooError` for an unknown name."""
    check_name(name, TRAINABLE)
    return LARGE_SIZE if name in ("glyph-vae", "glyph-sd", "glyph-dit") else SIZE


def train_model(name: str, letters: Letters, out: Path, steps: int | None, seed: int, compiled: bool = False) -> dict[str, Any]:
    """Train the reference model `name` into `out`; return what is worth knowing of it.

    The autoencoder that ``glyph-sd`` and ``glyph-dit`` need is trained first where `out` has none.
    Raises `ZooError` for an unknown name.
    """
    check_name(name, TRAINABLE)
    steps = DEFAULT_STEPS[name] if steps is None else steps
    figures: dict[str, Any] = {"model": name, "steps": steps, "seed": seed, "letters_sha256": letters.digest()}
    if name in ("glyph-sd", "glyph-dit") and not (out / "glyph-vae").is_dir():
        figures["glyph-vae"] = train_model("glyph-vae", letters, out, None, seed)
    trainers: dict[str, Callable[[Letters, Path, int, int], dict[str, float] | None]] = {
        "glyph-ddim": partial(pixel.train_glyph_ddim, compiled=compiled),
        "glyph-classifier": classifier.train_glyph_classifier,
        "glyph-vae": latent.train_glyph_vae,
        "glyph-sd": latent.train_glyph_sd,
        "glyph-dit": latent.train_glyph_dit,
    }
    return figures | (trainers[name](letters, out, steps, seed) or {})
