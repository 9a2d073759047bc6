"""Classes that register themselves by a name: passes, engines, metrics and export targets, of this package and of others.

A package that brings some names its modules as entry points of the group ``diffquant``, so that commands know them too:

    [project.entry-points.diffquant]
    mine = "mine.passes"
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from importlib.metadata import entry_points

from diffquant.errors import DiffquantError

GROUP = "diffquant"  # of entry points


def register(registry: dict[str, type], name: str, kind: type) -> None:
    """Put a class into a registry. Raises `DiffquantError` where another class has the name."""
    other = registry.get(name, kind)
    if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        places = " and ".join(f"{each.__module__}.{each.__qualname__}" for each in (other, kind))
        raise DiffquantError(f"{name!r}: is the name of {places}; one class is allowed; choose another name")
    registry[name] = kind


def load(package: str) -> None:
    """Import all modules of a package of diffquant, and those that other packages name as entry points."""
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, f"{package}."):
        importlib.import_module(module.name)
    load_others()


@functools.cache
def load_others() -> None:
    """Import what installed packages have as entry points, once."""
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except ImportError as error:
            owner = entry.dist.name if entry.dist else "a package"
            raise DiffquantError(f"{owner}: {entry.value!r} is not imported ({error}); repair it or uninstall {owner}") from error
