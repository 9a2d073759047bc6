"""A diffusers folder with torchao's int8 tensors, which diffusers loads without this package.

A linear layer holds its integer codes in an `Int8Tensor`: a scale for each output channel, ``1 / smooth`` as the factor of its
input channels, and the input quantizer where it is one set of 8-bit parameters. An asymmetric input becomes int8 codes 128 lower.
What else is quantized is written as dequantized float weights. Of torchao 0.18:

- No tensor of it holds the weight of a convolution.
- Its static scale needs as many axes as the input has, so a layer's input is looked at in one call.
- Its 4-bit tensors have scales for groups, in bfloat16, and run on GPUs alone: 4-bit codes are written in int8.
- It rounds ``x * (1 / scale)``, the simulation ``x / scale``: codes on rounding edges differ.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, final

import diffusers
import torch
from torch import Tensor, nn

from diffquant.checkpoint.targets.base import (
    Target,
    allowed_error,
    counted,
    refuse_adapter,
    refuse_difference,
    refuse_dropped,
    relative_error,
    unlike_rows,
)
from diffquant.checkpoint.targets.stock import (
    LayersReport,
    dtype_of,
    empty_model,
    float_weight,
    integers_of,
    model_class,
    switched_off,
)
from diffquant.core.dynamic import DynamicQuantizer
from diffquant.core.layers import QuantizedLayer
from diffquant.core.model import correction_of, quantized_layers, quantizers
from diffquant.core.quantizer import Quantizer
from diffquant.core.watch import watching
from diffquant.engines.base import attentions
from diffquant.errors import CheckpointError
from diffquant.host.conditions import class_names
from diffquant.host.pipeline import Host, predicted

STATIC, DYNAMIC, WEIGHT, FLOAT = (
    "int8 weight, static int8 input",
    "int8 weight, int8 input scaled per row",
    "int8 weight",
    "float weight",
)
SATURATED = (
    "; a processor that adds products of 8-bit operands in 16 bits computes wrongly with weights of 8 bits: export on another one"
)
CENTRE = 128  # between codes of uint8 and int8


class Held(NamedTuple):
    """How a layer is written: one of the four above, its integers where they are written, and what is lost; "": nothing."""

    how: str
    integers: Tensor | None
    loss: str


@final
class TorchAo(Target):
    """A pipeline's folder, loaded with diffusers and torchao alone to check it."""

    name = "torchao"

    def require(self) -> None:
        package()

    def write(self, host: Host, folder: Path, form: str, lossy: bool) -> LayersReport:
        """As of every target.

        Raises `CheckpointError` too where the loaded weights are not bit-equal to ours, and where the output differs from the
        simulation without what was dropped by more than rounding explains.
        """
        denoiser = host.denoiser
        refuse_adapter(denoiser)
        axes = _input_axes(host)
        held = {name: held_as(layer, axes.get(name)) for name, layer in quantized_layers(denoiser)}
        dropped = losses(denoiser, held)
        refuse_dropped(self.name, dropped, lossy)
        with _in_place(host, _stock(denoiser, held, axes)):
            if names := class_names(host.pipe):
                host.pipe.register_to_config(id2label=names)  # a loaded `DiTPipeline` would leave them out
            host.pipe.save_pretrained(folder)
        loaded = model_class(denoiser).from_pretrained(folder / host.name, dtype=dtype_of(denoiser))
        _check_weights(denoiser, loaded, held)
        error = _check_output(host, loaded, held)
        layers = {name: each.how for name, each in held.items()}
        return LayersReport(target=self.name, file=".", error=error, dropped=dropped, note=_note(denoiser), layers=layers)


def held_as(layer: QuantizedLayer, axes: set[int] | None) -> Held:
    """How a frozen layer is written; `axes`: how many its input has, in the calls that were seen."""
    inputs = layer.input_quantizer
    if not isinstance(layer, nn.Linear):
        return Held(FLOAT, None, "inputs of convolutions" if inputs is not None else "")
    if (integers := integers_of(layer)) is None:
        loss = "inputs with splits" if layer.splits else "inputs of layers whose weight is not int8"
        return Held(FLOAT, None, loss if inputs is not None else "")
    if inputs is None:
        return Held(WEIGHT, integers, "")
    if isinstance(inputs, DynamicQuantizer):
        return Held(DYNAMIC, integers, unlike_rows(inputs))
    if inputs.rows > 1:
        return Held(DYNAMIC, integers, "parameter sets of inputs")
    if inputs.shift is not None and bool(inputs.shift.any()):
        return Held(DYNAMIC, integers, "shifts of input channels")
    if inputs.spec.bits < 8:
        return Held(DYNAMIC, integers, "inputs of fewer than 8 bits")
    if axes is None or len(axes) != 1:
        return Held(DYNAMIC, integers, "inputs of layers that the first call does not use, or uses with different numbers of axes")
    return Held(STATIC, integers, "")


def losses(denoiser: nn.Module, held: dict[str, Held]) -> list[str]:
    """What is not written, a line for each kind, with the number of layers and the first one."""
    layers: dict[str, list[str]] = {}
    for name, each in held.items():
        if each.loss:
            instead = ", quantized to 8 bits per row instead" if each.how == DYNAMIC else ""
            layers.setdefault(f"{each.loss}{instead}", []).append(name)
    if products := list(attentions(denoiser)):
        layers["operands of attention products"] = products
    return [
        *(counted(loss, names) for loss, names in layers.items()),
        *(["the correction while sampling"] if correction_of(denoiser) is not None else []),
    ]


