"""From a frozen model to an ONNX graph with a QuantizeLinear and a DequantizeLinear wherever the simulation quantizes (QDQ).

The layers write themselves in the form of `graph`; activations as uint8 with a zero point, or as int8 without one where codes minus
the zero point fit; weights as constants of int8 (4-bit ones too) and a DequantizeLinear with a scale for each output.

ONNX Runtime makes unsigned codes of signed ones on x86, and its product of unsigned codes and signed weights adds in 16 bits on
some processors. That of two unsigned operands does not. The form ``exact`` therefore writes weights beyond what 16 bits hold as
uint8 with a zero point of 128; ``single`` all as int8, as TensorRT reads them.

Made by PyTorch's TorchScript exporter: `torch.export` took 40 s of CPU time for a UNet of 14 convolutions where this takes 1.3 s.
Opset 17, because from opset 21 on ONNX Runtime 1.31 moves int8 quantizers past a Transpose with zero points of the wrong type, and
then refuses the file.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from diffquant.engines.exactness import PORTABLE
from diffquant.engines.graph import Form, Trace, check, status, whole
from diffquant.engines.graph_call import Call, inputs, timesteps
from diffquant.errors import CheckpointError

OPSET = 17

# ONNX Runtime (1.29 and later, Linux too) starts to send telemetry when it is imported, which `from_pretrained` of diffusers does
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class _Quantize(torch.autograd.Function):
    """QuantizeLinear and DequantizeLinear of an activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, zero_point: int, signed: bool) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *((-128, 127) if signed else (0, 255)))

    @staticmethod
    def symbolic(graph: Any, x: Any, scale: float, zero_point: int, signed: bool) -> Any:
        scales = graph.op("Constant", value_t=torch.tensor(scale))
        zero = graph.op("Constant", value_t=torch.tensor(zero_point, dtype=torch.int8 if signed else torch.uint8))
        return graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, scales, zero), scales, zero).setType(x.type())


class _Dequantize(torch.autograd.Function):
    """DequantizeLinear of a weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        integers = weight.float() - 128 if weight.dtype == torch.uint8 else weight.float()  # the tracer fails where 0 is subtracted
        return integers * scale.view(-1, *[1] * (weight.dim() - 1))

    @staticmethod
    def symbolic(graph: Any, weight: Any, scale: Any) -> Any:
        kind = weight.type().dtype()
        zero_point = 128 if kind == torch.uint8 else 0
        zeros = graph.op("Constant", value_t=torch.full(scale.type().sizes(), zero_point, dtype=kind))
        return graph.op("DequantizeLinear", weight, scale, zeros, axis_i=0).setType(weight.type().with_dtype(torch.float32))


def _stored(weight: Tensor) -> Tensor:
    """An int8 weight as it is, or as uint8 where two of its products with 8-bit codes may not fit 16 bits."""
    low, high = (int(value) for value in weight.aminmax())
    return weight if max(-low, high) <= PORTABLE else (weight.int() + 128).to(torch.uint8)


def _quantize(x: Tensor, scale: float, zero_point: int, signed: bool) -> Tensor:
    quantized: Tensor = _Quantize.apply(x, scale, zero_point, signed)  # type: ignore[no-untyped-call]
    return quantized


def _dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    dequantized: Tensor = _Dequantize.apply(weight, scale)  # type: ignore[no-untyped-call]
    return dequantized


def _add(product: Tensor, bias: Tensor) -> Tensor:
    """Three axes: of a MatMul and an Add with fewer ONNX Runtime makes a Gemm, which it then computes in floating point."""
    three = product.unsqueeze(0) if product.dim() == 2 else product
    total = three + bias.view(1, 1, -1)
    return total.squeeze(0) if product.dim() == 2 else total


SINGLE = Form("ONNX Runtime", _quantize, _dequantize, whole, whole, add=_add)
FORMS = {"exact": SINGLE._replace(stored=_stored), "single": SINGLE}
TENSORRT = SINGLE._replace(float_weights=True)  # its Cast does not read int8


def convert(model: nn.Module, call: Call, form: Form) -> Any:
    """The graph of `model` for calls like `call`, an `onnx.ModelProto`."""
    onnx, kind = package(), type(model).__name__
    check(model, form.runtime)
    trace = Trace(model, call, form)
    tensors, names, shapes = inputs(model, call)
    axes = {name: {0: "batch"} for name, shape in zip(names, shapes, strict=True) if shape[:1] == [-1]}
    if len(names) > len(call.names):
        axes[names[-1]] = {0: "intervals"}  # one, or one for each sample
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated, and that sizes other than the batch become constants
        file = Path(folder) / "model.onnx"
        with status(f"converting {kind} to ONNX"), trace.rewritten(), _Exportable():
            torch.onnx.export(
                trace,
                tuple(tensors),
                str(file),
                dynamo=False,
                input_names=names,
                dynamic_axes=axes,
                opset_version=OPSET,
                do_constant_folding=False,
            )
        graph = _with_initializers(onnx.load(file))
    onnx.helper.set_model_props(graph, {"diffquant/timesteps": timesteps(model), "diffquant/pair": str(trace.pair)})
    return graph


class _Exportable(TorchFunctionMode):
    """While entered, what PyTorch's exporter cannot write, or ONNX Runtime not read, is computed in other operators.

    A norm by root mean squares has no operator before opset 23. A squeeze of an axis that is longer than 1 does nothing, but the
    exporter, which does not know its size, writes a branch for it that ONNX Runtime refuses.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.rms_norm, torch.rms_norm):
            return _rms_norm(*args, **(kwargs or {}))
        if func in (torch.squeeze, Tensor.squeeze) and len(args) == 2 and isinstance(args[1], int) and args[0].shape[args[1]] != 1:
            return args[0]
        return func(*args, **(kwargs or {}))


def _rms_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`x` over the root of its mean square along the last axes, times the weight where there is one."""
    axes = tuple(range(-len(normalized_shape), 0))
    normal = x / torch.sqrt((x * x).mean(axes, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps))
    return normal if weight is None else normal * weight


def _with_initializers(model: Any) -> Any:
    """`model` with its constants as initializers, which TensorRT reads as weights and which can be stored beside the graph."""
    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        graph.initializer.append(node.attribute[0].t)
        graph.initializer[-1].name = node.output[0]
        graph.node.remove(node)
    return model


def package() -> Any:
    """The package onnx. Raises `CheckpointError` where it, or ONNX Runtime, is missing."""
    runtime()
    return _imported("onnx")


def runtime() -> Any:
    """ONNX Runtime, its telemetry off."""
    module = _imported("onnxruntime")
    module.disable_telemetry_events()  # of what else may be sent where something had imported it before this file
    return module


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(f"ONNX: the package {name} is missing; pip install 'diffquant[onnx]'") from error
