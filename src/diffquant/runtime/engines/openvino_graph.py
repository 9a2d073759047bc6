"""From a frozen model to an OpenVINO graph, with a FakeQuantize wherever the simulation quantizes.

OpenVINO turns a product of quantized operands into an integer kernel where it finds the forms it knows: the input as a FakeQuantize
of 256 levels, the weight as a constant of int8 times a scale for each output. `convert` lets PyTorch trace the model while its
layers write themselves in these forms:

    y[o] = bias[o] + sum over parts p of the input channels and digits d of the integer weight of
           factor[p] * scale[p, d, o] * sum_c FakeQuantize(x[c] / (factor[p] * smooth[c] * 2^shift[c])) * weight[p, d, o, c]

Codes of fewer than 8 bits are clamped before they are quantized. Integer weights that do not fit int8 (shifted ones, or asymmetric
ones of 8 bits) are written as two digits. An input quantizer with several parameter sets divides by its present scale (``factor``),
quantizes with a step of one and multiplies the product; the graph then has one more input, ``interval``. The zero point is part of
the kernel, so all sets must share it.

Two activations (the products of an attention) are multiplied as integers only where their codes minus the zero point fit int8: with
symmetric quantizers, with fewer than 8 bits, or where no value is negative; else in floating point, with the same quantized values.

FakeQuantize multiplies by the reciprocal step where the simulation divides: codes on an edge may differ by one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from diffquant.core.layers import AttentionProducts, QuantizedConv2d, QuantizedLayer, smoothed_weight
from diffquant.core.quantizer import Quantizer, StepClock
from diffquant.core.spec import CheckpointError, SpecError
from diffquant.core.surgery import is_frozen, quantized_layers, quantizers, timestep_argument
from diffquant.runtime.engines.int8_cpu import IntegerConv2d, IntegerLinear
from diffquant.runtime.engines.kernels import LIMB, digits

MakeOutput = Callable[[tuple[Tensor, ...]], Any]
_Digit = tuple[Tensor, Tensor | None]  # int8 [out, in, ...] and its scale for each output

INTERVAL = "interval"  # name of the graph's input that chooses the parameter sets


class Call:
    """The arguments of one call of a denoiser, its tensors apart from the rest; the timestep is a tensor, one for each sample."""

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = inspect.signature(model.forward).bind(*arguments, **keywords).arguments
        self.return_dict = bool(given.pop("return_dict", True))
        name, _ = timestep_argument(model)
        sample = next(leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor))
        batch = len(sample)
        given[name] = torch.as_tensor(given[name]).reshape(-1).expand(batch)
        paths, self._structure = pytree.tree_flatten_with_path(given)
        self._leaves = [leaf for _, leaf in paths]
        self._at = [index for index, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self._leaves[index] for index in self._at]
        self.names = [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in paths[index][0]) for index in self._at]
        self.shapes = [[-1 if len(t) == batch else len(t), *t.shape[1:]] if t.dim() else [] for t in self.tensors]
        rest = [leaf for leaf in self._leaves if not isinstance(leaf, Tensor)]
        self.kind = repr((self.names, self.shapes, [tensor.dtype for tensor in self.tensors], rest))

    def keywords(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments with other tensors in the place of these."""
        leaves = list(self._leaves)
        for index, tensor in zip(self._at, tensors, strict=True):
            leaves[index] = tensor
        keywords: dict[str, Any] = pytree.tree_unflatten(leaves, self._structure)
        return keywords


def convert(model: nn.Module, call: Call) -> tuple[Any, MakeOutput]:
    """The graph of `model` for calls like `call`, and what makes its output of the tensors that the graph puts out."""
    openvino = package()
    check(model)
    trace, training = _Trace(model, call), model.training
    tensors, names, shapes = [*call.tensors], [*call.names], [*call.shapes]
    if any(quantizer.table is not None for _, quantizer in quantizers(model)):
        tensors, names, shapes = [*tensors, torch.zeros(1, dtype=torch.long)], [*names, INTERVAL], [*shapes, [-1]]
    kind, example = type(model).__name__, tuple(tensors)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tracing is deprecated, and that sizes other than the batch become constants
            with status(f"tracing {kind}"), trace.rewritten():
                traced = torch.jit.trace(trace.eval(), example, check_trace=False, strict=False)
            with status(f"converting {kind} to OpenVINO"):
                # not `convert_model`, which reports its use to the vendor
                frontend = openvino.frontend.FrontEndManager().load_by_framework("pytorch")
                decoders = importlib.import_module("openvino.frontend.pytorch.ts_decoder")
                decoder = decoders.TorchScriptPythonDecoder(traced, example_input=example)  # has to live until the end
                graph = frontend.convert(frontend.load(decoder))
                offline = importlib.import_module("openvino._offline_transformations")
                offline.apply_moc_transformations(graph, cf=False, smart_reshape=True)
    finally:
        model.train(training)
    for parameter, name in zip(graph.inputs, names, strict=True):
        parameter.get_tensor().set_names({name})
    graph.reshape(dict(zip(names, shapes, strict=True)))
    clock = model.step_clock
    assert isinstance(clock, StepClock)
    graph.set_rt_info(",".join(str(timestep) for timestep in clock.timesteps), ["diffquant", "timesteps"])
    return graph, trace.make_output


