"""The metrics of an evaluation, one file each. Importing the package registers them all: to add one is to add a file."""

from __future__ import annotations

import importlib
import pkgutil

from diffquant.evaluation.metrics.base import Metric as Metric
from diffquant.evaluation.metrics.base import registered as registered


def register_all() -> None:
    """Import every file of the package."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


register_all()
