"""Other runtimes for a float model, and other placements of its quantizers, to compare the engines with.

Each entry of `PEERS` takes a float32 model and the arguments of one call, and gives a function that computes the call. OpenVINO is
compiled for the call's sizes, as the engine does; all use as many threads as PyTorch. NNCF (`pip install nncf`) places the
quantizers where it sees fit and calibrates on that one call, which its speed does not depend on.
"""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from diffquant.checkpoint.targets.onnx import Onnx
from diffquant.engines import openvino_graph as openvino

Arguments = Mapping[str, Tensor]
Run = Callable[[], object]


class Positional(nn.Module):
    """A denoiser called with tensors by position, that gives its prediction."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        prediction: Tensor = self.model(**dict(zip(self.names, tensors, strict=True)), return_dict=False)[0]
        return prediction


def openvino_graph(model: nn.Module, arguments: Arguments) -> Any:
    """The float model as an `openvino.Model` of the call's sizes."""
    tensors = tuple(arguments.values())
    graph = openvino.package().convert_model(Positional(model, tuple(arguments)), example_input=tensors)
    graph.reshape({index: list(tensor.shape) for index, tensor in enumerate(tensors)})
    return graph


def in_openvino(graph: Any, arguments: Arguments, precision: openvino.Precision = "f32") -> Run:
    compiled = openvino.compile_graph(graph, precision)
    given = [tensor.numpy() for tensor in arguments.values()]
    return lambda: compiled(given)


def nncf(model: nn.Module, arguments: Arguments, precision: openvino.Precision = "f32") -> Run:
    """Quantized by NNCF's post-training quantization, activations and weights at 8 bits."""
    import nncf  # type: ignore[import-not-found,import-untyped,unused-ignore]

    data = nncf.Dataset([tuple(tensor.numpy() for tensor in arguments.values())])
    kind = nncf.ModelType.TRANSFORMER if isinstance(model, DiTTransformer2DModel) else None
    placed = nncf.quantize(openvino_graph(model, arguments), data, model_type=kind, subset_size=1)
    return in_openvino(placed, arguments, precision)


def onnxruntime_float32(model: nn.Module, arguments: Arguments) -> Run:
    tensors, names = tuple(arguments.values()), list(arguments)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / Onnx.file
        torch.onnx.export(Positional(model, tuple(names)), tensors, str(file), input_names=names, dynamo=False, opset_version=17)
        session = Onnx().load(Path(folder)).session
    given = {each.name: arguments[each.name].numpy() for each in session.get_inputs()}
    return lambda: session.run(None, given)


def onnx_export(model: nn.Module, arguments: Arguments) -> Run:
    """A frozen model as `diffquant export --to onnx` writes it."""
    target = Onnx()
    with tempfile.TemporaryDirectory() as folder:
        target.save(target.build(model, arguments), Path(folder) / "model")
        compiled = target.load(Path(folder) / "model")
    return lambda: target.run(compiled, model, arguments)


PEERS: dict[str, Callable[[nn.Module, Arguments], Run]] = {
    "openvino float32": lambda model, arguments: in_openvino(openvino_graph(model, arguments), arguments),
    "openvino bfloat16": lambda model, arguments: in_openvino(openvino_graph(model, arguments), arguments, "bf16"),
    "openvino nncf": nncf,
    "openvino nncf bfloat16": lambda model, arguments: nncf(model, arguments, "bf16"),
    "onnxruntime float32": onnxruntime_float32,
}
