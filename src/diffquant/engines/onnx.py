"""ONNX files: written, read, and run by ONNX Runtime on a CPU, which says what it multiplies as integers.

`onnx_graph` says what the graph is made of. What ONNX Runtime 1.31 makes of a product with a float output (times:
``benchmarks/onnx_products.py``):

- MatMul: MatMulIntegerToFloat, exact in the form `onnx_graph.EXACT`. With weights of ONNX's INT4 in floating point.
- Gemm, and what it makes a Gemm of: in floating point on the quantized values.
- Conv: in floating point on the quantized values: QLinearConv needs a quantized output, which no layer of a UNet has, because a
  normalization follows. ConvInteger is exact, but gains little or loses; and TensorRT does not read it.
- A dequantized weight without a quantized input: MatMulNBits, which rounds the input to 8 bits by its own choice. Such weights are
  therefore written as a Cast and a Mul, which it computes once, in floating point.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffquant.engines.graph_call import INTERVAL, Call, feed
from diffquant.engines.onnx_graph import EXACT, SINGLE, convert, package, runtime
from diffquant.errors import CheckpointError

FILE = "model.onnx"  # as optimum names it
EXTERNAL = 1 << 30  # bytes: beyond these the weights get a file of their own; protobuf ends at 2 GiB
PRODUCTS = {"Conv": False, "Gemm": False, "MatMul": False, "FusedConv": False, "FusedGemm": False, "FusedMatMul": False}
PRODUCTS |= {"NhwcFusedConv": False, "Attention": False, "MultiHeadAttention": False, "MatMulNBits": False}
PRODUCTS |= {"QLinearConv": True, "ConvInteger": True, "QGemm": True, "QLinearMatMul": True, "QAttention": True}
PRODUCTS |= {"MatMulInteger": True, "MatMulIntegerToFloat": True}


class Compiled(NamedTuple):
    """A session of ONNX Runtime, and the graph that it computes with."""

    session: Any
    optimized: Any


FORMS = {"exact": EXACT, "single": SINGLE}


def build(model: nn.Module, example: Mapping[str, Any], form: str = "exact") -> Any:
    """An `onnx.ModelProto` of a frozen `model`, for `example` in `form` as `openvino.build` takes them; unread inputs are left out.

    Raises `SpecError` where the model cannot be put so, `CheckpointError` where onnx is missing.
    """
    return convert(model, Call(model, (), dict(example)), FORMS[form])


def pair_of(graph: Any) -> int:
    """The largest sum of two products of an unsigned code and a signed integer in a graph of `build`."""
    return int(next(each.value for each in graph.metadata_props if each.key == "diffquant/pair"))


def signed_weights(graph: Any) -> bool:
    """Whether every quantized weight of a graph of `build` is int8."""
    onnx = package()
    return not any(each.data_type == onnx.TensorProto.UINT8 and len(each.dims) > 1 for each in graph.graph.initializer)


def save_onnx(graph: Any, folder: Path) -> None:
    """Write `graph` into a new `folder`, weights beside it where they are over 1 GiB."""
    folder.mkdir(parents=True)
    size = sum(len(each.raw_data) for each in graph.graph.initializer)  # asked for its own, a graph over 2 GiB would raise
    package().save_model(graph, folder / FILE, save_as_external_data=size > EXTERNAL, location=f"{FILE}.data")


def load_onnx(folder: str | Path) -> Compiled:
    """What `save_onnx` wrote into `folder`, read by ONNX Runtime, with as many threads as PyTorch has."""
    onnx, onnxruntime, file = package(), runtime(), Path(folder) / FILE
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    with tempfile.TemporaryDirectory() as temporary:
        options.optimized_model_filepath = str(Path(temporary) / FILE)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        try:
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class
            raise CheckpointError(f"{file}: cannot be read ({str(error).splitlines()[0]}); export it again") from error
        return Compiled(session, onnx.load(options.optimized_model_filepath, load_external_data=False))


def run(compiled: Compiled, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The outputs for a call of `model` with `arguments`, at the present interval of its clock."""
    call, read = Call(model, (), dict(arguments)), [each.name for each in compiled.session.get_inputs()]
    given = dict(zip([*call.names, INTERVAL], feed(call, model, INTERVAL in read), strict=False))
    outputs = compiled.session.run(None, {name: given[name].detach().cpu().contiguous().numpy() for name in read})
    return tuple(torch.from_numpy(output) for output in outputs)


def products(compiled: Compiled) -> Iterator[tuple[str, bool]]:
    """Name of the layer of each product that ONNX Runtime computes, and whether it is one of 8-bit integers."""
    for node in compiled.optimized.graph.node:
        if node.op_type in PRODUCTS:  # named "/path/of/layer/MatMul", and what it was fused to
            path = itertools.takewhile(lambda part: not part[:1].isupper(), node.name.strip("/").split("/"))
            yield ".".join(path).removesuffix(".attention_products"), PRODUCTS[node.op_type]
