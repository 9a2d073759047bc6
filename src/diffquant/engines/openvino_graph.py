"""From a frozen model to an OpenVINO graph, with a FakeQuantize wherever the simulation quantizes.

OpenVINO turns a product of quantized operands into an integer kernel where it finds the forms it knows: the input as a FakeQuantize
of 256 levels, the weight as a constant of int8 times a scale for each output. `convert` lets PyTorch trace the model while its
layers write themselves in these forms (`graph`). OpenVINO's kernels may add products in 16 bits: form `EXACT` holds no two products
that saturate there, so the file is right on every machine, that of `here` none that saturate on this one, and the form ``single``
writes every 8-bit weight as one digit.

Two activations (the products of an attention) are multiplied as integers only where their codes minus the zero point fit int8.
Codes of 8 bits with a zero point are therefore written as codes minus 128 plus a constant: for the keys softmax drops what it adds,
for the queries it adds a multiple of each key's sum, for the values one of each softmax row's sum. Where there are many keys the
rows' sums cost more than they save, and values are multiplied in floating point: the same quantized values in any case.

FakeQuantize multiplies by the reciprocal step where the simulation divides: codes on an edge may differ by one.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffquant.engines.exactness import answer_of
from diffquant.engines.graph import Form, MakeOutput, Trace, check, portable, status, whole
from diffquant.engines.graph_call import Call, feed, inputs, timesteps
from diffquant.errors import CheckpointError

Precision = Literal["f32", "bf16"]  # with "f16" OpenVINO 2026.4 computes another picture, slowly, on a CPU
# else inputs of weights that alone are quantized would be rounded to 8 bits, group by group, on processors with VNNI
EXACT_INPUTS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def convert(model: nn.Module, call: Call, form: Form, original: type[nn.Module] | None = None) -> tuple[Any, MakeOutput]:
    """The graph of `model` for calls like `call`, and what makes its output of the tensors that the graph puts out.

    ``original``: the class whose forward is traced, where the model has another one now.
    """
    openvino = package()
    check(model, form.runtime)
    trace = Trace(model, call, form, original)
    tensors, names, shapes = inputs(model, call)
    kind, example = type(model).__name__, tuple(tensors)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated, and that sizes other than the batch become constants
        with status(f"tracing {kind}"), trace.rewritten():
            traced = torch.jit.trace(trace, example, check_trace=False, strict=False)
        with status(f"converting {kind} to OpenVINO"):
            # not `convert_model`, which reports its use to the vendor
            frontend = openvino.frontend.FrontEndManager().load_by_framework("pytorch")
            decoders = importlib.import_module("openvino.frontend.pytorch.ts_decoder")
            decoder = decoders.TorchScriptPythonDecoder(traced, example_input=example)  # has to live until the end
            graph = frontend.convert(frontend.load(decoder))
            offline = importlib.import_module("openvino._offline_transformations")
            offline.apply_moc_transformations(graph, cf=False, smart_reshape=True)
    for parameter, name in zip(graph.inputs, names, strict=True):
        parameter.get_tensor().set_names({name})
    graph.reshape(dict(zip(names, shapes, strict=True)))
    graph.set_rt_info(timesteps(model), ["diffquant", "timesteps"])
    graph.set_rt_info(str(trace.pair), ["diffquant", "pair"])
    for name, value in EXACT_INPUTS.items():  # for who reads the file
        graph.set_rt_info(value, ["runtime_options", name])
    return graph, trace.make_output


def _quantize(x: Tensor, scale: float, zero_point: int, signed: bool) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *((-128, 127) if signed else (0, 255)))


def _dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.float() * scale.view(-1, *[1] * (weight.dim() - 1))


EXACT = Form("OpenVINO", _quantize, _dequantize, portable, portable, centres=True)
FORMS = {"exact": EXACT, "single": EXACT._replace(largest=whole, attention=whole)}


def here() -> Form:
    """What this machine multiplies exactly; it is asked now, because nothing may compute while a model is traced."""
    linear, convolution, attention = (answer_of(f"openvino {kernel}") for kernel in ("linear", "convolution", "attention"))
    return EXACT._replace(largest=lambda last: min(linear.largest(last), convolution.largest(last)), attention=attention.largest)


def compile_graph(graph: Any, precision: Precision = "f32") -> Any:
    """`graph` compiled for the CPU, with as many threads as PyTorch has.

    What is not quantized computes in `precision`; OpenVINO's own choice is bfloat16 where the CPU has it.
    """
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads(), **EXACT_INPUTS}
    return package().Core().compile_model(graph, "CPU", settings)


def infer(request: Any, call: Call, model: nn.Module, takes_interval: bool) -> tuple[Tensor, ...]:
    """The outputs of a compiled graph's request for a call."""
    tensors = feed(call, model, takes_interval)
    results = request.infer([tensor.detach().cpu().contiguous().numpy() for tensor in tensors], share_inputs=True)
    return tuple(torch.from_numpy(result).to(call.tensors[0].device) for result in results.to_tuple())


def package() -> Any:
    """The package. Raises `CheckpointError` where it is missing."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise CheckpointError("engine 'openvino': the package openvino is missing; pip install 'diffquant[openvino]'") from error
