"""The OpenVINO engine: a frozen model computed by OpenVINO's integer kernels on a CPU.

`openvino_graph` says what the graph is made of. Needs the package openvino, which is imported when it is needed.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffquant.core.attention import derived
from diffquant.core.model import quantizers
from diffquant.core.quantizer import Quantizer
from diffquant.engines.base import Engine, Lowered, default, engine_class, install, layer_rows
from diffquant.engines.changes import Picture, hooked
from diffquant.engines.exactness import answer_of, products_needed
from diffquant.engines.graph import MakeOutput, check, status
from diffquant.engines.graph_call import Call, feed
from diffquant.engines.openvino_graph import EXACT, Precision, compile_graph, convert, here, infer, package

CHANGES = 3  # of a model that make its graphs anew; after more it computes with another engine
KERNELS = ("openvino linear", "openvino convolution")  # as `exactness` names them
_log = logging.getLogger(__name__)


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
        off = not all(quantizer.unobserved for quantizer in graphs.quantizers(self))
        leaves = pytree.tree_leaves((arguments, keywords)) if torch.is_grad_enabled() else []
        if off or self.training or any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            return its_forward(self, *arguments, **keywords)
        try:
            return graphs(self, Call(self, arguments, keywords))
        except _Refused as refused:
            output = its_forward(self, *arguments, **keywords)  # where this fails too, the call is to blame
            name, _ = default()
            install(self, engine_class(name)())
            _log.warning("engine 'openvino': %s; %s computes with engine '%s' from now on", refused, type(self).__name__, name)
            return output

    kind = derived(original, _computed, forward)
    _made.add(kind)
    return kind


def _reason(error: Exception) -> str:
    """The line of an error that says most; OpenVINO's begin with the place in its own source."""
    lines = [
        line.strip(" -")
        for line in str(error).splitlines()
        if line.strip() and not line.startswith(("Check", "FrontEnd", "Exception"))
    ]
    return next((line for line in lines if "No conversion rule" in line), lines[0] if lines else type(error).__name__)


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
        outputs = infer(self._request(compiled.graph), call, model, compiled.takes_interval)
        return compiled.make_output(outputs) if call.return_dict else outputs

    def _check(self, model: nn.Module) -> None:
        """Forget the graphs where the model has changed since they were made."""
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
            raise _Refused(f"{type(model).__name__} cannot be converted ({_reason(error)})") from error
        self.compiled[sizes] = compiled
        self._picture = self._picture or Picture(model)
        return compiled

    def _request(self, compiled: Any) -> Any:
        """A request of this thread for a compiled graph."""
        held: dict[int, tuple[Any, Any]] = self._requests.__dict__.setdefault("held", {})
        if id(compiled) not in held:
            held[id(compiled)] = compiled.create_infer_request(), compiled  # which keeps its id from being given away
        return held[id(compiled)][0]
