"""The OpenVINO engine: a frozen model computed by OpenVINO's integer kernels on a CPU, or written as IR for use elsewhere.

`openvino_graph` says what the graph is made of. `install` lets a model compute with it in place, `build`, `save_ir` and `load_ir`
are for deployment, `count_integer_primitives` shows what really runs with integers. Needs the package openvino, which is imported
when it is needed.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffquant.core.attention import derived
from diffquant.core.model import quantizers
from diffquant.core.quantizer import Quantizer
from diffquant.engines import graph as graphs
from diffquant.engines.base import Engine, Lowered, default, engine_class, install, layer_rows
from diffquant.engines.changes import Picture, hooked
from diffquant.engines.exactness import answer_of, products_needed
from diffquant.engines.graph import MakeOutput, check, status
from diffquant.engines.graph_call import Call, feed
from diffquant.engines.openvino_graph import EXACT, SINGLE, convert, here, package
from diffquant.errors import CheckpointError
from diffquant.files import folder_when_done

Precision = Literal["f32", "bf16"]  # with "f16" OpenVINO 2026.4 computes another picture, slowly, on a CPU

FILE = "openvino_model.xml"  # as optimum names it
CHANGES = 3  # of a model that make its graphs anew; after more it computes with another engine
KERNELS = ("openvino linear", "openvino convolution")  # as `exactness` names them
PRODUCTS = ("Convolution", "FullyConnected", "MatMul")  # layer types of the CPU plugin that multiply two operands


_log = logging.getLogger(__name__)
FORMS = {"exact": EXACT, "single": SINGLE}


def build(model: nn.Module, example: Mapping[str, Any], form: str = "exact") -> Any:
    """An `openvino.Model` of a frozen `model`; `example` holds arguments of its forward by name, `form` is one of `FORMS`.

    The batch is left open, other sizes are those of the example. Inputs have the names of the arguments, of nested ones joined by
    dots, in the order of the forward's signature; the timestep is one per sample; `interval` comes last where the model has
    parameter sets (one per sample, or one for all). Raises `SpecError` where the model cannot be put so, `CheckpointError` where
    OpenVINO is missing.
    """
    return convert(model, Call(model, (), dict(example)), FORMS[form])[0]


def pair_of(graph: Any) -> int:
    """The largest sum of two products of an unsigned code and a signed integer in a graph of `build`."""
    return int(graph.get_rt_info(["diffquant", "pair"]).astype(str))


def compile_graph(graph: Any, precision: Precision = "f32") -> Any:
    """`graph` compiled for the CPU, with as many threads as PyTorch has.

    What is not quantized computes in `precision`; OpenVINO's own choice is bfloat16 where the CPU has it.
    """
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return package().Core().compile_model(graph, "CPU", settings)


def integer_layers(compiled: Any) -> dict[str, bool]:
    """Each layer and attention that multiplies in a compiled graph, and whether every product is one of 8-bit integers."""
    return graphs.integer_layers(products(compiled))


def count_integer_primitives(compiled: Any) -> dict[str, int]:
    """How many products of a compiled graph are computed from 8-bit integers, and how many are not.

    A layer with splits, or with an integer weight of two digits, has several; an attention has two.
    """
    integer = [integer for _, integer in products(compiled)]
    return {"integer": sum(integer), "float": len(integer) - sum(integer)}


def products(compiled: Any) -> Iterator[tuple[str, bool]]:
    """Name of the layer of each product in a compiled graph, and whether it is computed from 8-bit integers.

    OpenVINO states the kernel of a product; of an attention fused to a `Subgraph` that of the first, and operand types.
    """
    for operation in compiled.get_runtime_model().get_ordered_ops():
        kind, kernel, merged = (str(operation.rt_info[key].value) for key in ("layerType", "primitiveType", "originalLayersNames"))
        name, integer = str(operation.get_friendly_name()), kernel.lower().endswith("i8")
        fused = kind == "Subgraph" and "MatMul" in merged
        if fused:
            name = next(each for each in merged.split(",") if "MatMul" in each)
        name = name.partition("/")[0].removeprefix("__module.denoiser.").removesuffix(".attention_products")
        if fused or kind in PRODUCTS:
            yield name, integer
        if fused:
            operands = sum(each.get_element_type().size == 1 for each in operation.inputs())
            yield name, operands > (2 if integer else 0)


def run(compiled: Any, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The outputs of a compiled graph for a call of `model` with `arguments`, at the present interval of its clock."""
    call = Call(model, (), dict(arguments))
    return _run(compiled.create_infer_request(), call, model, len(compiled.inputs) > len(call.names))


