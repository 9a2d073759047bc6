"""What comparing models needs beyond what quantizing and running them does: the extra ``evaluate``."""

from __future__ import annotations

from importlib.util import find_spec

from diffquant.errors import EvaluationError

PACKAGES = {"skimage": "scikit-image", "scipy": "scipy", "matplotlib": "matplotlib"}


def require_extra() -> None:
    """Raise `EvaluationError` where a package of the extra is not installed: before hours of sampling, not after them."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise EvaluationError(f"{', '.join(missing)}: not installed; pip install 'diffquant[evaluate]'")
