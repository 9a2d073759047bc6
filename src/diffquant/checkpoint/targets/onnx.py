"""ONNX files with QuantizeLinear and DequantizeLinear, for ONNX Runtime.

`engines.onnx_graph` says what the graph is made of. What ONNX Runtime 1.31 makes of a product with a float output (times:
``benchmarks/onnx_products.py``):

- MatMul: MatMulIntegerToFloat, exact in the form ``exact``. With weights of ONNX's INT4 in floating point.
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
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from diffquant.checkpoint.targets.graph import GraphTarget
from diffquant.core.attention import ATTRIBUTE
from diffquant.engines.graph_call import INTERVAL, Call, feed
from diffquant.engines.onnx_graph import FORMS, convert, package, runtime
from diffquant.errors import CheckpointError

SYMMETRIC = (
    "quantize with --set layers.N.input_symmetric=true for every rule N that has input_bits, and softmax_bits of 7 or fewer "
    "(or float)"
)
EXTERNAL = 1 << 30  # bytes: beyond these the weights get a file of their own; protobuf ends at 2 GiB
PRODUCTS = {"Conv": False, "Gemm": False, "MatMul": False, "FusedConv": False, "FusedGemm": False, "FusedMatMul": False}
PRODUCTS |= {"NhwcFusedConv": False, "Attention": False, "MultiHeadAttention": False, "MatMulNBits": False}
PRODUCTS |= {"QLinearConv": True, "ConvInteger": True, "QGemm": True, "QLinearMatMul": True, "QAttention": True}
PRODUCTS |= {"MatMulInteger": True, "MatMulIntegerToFloat": True}


class Compiled(NamedTuple):
    """A session of ONNX Runtime, and the graph that it computes with."""

    session: Any
    optimized: Any


@final
class Onnx(GraphTarget):
    """One ONNX file, checked with ONNX Runtime."""

    name, file = "onnx", "model.onnx"  # as optimum names it

    def require(self) -> None:
        package()

    def build(self, model: nn.Module, example: Mapping[str, Any], form: str = "exact") -> Any:
        """An `onnx.ModelProto`; inputs that are not read are left out."""
        return convert(model, Call(model, (), dict(example)), FORMS[form])

    def pair(self, graph: Any) -> int:
        return int(next(each.value for each in graph.metadata_props if each.key == "diffquant/pair"))

    def signed_weights(self, graph: Any) -> bool:
        onnx = package()
        return not any(each.data_type == onnx.TensorProto.UINT8 and len(each.dims) > 1 for each in graph.graph.initializer)

    def save(self, graph: Any, folder: Path) -> None:
        """Weights beside the file where they are over 1 GiB."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(graph, folder / self.file)

    def load(self, folder: Path) -> Compiled:
        return load_file(folder / self.file)

    def run(self, compiled: Compiled, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        call, names = Call(model, (), dict(arguments)), [each.name for each in compiled.session.get_inputs()]
        inputs = dict(zip([*call.names, INTERVAL], feed(call, model, INTERVAL in names), strict=False))
        outputs = compiled.session.run(None, {name: inputs[name].detach().cpu().contiguous().numpy() for name in names})
        return tuple(torch.from_numpy(output) for output in outputs)

    def products(self, compiled: Compiled) -> Iterator[tuple[str, bool]]:
        for node in compiled.optimized.graph.node:
            if node.op_type in PRODUCTS:  # named "/path/of/layer/MatMul", and what it was fused to
                path = itertools.takewhile(lambda part: not part[:1].isupper(), node.name.strip("/").split("/"))
                yield ".".join(path).removesuffix(f".{ATTRIBUTE}"), PRODUCTS[node.op_type]

    def note(self, symmetric: bool) -> str:
        return "" if symmetric else f"not for TensorRT, which reads symmetric quantizers only: {SYMMETRIC}; export --to tensorrt"


def save_file(graph: Any, file: Path) -> None:
    """Write a graph; its weights are beside it where they are over 1 GiB."""
    size = sum(len(each.raw_data) for each in graph.graph.initializer)  # asked for its own, a graph over 2 GiB would raise
    package().save_model(graph, file, save_as_external_data=size > EXTERNAL, location=f"{file.name}.data")


def load_file(file: Path) -> Compiled:
    """What `save_file` wrote. Raises `CheckpointError` where it cannot be read."""
    onnx, onnxruntime = package(), runtime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    with tempfile.TemporaryDirectory() as temporary:
        options.optimized_model_filepath = str(Path(temporary) / file.name)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        try:
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class
            raise CheckpointError(f"{file}: cannot be read ({str(error).splitlines()[0]}); export it again") from error
        return Compiled(session, onnx.load(options.optimized_model_filepath, load_external_data=False))
