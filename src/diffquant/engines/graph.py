"""A frozen denoiser as a function of tensors whose layers write themselves as products of integers: what a runtime converts.

    y[o] = bias[o] + sum over parts p of the input channels and digits d of the integer weight of
           factor[p] * sum_c Q(x[c] / (factor[p] * smooth[c] * 2^shift[c])) * (scale[p, d, o] * weight[p, d, o, c])

``Q`` quantizes to 256 codes and dequantizes, ``weight`` is int8; how both are written is a runtime's `Form`. Codes of fewer than 8
bits are clamped before they are quantized. Integer weights larger than the form allows (`Form.largest`; on any machine shifted
ones, or asymmetric ones of 8 bits) are written as two digits. Two activations whose products may saturate are multiplied in
floating point, on the quantized values. An input quantizer with several parameter sets divides by its present scale (``factor``),
quantizes with a scale of one and multiplies the product; the graph then has one more input, ``interval``. The zero point is part of
the kernel, so all sets must share it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int8, Integer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from diffquant.core.attention import AttentionProducts, attention_call
from diffquant.core.layers import QUANTIZABLE, QuantizedLayer
from diffquant.core.model import activation_quantizers, clock_of, dynamic_quantizers, is_frozen, quantized_layers, quantizers
from diffquant.engines.base import engine_of
from diffquant.engines.exactness import ALL, CODES, PAIR
from diffquant.engines.graph_call import Call
from diffquant.engines.graph_operands import Grid, Largest, Part, grids_of, operands_of, parts_of
from diffquant.errors import CheckpointError, SpecError

MakeOutput = Callable[[tuple[Tensor, ...]], Any]

CENTRE = 128  # of 256 codes
SUMMED_KEYS = 512  # of an attention; up to here the sums of the softmax rows cost OpenVINO less than a product in floating point


class Form(NamedTuple):
    """How a runtime reads integers.

    ``quantize(x, scale, zero_point, signed)``: `x` through 256 codes, from -128 where `signed`, else from 0. ``dequantize(weight,
    scale)``: a stored weight times a scale for each output. ``largest``: integer beside codes up to a last one, in a layer;
    ``attention``: the same for two activations. ``stored(weight)``: an int8 weight as the file holds it. ``add(product, bias)``: of
    a linear layer. ``centres``: two activations are multiplied as integers only where both have int8 codes with a zero point of 0.
    ``float_weights``: weights beside an input in floating point are stored dequantized.
    """

    runtime: str
    quantize: Callable[[Tensor, float, int, bool], Tensor]
    dequantize: Callable[[Integer[Tensor, "out ..."], Float[Tensor, " out"]], Tensor]
    largest: Largest
    attention: Largest
    stored: Callable[[Int8[Tensor, "out ..."]], Integer[Tensor, "out ..."]] = lambda weight: weight
    add: Callable[[Tensor, Tensor], Tensor] = torch.add
    centres: bool = False
    float_weights: bool = False


def portable(last: int) -> int:
    """The largest integer beside codes up to `last` whose products, added in pairs, fit 16 bits: exact on every machine."""
    return min(ALL, PAIR // (2 * last))


def whole(last: int) -> int:
    """Every integer of 8 bits, whatever the codes: exact only where the machine does not add products in 16 bits."""
    return ALL


def signed(model: nn.Module) -> bool:
    """Whether every activation that is quantized is written as int8 with a zero point of 0; weights always are."""
    return all(grid.signed for quantizer in activation_quantizers(model).values() for grid in grids_of(quantizer))


def integer_layers(products: Iterable[tuple[str, bool]]) -> dict[str, bool]:
    """Each layer and attention of a list of products, and whether every product of it is one of 8-bit integers."""
    layers: dict[str, bool] = {}
    for name, integer in products:
        layers[name] = integer and layers.get(name, True)
    return layers


def check(model: nn.Module, runtime: str) -> None:
    """Raises for what cannot be put as a graph of integer products."""
    kind = type(model).__name__
    if not is_frozen(model):
        raise CheckpointError(f"{kind}: its weights are not integer codes; quantize first")
    if any(type(layer) not in QUANTIZABLE.values() for _, layer in quantized_layers(model)):
        raise CheckpointError(f"{kind}: computes with engine {engine_of(model)!r}; load it with engine='simulate' to convert it")
    dtypes = {tensor.dtype for tensor in model.parameters()} - {torch.float32}
    if dtypes:
        raise CheckpointError(
            f"{kind}: has parameters of {dtypes.pop()}; {runtime} graphs are made from float32; load it without a dtype"
        )
    if clock_of(model).conditional is not None:
        raise SpecError(
            f"{kind}: has parameter sets for each half of a guided call (guidance_sets), which {runtime} graphs do not; "
            "use engine 'int8' or 'simulate', or quantize without guidance_sets"
        )
    if dynamic := next(iter(dynamic_quantizers(model)), ""):
        raise SpecError(f"{dynamic}: has scales of each call, which {runtime} graphs do not; use engine 'int8' or 'simulate'")
    for name, quantizer in quantizers(model):
        if quantizer.table is None:
            continue
        used = quantizer.table.long().unique()
        for what, values in (("zero points", quantizer.zero_point), ("shifts", quantizer.shift)):
            if values is not None and (values[used] != values[used[:1]]).any():
                raise SpecError(
                    f"{name}: its {len(used)} parameter sets have different {what}; {runtime}'s integer kernels hold one for all; "
                    "fit the sets with a shared zero point (or symmetric) and without shifts, or use engine 'int8' or 'simulate'"
                )


@final
class Trace(nn.Module):
    """A denoiser as a function of tensors alone, for the time of its conversion."""

    def __init__(self, denoiser: nn.Module, call: Call, form: Form, original: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.denoiser, self._call, self.form = denoiser, call, form
        self.original: type[Any] = type(denoiser) if original is None else original  # whose forward is traced
        self.make_output: MakeOutput = tuple
        self.interval: Tensor | None = None
        self.pair = 0  # the largest sum of two products of an unsigned code and a signed integer in the graph

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs for tensors like those of the call; the last is the interval where the model has parameter sets."""
        count = len(self._call.tensors)
        self.interval = tensors[count] if len(tensors) > count else None
        output = self.original.forward(self.denoiser, **self._call.keywords(tensors[:count]))
        if isinstance(output, tuple):
            return output
        kind, names = type(output), list(output.keys())
        self.make_output = lambda tensors: kind(**dict(zip(names, tensors, strict=True)))
        return tuple(output.values())

    @contextmanager
    def rewritten(self) -> Iterator[None]:
        """Evaluation mode; layers and attention products of the denoiser compute by the forms above, until the end."""
        changed: list[nn.Module] = []
        read = {layer: layer.weight_was_read for _, layer in quantized_layers(self.denoiser)}  # the tracer looks at all attributes
        training = self.denoiser.training
        try:
            self.eval()
            for name, layer in quantized_layers(self.denoiser):
                parts = [self._stored(part) for part in parts_of(layer, self.form.largest)]
                for index, (integers, _) in enumerate(digit for part in parts for digit in part.digits):
                    self.register_buffer(f"{name}.{index}".replace(".", "/"), integers)  # a constant would be part of the code
                layer.forward = functools.partial(_layer, self, layer, parts)  # type: ignore[method-assign]
                changed.append(layer)
            for module in self.denoiser.modules():
                if isinstance(module, AttentionProducts):
                    module.forward = functools.partial(_attention, self, operands_of(module))  # type: ignore[method-assign]
                    changed.append(module)
            yield
        finally:
            for module in changed:
                del module.forward
                if isinstance(module, QuantizedLayer):
                    module.weight_was_read = read[module]
            self.denoiser.train(training)

    def _stored(self, part: Part) -> Part:
        """`part` with its integers as the file holds them; the largest pair of products is noted, unsigned integers have none."""
        if part.grid is None:
            return part._replace(digits=[(_dequantized(part), None)]) if self.form.float_weights else part
        digits = [(self.form.stored(integers), scale) for integers, scale in part.digits]
        for integers, scale in digits:
            if scale is not None and integers.dtype == torch.int8:
                self.pair = max(self.pair, 2 * part.grid.last * int(integers.int().abs().max()))
        return part._replace(digits=digits)

    def rounded(self, grid: Grid, x: Tensor) -> tuple[Tensor, float | Tensor]:
        """As `quantized`, in plain operations that no runtime takes for a quantizer: the product stays in floating point."""
        x, factor = self._scaled(grid, x)
        return torch.round(x / grid.scale).clamp(grid.low, grid.high) * grid.scale, factor

    def quantized(self, grid: Grid | None, x: Tensor, inverse: Tensor | None = None) -> tuple[Tensor, float | Tensor]:
        """`x` times `inverse` quantized, and the factor that its product has to be multiplied by.

        The order matters: OpenVINO 2026.4 computes wrongly where a division by channel, or a multiplication and then a clamp,
        precede a FakeQuantize, but not where a clamp and then a multiplication do.
        """
        if grid is None:
            return x if inverse is None else x * inverse, 1.0
        x, factor = self._scaled(grid, x)
        low, high = grid.low * grid.scale, grid.high * grid.scale
        if grid.clamps and inverse is None:
            x = x.clamp(low, high)
        elif grid.clamps and inverse is not None:
            x = torch.minimum(torch.maximum(x, low / inverse), high / inverse)
        x = x if inverse is None else x * inverse
        return self.form.quantize(x, grid.scale, 0 if grid.signed else grid.zero_point, grid.signed), factor

    def centred(self, grid: Grid | None, x: Tensor) -> tuple[Tensor, float | Tensor, float]:
        """As `quantized`, of codes around 128 where the form asks for it: `x` is the first plus the last, times the factor."""
        if grid is None or grid.signed or not self.form.centres:
            return *self.quantized(grid, x), 0.0
        x, factor = self._scaled(grid, x)
        offset = (CENTRE + grid.low) * grid.scale
        return self.form.quantize(x - offset, grid.scale, 0, True), factor, offset

    def _scaled(self, grid: Grid, x: Tensor) -> tuple[Tensor, float | Tensor]:
        """`x` by its present scale where there are parameter sets, and that scale."""
        if grid.scales is None:
            return x, 1.0
        assert self.interval is not None
        factor = grid.scales[self.interval].view(-1, *[1] * (x.dim() - 1))
        return x / factor, factor


