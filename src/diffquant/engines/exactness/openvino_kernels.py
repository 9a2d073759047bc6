"""Products of OpenVINO between quantizers, as kernels to be asked."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from diffquant.engines.exactness.kernel import CHANNELS, Kernel, Run, large_convolution, pictures


def _linear(codes: Tensor, weights: Tensor, integer: bool) -> Run:
    return _product("matmul", codes, weights, integer, False, True)


def _convolution(codes: Tensor, weights: Tensor, integer: bool) -> Run:
    return _product("convolution", *pictures(codes, weights), integer, [1, 1], [0, 0], [0, 0], [1, 1])


def _attention(codes: Tensor, weights: Tensor, integer: bool) -> Run:
    """Two activations: unsigned codes as of a softmax, beside signed ones as of the values."""
    first, second = _parameter(1, *codes.shape), _parameter(1, *weights.shape)
    product = _operators().matmul(_quantized(first), _quantized(second, -128.0), False, True)
    run = _compiled(product, {first: codes[None], second: weights[None]})
    return lambda: run()[0]


def _product(operation: str, codes: Tensor, weights: Tensor, integer: bool, *options: Any) -> Run:
    operators, parameter = _operators(), _parameter(*codes.shape)
    if integer:
        scales = torch.ones(len(weights), *[1] * (weights.dim() - 1)).numpy()
        constant = operators.multiply(operators.convert(operators.constant(weights.numpy()), "f32"), operators.constant(scales))
    else:
        constant = operators.constant(weights.float().numpy())
    operand = _quantized(parameter) if integer else parameter
    return _compiled(getattr(operators, operation)(operand, constant, *options), {parameter: codes})


def _compiled(node: Any, operands: dict[Any, Tensor]) -> Run:
    openvino = importlib.import_module("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.Model([_operators().result(node)], list(operands))
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    values = [operand.float().contiguous() for operand in operands.values()]
    return lambda: torch.from_numpy(request.infer([value.numpy() for value in values])[0])


def _quantized(parameter: Any, low: float = 0.0) -> Any:
    first, last = (_operators().constant(torch.tensor(value).numpy()) for value in (low, low + 255.0))
    return _operators().fake_quantize(parameter, first, last, first, last, 256)


def _parameter(*sizes: int) -> Any:
    return _operators().parameter(list(sizes), importlib.import_module("openvino").Type.f32)


def _operators() -> Any:
    return importlib.import_module("openvino.opset13")


KERNELS = {
    "openvino linear": Kernel(_linear, CHANNELS[1:]),
    "openvino convolution": Kernel(_convolution, CHANNELS[1:], large_convolution),
    "openvino attention": Kernel(_attention, CHANNELS[1:], large=None),
}
