"""The weight of a frozen layer, for code that reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffquant.errors import SpecError


class ReadOnlyWeight(Tensor):
    """The dequantized weight of a frozen layer, as other code reads it: a copy, so what is written into it would be lost.

    What is computed with it is a plain tensor. Raises `SpecError` where it is written.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "retain_grad_")
        written = in_place or name in ("__set__", "__setitem__") or name in _IN_PLACE
        if (written and isinstance(args[0], cls)) or isinstance(kwargs.get("out"), cls):
            raise SpecError(
                "weight of a frozen layer: cannot be written, the layer holds integer codes; change the weights before quantize "
                "(fuse adapters there)"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(result, Tensor) and args and isinstance(args[0], cls) and _same_memory(result, args[0]):
            return result.as_subclass(cls)  # `weight.data`, or a view of it, is no way around
        return result


def _same_memory(view: Tensor, tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


_IN_PLACE = {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
}
