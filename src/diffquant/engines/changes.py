"""What a graph was converted from: a picture of a model's state, by which a change of the model is noticed before the next call.

A graph is made once, but a model can change at any time: an adapter is loaded or its weight set, an attention gets another
processor, FreeU sets numbers on blocks, a layer is replaced, a tensor is written. A `Picture` compares what modules and processors
hold with what they held. Hooks, and a forward of a module's own, may do anything at every call, so `hooked` names them.

Not seen: values written through ``tensor.data``, and what a processor's class or a function does.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any, final

import torch
from torch import Tensor, nn

from diffquant.core.quantizer import Quantizer

DEPTH = 4  # of containers and objects inside a module's attribute
OURS = ("torch.", "diffquant.")  # objects of these packages are not looked into


def hooked(model: nn.Module) -> str:
    """The name of a module below `model` whose call is more than its class's forward; empty where there is none."""
    return next((name for name, module in model.named_modules() if name and is_hooked(module)), "")


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of `module` is more than its class's forward: hooks, or a forward of its own, as offloading gives it."""
    return bool(module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module))


@final
class Picture:
    """The state of a model when it was taken."""

    def __init__(self, model: nn.Module) -> None:
        self._held: list[tuple[Any, Any]] = []  # a container of the model, and what was in it
        self._classes: list[tuple[nn.Module, type]] = []
        tensors: dict[int, Tensor] = {}
        for module in model.modules():
            self._classes.append((module, type(module)))
            attributes, of_quantizer = vars(module), isinstance(module, Quantizer)
            if of_quantizer:  # of which the other attributes change from call to call
                attributes = {key: value for key, value in attributes.items() if key in ("_buffers", "spec")}
            for live, copy in _containers(attributes, DEPTH):
                if live is not attributes or not of_quantizer:
                    self._held.append((live, copy))
                values = copy.values() if isinstance(copy, dict) else copy
                tensors.update((id(value), value) for value in values if isinstance(value, Tensor))
        self._tensors = [(tensor, *_written(tensor)) for tensor in tensors.values()]

    def same(self) -> bool:
        """Whether the model still holds what it held."""
        try:
            return (
                all(live == copy for live, copy in self._held)
                and all(type(module) is kind for module, kind in self._classes)
                and all(_written(tensor) == (version, place) for tensor, version, place in self._tensors)
            )
        except RuntimeError:  # a tensor in the place of another one has no truth
            return False


def _containers(value: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """Every dictionary, list and set below `value` with a shallow copy, and the attributes of objects."""
    if depth == 0 or isinstance(value, Tensor | nn.Module | type | FunctionType | MethodType | ModuleType):
        return
    if isinstance(value, dict | list | set):
        yield value, dict(value) if isinstance(value, dict) else type(value)(value)
        for each in value.values() if isinstance(value, dict) else value:
            yield from _containers(each, depth - 1)
    elif isinstance(value, tuple):
        for each in value:
            yield from _containers(each, depth - 1)
    elif hasattr(value, "__dict__") and not f"{type(value).__module__}.".startswith(OURS):
        yield from _containers(vars(value), depth - 1)


def _written(tensor: Tensor) -> tuple[int, int]:
    """Numbers that change when a tensor is written, or gets another memory."""
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr() if tensor.device.type != "meta" and tensor.layout == torch.strided else 0
