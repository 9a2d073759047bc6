"""Hooks and observers for the length of a `with` block; they are removed when it ends, also by an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from diffquant.core.quantizer import Quantizer


class Enough(Exception):
    """Raised by a hook to end a forward pass early. The caller suppresses it."""


@contextmanager
def watching(hooks: Mapping[Any, Callable[..., Any]], *, before: bool = False, keywords: bool = False) -> Iterator[None]:
    """While the block runs, every call of each module (a key of `hooks`) calls its hook: after the forward, or `before` it.

    Hooks take what PyTorch's forward hooks take, with `keywords` the keyword arguments too, and may replace the output.
    """
    register = "register_forward_pre_hook" if before else "register_forward_hook"
    handles = [getattr(module, register)(hook, with_kwargs=keywords) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observing(observers: Mapping[Quantizer, Callable[[Tensor], None]]) -> Iterator[None]:
    """While the block runs, each quantizer calls its observer with its input, whether it is on or off."""
    try:
        for quantizer, observer in observers.items():
            quantizer.observer = observer
        yield
    finally:
        for quantizer in observers:
            quantizer.observer = None
