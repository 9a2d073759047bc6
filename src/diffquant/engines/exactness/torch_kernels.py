"""Integer products of PyTorch, as kernels to be asked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from diffquant.engines.exactness.kernel import Kernel, Operands, Run, large_convolution, large_product, pictures

HEAD = 256  # rows, channels and outputs of an attention; without a kernel for it PyTorch's own loop would take seconds for `LARGE`


def _linear(codes: Tensor, weights: Tensor, integer: bool) -> Run:
    if not integer:
        x, dense = codes.float(), weights.float()
        return lambda: functional.linear(x, dense)
    packed, scales, zeros = torch.ops.onednn.qlinear_prepack(weights, None), torch.ones(len(weights)), _zeros(weights)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _convolution(codes: Tensor, weights: Tensor, integer: bool) -> Run:
    codes, weights = pictures(codes, weights)
    codes = codes.contiguous(memory_format=torch.channels_last)
    if not integer:
        x, dense = codes.float(), weights.float().contiguous(memory_format=torch.channels_last)
        return lambda: functional.conv2d(x, dense)
    scales, zeros, geometry = torch.ones(len(weights)), _zeros(weights), ([1, 1], [0, 0], [1, 1], 1)
    packed = torch.ops.onednn.qconv_prepack(weights, scales, 1.0, 0, *geometry, None)
    return lambda: torch.ops.onednn.qconv2d_pointwise(
        codes, 1.0, 0, packed, scales, zeros, None, *geometry, 1.0, 0, torch.float32, "none", [], None
    )


def _attention(codes: Tensor, weights: Tensor, integer: bool) -> Run:
    """Signed codes on both sides, as the second product of an attention has them."""
    if not integer:
        x, dense = codes.float(), weights.float().t()
        return lambda: x @ dense
    centred, transposed = (codes.int() - 128).to(torch.int8), weights.t().contiguous()
    return lambda: torch._int_mm(centred, transposed)


def _head() -> Operands:
    codes, weights = (operand[:HEAD, :HEAD].contiguous() for operand in large_product())
    return codes, weights


def _zeros(weights: Tensor) -> Tensor:
    return torch.zeros(len(weights), dtype=torch.int32)


KERNELS = {
    "torch linear": Kernel(_linear),
    "torch convolution": Kernel(_convolution, (3 * 9, 504), large_convolution),
    "torch attention": Kernel(_attention, large=_head, centre=128),
}