def _layer(trace: Trace, layer: QuantizedLayer, parts: list[Part], input: Tensor) -> Tensor:
    """The forward of a layer, a product for each digit of each part of its weight."""
    splits, axis = list(layer.splits), layer.channel_axis
    output: Tensor | None = None
    for part, values in zip(parts, input.split(splits, dim=axis) if splits else (input,), strict=True):
        for integers, scale in part.digits:
            # quantized for each: ONNX Runtime 1.31 leaves two products of one int8 operand in floating point
            codes, factor = trace.quantized(part.grid, values, part.inverse)
            if scale is None:
                weight = integers
            elif part.grid is None:  # ONNX Runtime would round the input of a DequantizeLinear's product to 8 bits
                weight = integers.float() * scale.view(-1, *[1] * (integers.dim() - 1))
            else:
                weight = trace.form.dequantize(integers, scale)
            product = layer.compute(codes, weight, None)
            product = product if isinstance(factor, float) else product * factor
            output = product if output is None else output + product
    assert output is not None
    if layer.bias is None:
        return output
    return trace.form.add(output, layer.bias) if axis == -1 else output + layer.bias.view(layer.channel_view)


def _dequantized(part: Part) -> Tensor:
    """The float weight of a part."""
    weights = [
        integers if scale is None else integers.float() * scale.view(-1, *[1] * (integers.dim() - 1))
        for integers, scale in part.digits
    ]
    return sum(weights[1:], weights[0])


