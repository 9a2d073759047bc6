"""Nested arguments of a call under flat names: ``a.b`` is a dict's entry, ``a.[0]`` a list's member, ``a.(0)`` a tuple's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffquant.errors import CalibrationError

PLACE = re.compile(r"\[\d+\]|\(\d+\)")  # of a list's or a tuple's member


def flatten(arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Flat names of nested `arguments`. Raises `CalibrationError`, which begins with `where`, for what a file cannot hold."""
    flat: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, member in value.items():
                if not isinstance(key, str) or "." in key or PLACE.fullmatch(key):
                    raise CalibrationError(
                        f"{where}: argument {name} has the key {key!r}; strings without dots or brackets can be recorded"
                    )
                add(f"{name}.{key}", member)
        elif isinstance(value, Tensor) or is_json(value):
            flat[name] = value
        elif type(value) in (list, tuple) and value:
            for i, member in enumerate(value):
                add(f"{name}.[{i}]" if isinstance(value, list) else f"{name}.({i})", member)
        else:
            raise CalibrationError(
                f"{where}: argument {name} is a {type(value).__name__}; only tensors, plain values, and dicts, lists and tuples of "
                f"them can be recorded"
            )

    for name, value in arguments.items():
        add(name, value)
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return {name: _sequences(value) for name, value in nested.items()}


def _sequences(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    members = {key: _sequences(member) for key, member in value.items()}
    if not members or not all(PLACE.fullmatch(key) for key in members):
        return members
    ordered = [members[key] for key in sorted(members, key=lambda key: int(key[1:-1]))]
    return ordered if next(iter(members)).startswith("[") else tuple(ordered)


def is_json(value: Any) -> bool:
    """Whether JSON gives back an equal value."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