def package() -> Any:
    """The package torchao. Raises `CheckpointError` where it is missing."""
    try:
        return importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise CheckpointError("torchao: the package torchao is missing; pip install 'diffquant[torchao]'") from error


def _input_axes(host: Host) -> dict[str, set[int]]:
    """How many axes the input of each layer has in one call; layers that are not called are missing."""
    axes: dict[str, set[int]] = {}
    names: dict[nn.Module, str] = {layer: name for name, layer in quantized_layers(host.denoiser)}

    def look(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        axes.setdefault(names[layer], set()).add((arguments[0] if arguments else keywords["input"]).dim())

    with watching(dict.fromkeys(names, look), before=True, keywords=True):
        host.example_call(steps=1)
    return axes


def _tensor(layer: QuantizedLayer, held: Held, axes: set[int] | None) -> Tensor:
    """The weight of a linear layer as torchao has it."""
    torchao, quantizer, inputs = package(), layer.weight_quantizer, layer.input_quantizer
    assert quantizer is not None and held.integers is not None
    workflows = importlib.import_module("torchao.quantization.quantize_.workflows")
    outputs, channels = held.integers.shape
    activation: dict[str, Any] = {}
    if held.how == DYNAMIC:
        activation["act_quant_kwargs"] = workflows.QuantizeTensorToInt8Kwargs(granularity=torchao.PerRow())
    elif held.how == STATIC:
        assert isinstance(inputs, Quantizer) and axes is not None
        kind = torchao.MappingType.SYMMETRIC if inputs.spec.symmetric else torchao.MappingType.ASYMMETRIC
        activation["act_quant_kwargs"] = workflows.QuantizeTensorToInt8Kwargs(torchao.PerTensor(), kind)
        shape = [1] * next(iter(axes))
        activation["act_quant_scale"] = inputs.scale.view(shape)
        if not inputs.spec.symmetric:
            activation["act_quant_zero_point"] = (inputs.zero_point - CENTRE).to(torch.int8).view(shape)
    if layer.smooth is not None:
        activation["act_pre_scale"] = 1 / layer.smooth
    scale = quantizer.scale.expand(outputs, 1).contiguous()
    tensor: Tensor = torchao.Int8Tensor(held.integers, scale, [1, channels], layer.like.dtype, **activation)
    return tensor


def _stock(denoiser: nn.Module, held: dict[str, Held], axes: dict[str, set[int]]) -> Any:
    """A model of diffusers' own class, with torchao's tensors and dequantized weights, which knows how it is saved."""
    layers, model = dict(quantized_layers(denoiser)), empty_model(denoiser).requires_grad_(False).eval()
    ours, state = denoiser.state_dict(), {}
    for name in model.state_dict():
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is None:
            state[name] = ours[name]
        elif (each := held[name.removesuffix(".weight")]).integers is not None:
            state[name] = _tensor(layer, each, axes.get(name.removesuffix(".weight")))
        else:
            state[name] = float_weight(layer)
    model.load_state_dict(state, assign=True)
    quantization_config = diffusers.TorchAoConfig(package().Int8WeightOnlyConfig())  # each tensor says how it is quantized
    theirs = importlib.import_module("diffusers.quantizers.torchao")
    model.hf_quantizer = theirs.TorchAoHfQuantizer(quantization_config, pre_quantized=True)
    model.hf_quantizer.offload = False
    model.is_quantized, model.quantization_method = True, quantization_config.quant_method
    model.register_to_config(quantization_config=quantization_config)
    return model


@contextmanager
def _in_place(host: Host, model: nn.Module) -> Iterator[None]:
    """The pipeline with another denoiser while the block runs."""
    try:
        setattr(host.pipe, host.name, model)
        yield
    finally:
        setattr(host.pipe, host.name, host.denoiser)


def _check_weights(denoiser: nn.Module, loaded: nn.Module, held: dict[str, Held]) -> None:
    """Raises where a weight that diffusers loaded is not bit-equal to the one that was quantized."""
    theirs = dict(loaded.named_parameters())
    for name, layer in quantized_layers(denoiser):
        weight, integers = theirs[f"{name}.weight"], held[name].integers
        quantizer = layer.weight_quantizer
        if integers is None or quantizer is None:
            same = torch.equal(weight, float_weight(layer))
        else:
            same = torch.equal(weight.dequantize(), quantizer.dequantized_codes().to(weight.dtype))
        if not same:
            raise CheckpointError(f"export: layer {name!r}: diffusers loads another weight than was written; nothing was written")


def _check_output(host: Host, loaded: nn.Module, held: dict[str, Held]) -> float:
    """The error of one call of the loaded model against the simulation.

    Raises where it differs from the simulation without what was dropped by more than rounding explains. Where inputs are quantized
    per row there is no such simulation, and the error is all there is.
    """
    denoiser = host.denoiser
    arguments, expected = host.example_call(steps=1)
    with torch.no_grad():
        output = predicted(loaded, loaded(**arguments))
    if all(each.how != DYNAMIC for each in held.values()):
        lost = [layer.input_quantizer for name, layer in quantized_layers(denoiser) if held[name].loss]
        lost += [each for products in attentions(denoiser).values() for _, each in quantizers(products)]
        with switched_off(lost):
            _, held_only = host.example_call(steps=1)
            allowed = allowed_error(denoiser, arguments, held_only)
        refuse_difference(output, held_only, allowed, SATURATED)
    return relative_error(output, expected)


def _note(denoiser: nn.Module) -> str:
    return f"load it with dtype={dtype_of(denoiser)}: without a dtype diffusers loads this denoiser, and nothing else, in bfloat16"