def check(model: nn.Module) -> None:
    """Raises for what cannot be put as a graph of integer products."""
    kind = type(model).__name__
    if not is_frozen(model):
        raise CheckpointError(f"{kind}: its weights are not integer codes; quantize first")
    if any(isinstance(layer, (IntegerLinear, IntegerConv2d)) for _, layer in quantized_layers(model)):
        raise CheckpointError(f"{kind}: computes with engine 'int8'; load it with engine='simulate' to convert it")
    dtypes = {tensor.dtype for tensor in model.parameters()} - {torch.float32}
    if dtypes:
        raise CheckpointError(f"{kind}: has parameters of {dtypes.pop()}; OpenVINO converts from float32; load it without a dtype")
    for name, quantizer in quantizers(model):
        if quantizer.table is None:
            continue
        used = quantizer.table.long().unique()
        for what, values in (("zero points", quantizer.zero_point), ("shifts", quantizer.shift)):
            if values is not None and (values[used] != values[used[:1]]).any():
                raise SpecError(
                    f"{name}: its {len(used)} parameter sets have different {what}; OpenVINO's integer kernels hold one for all; "
                    "fit the sets with a shared zero point (or symmetric) and without shifts, or use engine 'int8' or 'simulate'"
                )


@final
class _Trace(nn.Module):
    """A denoiser as a function of tensors alone, for the time of its conversion."""

    def __init__(self, denoiser: nn.Module, call: Call) -> None:
        super().__init__()
        self.denoiser, self._call = denoiser, call
        self.make_output: MakeOutput = tuple
        self.interval: Tensor | None = None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs for tensors like those of the call; the last is the interval where the model has parameter sets."""
        count = len(self._call.tensors)
        self.interval = tensors[count] if len(tensors) > count else None
        output = _original(self.denoiser).forward(self.denoiser, **self._call.keywords(tensors[:count]))
        if isinstance(output, tuple):
            return output
        kind, names = type(output), list(output.keys())
        self.make_output = lambda tensors: kind(**dict(zip(names, tensors, strict=True)))
        return tuple(output.values())

    @contextmanager
    def rewritten(self) -> Iterator[None]:
        """Layers and attention products of the denoiser compute by the forms above, until the end."""
        changed: list[nn.Module] = []
        try:
            for _, layer in quantized_layers(self.denoiser):
                layer.forward = functools.partial(_layer, self, layer, _inverses(layer), _weights(layer))  # type: ignore[method-assign]
                changed.append(layer)
            for module in self.denoiser.modules():
                if isinstance(module, AttentionProducts):
                    module.forward = functools.partial(_attention, self, module)  # type: ignore[method-assign]
                    changed.append(module)
            yield
        finally:
            for module in changed:
                del module.forward

    def quantized(
        self, quantizer: Quantizer | None, x: Tensor, part: int = 0, inverse: Tensor | None = None
    ) -> tuple[Tensor, float | Tensor]:
        """`x` times `inverse` through part `part` of a quantizer, and the factor that its product has to be multiplied by.

        The order matters: OpenVINO 2026.4 computes wrongly where a division by channel, or a multiplication and then a clamp,
        precede a FakeQuantize, but not where a clamp and then a multiplication do.
        """
        if quantizer is None:
            return x if inverse is None else x * inverse, 1.0
        spec, scale = quantizer.spec, float(quantizer.scale[0, part])
        factor: float | Tensor = 1.0
        if quantizer.table is not None:
            assert self.interval is not None
            of_intervals, scale = quantizer.scale[quantizer.table.long(), part], 1.0
            factor = of_intervals[self.interval].view(-1, *[1] * (x.dim() - 1))
            x = x / factor
        zero_point = int(quantizer.zero_point[_row(quantizer), part])
        low, high = spec.code_min - zero_point, spec.code_max - zero_point
        if spec.bits < 8 and inverse is None:
            x = x.clamp(low * scale, high * scale)
        elif spec.bits < 8 and inverse is not None:
            x = torch.minimum(torch.maximum(x, low * scale / inverse), high * scale / inverse)
        x = x if inverse is None else x * inverse
        if low >= -128 and high <= 127:  # int8 without a zero point, the only form in which two activations are multiplied
            return torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127), factor
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255), factor


def _layer(trace: _Trace, layer: QuantizedLayer, inverses: list[Tensor] | None, weights: list[list[_Digit]], x: Tensor) -> Tensor:
    """The forward of a layer, a product for each digit of each part of its weight."""
    splits, axis = _splits(layer), 1 if isinstance(layer, QuantizedConv2d) else -1
    output: Tensor | None = None
    for part, values in enumerate(x.split(splits, dim=axis) if splits else (x,)):
        codes, factor = trace.quantized(layer.input_quantizer, values, part, None if inverses is None else inverses[part])
        for integers, scale in weights[part]:
            weight = integers if scale is None else integers.float() * scale
            if isinstance(layer, QuantizedConv2d):
                product: Tensor = layer._conv_forward(codes, weight, None)
            else:
                product = functional.linear(codes, weight)
            product = product if isinstance(factor, float) else product * factor
            output = product if output is None else output + product
    assert output is not None
    return output if layer.bias is None else output + layer.bias.view(_view(layer))


def _inverses(layer: QuantizedLayer) -> list[Tensor] | None:
    """By part of the input channels, what they are multiplied by before they are quantized: 1 / (smooth * 2^shift)."""
    smooth, given = layer.smooth, layer.input_quantizer
    inverse = None if smooth is None else 1 / smooth
    if given is not None and given.shift is not None:
        powers = torch.exp2(-given.shift[_row(given)].float())
        inverse = powers if inverse is None else powers * inverse
    return None if inverse is None else [each.view(_view(layer)) for each in inverse.split(_splits(layer) or [len(inverse)])]


def _weights(layer: QuantizedLayer) -> list[list[_Digit]]:
    """By part of the input channels, the digits of the shifted integer weight and their scales, [out, 1, ...].

    A weight that is not quantized is one digit without scale.
    """
    quantizer, given = layer.weight_quantizer, layer.input_quantizer
    whole = smoothed_weight(layer).detach().float() if quantizer is None else quantizer.codes
    assert whole is not None
    outputs, channels = whole.shape[:2]
    shift = torch.zeros(outputs, channels, dtype=torch.int32)
    if given is not None and given.shift is not None:
        shift = (
            given.shift[_row(given)]
            .int()
            .view(-1, channels)
            .repeat_interleave(outputs // (given.shift.shape[1] // channels), dim=0)
        )
    sizes, beside = _splits(layer) or [channels], [1] * (whole.dim() - 2)
    found: list[list[_Digit]] = []
    for part, (values, shifts) in enumerate(zip(whole.split(sizes, 1), shift.split(sizes, 1), strict=True)):
        shifts = shifts.reshape(*shifts.shape, *beside)
        if quantizer is None:
            found.append([(values * torch.exp2(shifts.float()), None)])
            continue
        scale, zero_point = (
            each[:, part].expand(outputs).reshape(-1, 1, *beside) for each in (quantizer.scale, quantizer.zero_point)
        )
        integers = (values.int() - zero_point.int()) << shifts
        found.append([(digit, scale * float(LIMB**index)) for index, digit in enumerate(digits(integers))])
    return found


def _row(quantizer: Quantizer) -> int:
    """A row of the quantizer that is in use; what is read from it is the same in all others (`check`)."""
    return 0 if quantizer.table is None else int(quantizer.table[0])


def _view(layer: QuantizedLayer) -> tuple[int, ...]:
    """The shape in which a value for each channel broadcasts against inputs and outputs of `layer`."""
    return (-1, 1, 1) if isinstance(layer, QuantizedConv2d) else (-1,)


def _splits(layer: QuantizedLayer) -> list[int]:
    return list(next((q.splits for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None), ()))


def _attention(
    trace: _Trace,
    products: AttentionProducts,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The forward of attention products."""
    if dropout_p or is_causal or enable_gqa:
        raise SpecError("attention products: dropout, causal masks and grouped heads are not quantized; set them to float")

    def operand(name: str, x: Tensor) -> tuple[Tensor, float | Tensor]:
        return trace.quantized(getattr(products, name), x)

    (query, query_factor), (key, key_factor), (value, value_factor) = (
        operand("query", query),
        operand("key", key),
        operand("value", value),
    )
    factor = query_factor * key_factor * (int(query.shape[-1]) ** -0.5 if scale is None else scale)
    scores = query @ key.transpose(-2, -1) * factor
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    softmax, softmax_factor = operand("softmax", scores.softmax(dim=-1))
    return softmax @ value * (softmax_factor * value_factor)


def _original(model: nn.Module) -> type[Any]:
    """The class of a denoiser before `install`."""
    return type(model).__mro__[1] if hasattr(model, "openvino_graphs") else type(model)


@contextmanager
def status(text: str) -> Iterator[None]:
    """A line with a spinner and the time on stderr, gone at the end."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(text, total=None)
        yield


def package() -> Any:
    """The package. Raises `CheckpointError` where it is missing."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise CheckpointError("engine 'openvino': the package openvino is missing; pip install 'diffquant[openvino]'") from error