def _run(request: Any, call: Call, model: nn.Module, takes_interval: bool) -> tuple[Tensor, ...]:
    tensors = feed(call, model, takes_interval)
    results = request.infer([tensor.detach().cpu().contiguous().numpy() for tensor in tensors], share_inputs=True)
    return tuple(torch.from_numpy(result).to(call.tensors[0].device) for result in results.to_tuple())


def save_ir(graph: Any, folder: str | Path) -> Path:
    """Write `graph` as OpenVINO IR into a new `folder`, constants as they are (no float16); the folder is returned."""
    folder = Path(folder).expanduser().resolve()
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; an export makes a new folder; choose another name")
    with folder_when_done(folder) as temporary:
        temporary.mkdir(parents=True)
        try:
            package().save_model(graph, temporary / FILE, compress_to_fp16=False)
        except RuntimeError as error:
            raise OSError(str(error)) from error
    return folder


def load_ir(folder: str | Path) -> Any:
    """The `openvino.Model` that `save_ir` wrote into `folder`."""
    file = Path(folder).expanduser() / FILE
    openvino = package()
    try:
        return openvino.Core().read_model(file)
    except RuntimeError as error:
        raise CheckpointError(f"{file}: cannot be read ({str(error).splitlines()[-1]}); export it again") from error


# ---- the model that a pipeline calls


class OpenVino(Engine):
    """A model computed by OpenVINO's integer kernels; what is not quantized in float32.

    The graph is made at the first call and compiled for its sizes, which OpenVINO computes faster than open ones; other batches are
    compiled when they come, each with a copy of the weights. After a change of the model (an adapter, a processor, FreeU, a layer)
    it is made again. Where it cannot be made, or a module below has hooks, the model computes with the default engine from then on,
    and a line says so. Calls in training mode or with gradients are simulated.
    """

    name, rank = "openvino", 20
    precision: ClassVar[Precision] = "f32"

    def __init__(self) -> None:
        self.graphs = _Graphs(self.precision)

    @classmethod
    def unsupported(cls) -> str:
        """Why OpenVINO does not compute exactly and in this precision here. Raises `CheckpointError` without the package."""
        able = package().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        for answer in map(answer_of, KERNELS):
            if not answer.usable:
                return answer.reason or f"this machine's {answer.kernel} is not exact"
        return "" if cls.precision == "f32" or "BF16" in able else "the CPU has no instructions for bfloat16"

    @classmethod
    def explained(cls) -> str:
        """How many products a weight takes, and when a model is converted."""
        return f"{products_needed(KERNELS)}; converts a model at its first call"

    def install(self, model: nn.Module) -> list[Lowered]:
        """Raises `SpecError` for parameter sets that OpenVINO cannot compute with, `CheckpointError` where it is missing."""
        package()
        self.uninstall(model)
        check(model, EXACT.runtime)
        model.__class__ = _computed(type(model))  # type: ignore[arg-type]
        return layer_rows(model)

    def uninstall(self, model: nn.Module) -> None:
        """Give the model its own class again; the graphs go with the engine."""
        model.__class__ = own_class(model)


@final
class OpenVinoBf16(OpenVino):
    """The same with bfloat16 between the products."""

    name, rank = "openvino-bf16", 21
    precision = "bf16"


def own_class(model: nn.Module) -> type[nn.Module]:
    """The class of a denoiser without this engine."""
    kind = type(model)
    return kind.__mro__[1] if kind in _made else kind


_made: set[type[nn.Module]] = set()  # classes that `_computed` made


