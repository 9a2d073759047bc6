"""Linear layers of the int8 engine in floating point: those of several products where two take longer than one of float32.

They compute what the simulation does, faster: the weight is dequantized once and laid out for oneDNN, the input is quantized in one
pass over memory.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from diffquant.core.layers import QuantizedLayer, QuantizedLinear
from diffquant.core.quantizer import Quantizer
from diffquant.engines.exactness import ALL
from diffquant.engines.int8.integer_layers import LaidOut, differentiated
from diffquant.engines.int8.kernels import ParameterSet


def faster_in_float(layer: QuantizedLayer, products: int, largest: int) -> bool:
    """Whether a layer of so many integer products is better in floating point: a table of what was measured, not a measurement.

    ``largest``: the kernel's largest exact weight beside 8-bit codes. Kernels that take all weights of 8 bits were 2 to 4 times as
    fast as float32: two products pay. The others were up to twice as fast: in linear layers of 320 to 1,536 channels and 320 to
    10,240 outputs two of their products took 1.1 to 1.4 times as long as one of oneDNN's float32 with 256 rows and more, and 1.7 to
    2.9 times with fewer. In convolutions they took 0.5 to 1.05 times as long, and less memory.
    """
    return isinstance(layer, QuantizedLinear) and products > 1 and largest < ALL - 1


@final
class FloatProduct:
    """A linear layer's dequantized weight, and the parameter sets of its input. Never written; copies share it."""

    def __init__(self, weight: Tensor, sets: list[list[ParameterSet]], splits: tuple[int, ...], reason: str) -> None:
        self.sets, self.splits, self.reason, self.weight = sets, list(splits), reason, weight.contiguous()
        self.laid_out = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        if self.laid_out:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def __deepcopy__(self, memo: dict[int, object]) -> FloatProduct:
        return self

    def multiply(self, x: Tensor, row: int, bias: Tensor | None) -> Tensor:
        """The output for an input in parameter set `row`."""
        parts = x.split(self.splits, dim=-1) if self.splits else (x,)
        values = torch.cat([parameters.values(part) for parameters, part in zip(self.sets[row], parts, strict=True)], dim=-1)
        if not self.laid_out:
            return functional.linear(values, self.weight, bias)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(values, self.weight, bias, "none", [], "")
        return output


class FloatLinear(LaidOut, QuantizedLinear):
    """A linear layer of the engine in floating point; made by `Int8.install`, never constructed."""

    product: FloatProduct

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        row = self._row(input)
        return super().forward(input) if row is None else self.product.multiply(input, row, self.bias)

    def _row(self, x: Tensor) -> int | None:
        """The parameter set of a call, or None where it is to be simulated."""
        weight, inputs = self.weight_quantizer, self.input_quantizer
        assert weight is not None and isinstance(inputs, Quantizer)
        unusual = torch.compiler.is_compiling() or x.dtype != torch.float32 or x.device.type != "cpu"
        if unusual or differentiated(x) or not (weight.unobserved and inputs.unobserved):
            return None
        rows = inputs.present_rows(x.device)
        return rows if isinstance(rows, int) else None
