"""OpenVINO IR. `engines.openvino_graph` says what the graph is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from diffquant.checkpoint.targets.graph import GraphTarget
from diffquant.core.attention import ATTRIBUTE
from diffquant.engines.graph_call import Call
from diffquant.engines.openvino_graph import FORMS, compile_graph, convert, infer, package
from diffquant.errors import CheckpointError

PRODUCTS = ("Convolution", "FullyConnected", "MatMul")  # layer types of the CPU plugin that multiply two operands


@final
class OpenVinoIr(GraphTarget):
    """OpenVINO's own files."""

    name, file = "openvino", "openvino_model.xml"  # as optimum names it

    def require(self) -> None:
        package()

    def build(self, model: nn.Module, example: Mapping[str, Any], form: str = "exact") -> Any:
        return convert(model, Call(model, (), dict(example)), FORMS[form])[0]

    def pair(self, graph: Any) -> int:
        return int(graph.get_rt_info(["diffquant", "pair"]).astype(str))

    def signed_weights(self, graph: Any) -> bool:
        return True

    def save(self, graph: Any, folder: Path) -> None:
        """Constants as they are, no float16."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            package().save_model(graph, folder / self.file, compress_to_fp16=False)
        except RuntimeError as error:
            raise OSError(str(error)) from error

    def load(self, folder: Path) -> Any:
        file, openvino = folder / self.file, package()
        try:
            graph = openvino.Core().read_model(file)
        except RuntimeError as error:
            raise CheckpointError(f"{file}: cannot be read ({str(error).splitlines()[-1]}); export it again") from error
        return compile_graph(graph)

    def run(self, compiled: Any, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        call = Call(model, (), dict(arguments))
        return infer(compiled.create_infer_request(), call, model, len(compiled.inputs) > len(call.names))

    def products(self, compiled: Any) -> Iterator[tuple[str, bool]]:
        """OpenVINO states the kernel of a product; of an attention fused to a `Subgraph` that of the first, and operand types."""
        for operation in compiled.get_runtime_model().get_ordered_ops():
            kind, kernel, merged = (
                str(operation.rt_info[key].value) for key in ("layerType", "primitiveType", "originalLayersNames")
            )
            name, integer = str(operation.get_friendly_name()), kernel.lower().endswith("i8")
            fused = kind == "Subgraph" and "MatMul" in merged
            if fused:
                name = next(each for each in merged.split(",") if "MatMul" in each)
            name = name.partition("/")[0].removeprefix("__module.denoiser.").removesuffix(f".{ATTRIBUTE}")
            if fused or kind in PRODUCTS:
                yield name, integer
            if fused:
                operands = sum(each.get_element_type().size == 1 for each in operation.inputs())
                yield name, operands > (2 if integer else 0)