def _attention(trace: Trace, grids: dict[str, Grid | None], *arguments: Any, **keywords: Any) -> Tensor:
    """The forward of attention products."""
    call = attention_call(*arguments, **keywords)
    query, query_factor, query_offset = trace.centred(grids["query"], call.query)
    # softmax drops what the offset of the keys would add
    key, key_factor, _ = _second(trace, _last(trace, grids["query"]), grids["key"], call.key)
    scores = query @ key.transpose(-2, -1)
    if query_offset:
        scores = scores + query_offset * key.sum(dim=-1).unsqueeze(-2)
    scores = call.masked(scores * (query_factor * key_factor * call.factor))
    softmax, softmax_factor = trace.quantized(grids["softmax"], scores.softmax(dim=-1))
    weighted, last = grids["value"], None if grids["softmax"] is None else grids["softmax"].last
    if weighted is None or weighted.signed or int(key.shape[-2]) <= SUMMED_KEYS:
        value, value_factor, value_offset = _second(trace, last, weighted, call.value)
    else:
        (value, value_factor), value_offset = trace.quantized(weighted, call.value), 0.0
    product = softmax @ value
    if value_offset:
        product = product + value_offset * softmax.sum(dim=-1, keepdim=True)
    return product * (softmax_factor * value_factor)


def _last(trace: Trace, grid: Grid | None) -> int | None:
    """The largest unsigned code that a kernel sees of an operand that `Trace.centred` quantizes; None in floating point."""
    return None if grid is None else CODES[0] if trace.form.centres and not grid.signed else grid.last


def _second(trace: Trace, last: int | None, grid: Grid | None, x: Tensor) -> tuple[Tensor, float | Tensor, float]:
    """The second operand of a product of two activations as `Trace.centred` gives it; rounded where products may saturate.

    ``last``: the largest code of the first one.
    """
    if last is None or grid is None:
        return trace.centred(grid, x)
    if trace.form.attention(last) >= grid.magnitude:
        trace.pair = max(trace.pair, 2 * last * grid.magnitude if trace.form.centres else 0)
        return trace.centred(grid, x)
    return *trace.rounded(grid, x), 0.0


@contextmanager
def status(text: str) -> Iterator[None]:
    """A line with a spinner and the time on stderr, gone at the end."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(text, total=None)
        yield
