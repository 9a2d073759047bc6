"""The weight of a frozen layer, for code that reads it, and what stays float32 whatever a layer is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffquant.core.quantizer import in_float32
from diffquant.errors import SpecError


class ReadOnlyWeight(Tensor):
    """The dequantized weight of a frozen layer, as other code reads it: a copy, so what is written into it would be lost.

    What is computed with it is a plain tensor. Raises `SpecError` where it is written.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        written = name in ("__set__", "__setitem__") or (name.startswith("__i") and name in _IN_PLACE)
        written = written or (name.endswith("_") and not name.endswith("__") and name not in _NOT_WRITING)
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
_NOT_WRITING = {"requires_grad_", "retain_grad_"}


class FrozenWeight:
    """What a frozen layer is for code that reads its weight, and what stays float32 whatever a module is cast to."""

    like: Tensor  # empty; of the dtype and device that the float weight would have now
    weight_was_read: bool

    def _weight(self) -> Tensor:
        """The float weight; of a frozen layer the dequantized one, a new tensor each time that cannot be written."""
        if "weight" not in vars(self)["_parameters"]:
            raise AttributeError("weight")  # while the layer is being made
        weight = self.float_weight
        quantizer = vars(self)["_modules"].get("weight_quantizer")
        if weight is not None or quantizer is None or quantizer.codes is None:
            return weight  # type: ignore[return-value]
        self.weight_was_read = True
        smooth = vars(self)["_buffers"].get("smooth")
        dequantized = quantizer.dequantized_codes()
        if smooth is not None:
            dequantized = dequantized / smooth.view(1, -1, *[1] * (dequantized.dim() - 2))
        readable: Tensor = dequantized.detach().to(vars(self)["like"].dtype).as_subclass(ReadOnlyWeight)
        return readable

    weight: Tensor = property(_weight)  # type: ignore[assignment]

    @property
    def float_weight(self) -> Tensor | None:
        """The float weight of the layer, None where it is frozen."""
        weight: Tensor | None = vars(self)["_parameters"]["weight"]
        return weight

    def forget_weight(self) -> None:
        """Let the layer have no float weight any more."""
        vars(self)["_parameters"]["weight"] = None

    @property
    def qweight(self) -> Tensor:
        """The codes of a frozen layer: where peft looks for the device of a LoRA adapter's base layer."""
        quantizer = vars(self)["_modules"].get("weight_quantizer")
        if quantizer is None or quantizer.codes is None or self.float_weight is not None:
            raise AttributeError("qweight: the layer has its float weight")
        codes: Tensor = quantizer.codes
        return codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        kept = {name: tensor for name in ("smooth", "offset") if (tensor := vars(self)["_buffers"].get(name)) is not None}
        applied: nn.Module = super()._apply(fn, recurse)  # type: ignore[misc]
        for name, tensor in kept.items():
            vars(self)["_buffers"][name] = in_float32(tensor, vars(self)["_buffers"][name])
        self.like = self.like if self.like.is_meta else fn(self.like)  # a tensor without data cannot be moved
        return applied