@functools.cache
def _computed(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a denoiser's class, of the same name, whose forward is computed by OpenVINO."""
    its_forward: Any = original.forward

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        graphs = self.diffquant.engine.graphs  # type: ignore[union-attr]
        assert isinstance(graphs, _Graphs)
        off = not all(quantizer.enabled and quantizer.observer is None for quantizer in graphs.quantizers(self))
        if off or self.training or (torch.is_grad_enabled() and _requires_grad((arguments, keywords))):
            return its_forward(self, *arguments, **keywords)
        try:
            return graphs(self, Call(self, arguments, keywords))
        except _Refused as refused:
            output = its_forward(self, *arguments, **keywords)  # where this fails too, the call is to blame
            _fall_back(self, str(refused))
            return output

    kind = derived(original, _computed, forward)
    _made.add(kind)
    return kind


def _said(error: Exception) -> str:
    """The line of an error that tells most; OpenVINO's begin with the place in its own source."""
    lines = [
        line.strip(" -")
        for line in str(error).splitlines()
        if line.strip() and not line.startswith(("Check", "FrontEnd", "Exception"))
    ]
    return next((line for line in lines if "No conversion rule" in line), lines[0] if lines else type(error).__name__)


def _requires_grad(given: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(given))


def _fall_back(model: nn.Module, reason: str) -> None:
    """Let `model` compute with the default engine from now on; a line says so."""
    name, _ = default()
    install(model, engine_class(name)())
    _log.warning("engine 'openvino': %s; %s computes with engine '%s' from now on", reason, type(model).__name__, name)


class _Refused(Exception):
    """OpenVINO cannot compute the model as it is now; the text says why."""


class _Compiled(NamedTuple):
    """A graph compiled for the sizes of a call."""

    graph: Any
    takes_interval: bool
    make_output: MakeOutput


@final
class _Graphs:
    """The graphs of one model by the kind of call, and compiled by its sizes; a copy starts without any.

    A change of the model is noticed before each call, and all graphs are made again. Threads share compiled graphs and compute with
    requests of their own.
    """

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.compiled: dict[tuple[str, ...], _Compiled] = {}
        self._converted: dict[str, tuple[Any, MakeOutput]] = {}
        self._quantizers: list[Quantizer] = []
        self._picture: Picture | None = None
        self._changes = 0
        self._lock = threading.Lock()
        self._requests = threading.local()

    def quantizers(self, model: nn.Module) -> list[Quantizer]:
        """All of `model`, which are looked for once: that takes as long as a small layer."""
        self._quantizers = self._quantizers or [quantizer for _, quantizer in quantizers(model)]
        return self._quantizers

    def __reduce__(self) -> Any:
        """Copies and pickles start without graphs."""
        return _Graphs, (self.precision,)

    def __call__(self, model: nn.Module, call: Call) -> Any:
        """The output of a call. Raises `_Refused` where OpenVINO cannot compute it."""
        with self._lock:
            self._check(model)
            compiled = self._compile(model, call)
        outputs = _run(self._request(compiled.graph), call, model, compiled.takes_interval)
        return compiled.make_output(outputs) if call.return_dict else outputs

    def _check(self, model: nn.Module) -> None:
        """Forget the graphs where the model is not what they were made from."""
        if self._picture is None or self._picture.same():
            return
        self._changes += 1
        if self._changes > CHANGES:
            raise _Refused(f"the model changed {self._changes} times, and each time its graph would be converted anew")
        self._picture, self._quantizers, self._requests = None, [], threading.local()
        self._converted.clear()
        self.compiled.clear()

    def _compile(self, model: nn.Module, call: Call) -> _Compiled:
        sizes = (call.kind, *(str(tuple(tensor.shape)) for tensor in call.tensors))
        if sizes in self.compiled:
            return self.compiled[sizes]
        if name := hooked(model):
            raise _Refused(f"{name} has a hook or a forward of its own, which a graph does not call")
        try:
            if call.kind not in self._converted:
                self._converted[call.kind] = convert(model, call, here(), own_class(model))
            graph, make_output = self._converted[call.kind]
            tensors = feed(call, model, len(graph.inputs) > len(call.names))
            graph.reshape({each.any_name: list(tensor.shape) for each, tensor in zip(graph.inputs, tensors, strict=True)})
            with status(f"compiling {type(model).__name__}"):
                compiled = _Compiled(compile_graph(graph, self.precision), len(tensors) > len(call.tensors), make_output)
        except Exception as error:  # whatever the tracer or OpenVINO raises, another engine can compute the call
            raise _Refused(f"{type(model).__name__} cannot be converted ({_said(error)})") from error
        self.compiled[sizes] = compiled
        self._picture = self._picture or Picture(model)
        return compiled

    def _request(self, compiled: Any) -> Any:
        """A request of this thread for a compiled graph."""
        held: dict[int, tuple[Any, Any]] = self._requests.__dict__.setdefault("held", {})
        if id(compiled) not in held:
            held[id(compiled)] = compiled.create_infer_request(), compiled  # which keeps its id from being given away
        return held[id(compiled)][0]
