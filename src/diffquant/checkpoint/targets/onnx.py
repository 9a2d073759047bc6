"""ONNX files with QuantizeLinear and DequantizeLinear, for ONNX Runtime and TensorRT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from diffquant.checkpoint.targets.base import Target
from diffquant.engines import onnx
from diffquant.engines.onnx_graph import package


@final
class Onnx(Target):
    """One ONNX file, checked with ONNX Runtime."""

    name, file = "onnx", onnx.FILE

    def require(self) -> None:
        """The packages onnx and onnxruntime."""
        package()

    def build(self, model: nn.Module, example: Mapping[str, Any], form: str) -> Any:
        """An `onnx.ModelProto`."""
        return onnx.build(model, example, form)

    def pair(self, graph: Any) -> int:
        """As `build` noted it."""
        return onnx.pair_of(graph)

    def signed_weights(self, graph: Any) -> bool:
        """Whether none is written as uint8."""
        return onnx.signed_weights(graph)

    def save(self, graph: Any, folder: Path) -> None:
        """Weights beside the file where they are large."""
        onnx.save_onnx(graph, folder)

    def load(self, folder: Path) -> Any:
        """A session of ONNX Runtime."""
        return onnx.load_onnx(folder)

    def run(self, compiled: Any, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """One run of the session."""
        return onnx.run(compiled, model, arguments)

    def products(self, compiled: Any) -> Iterator[tuple[str, bool]]:
        """As the optimised graph has them."""
        return onnx.products(compiled)

    def note(self, symmetric: bool) -> str:
        """What TensorRT asks for."""
        if symmetric:
            return ""
        return (
            "not for TensorRT, which reads symmetric quantizers only: quantize with --set layers.N.input_symmetric=true for every "
            "rule N that has input_bits, and softmax_bits of 7 or fewer (or float); export with --form single"
        )
