"""Layers of every kind and quantization side by side in one model, for what converts models, and how their outputs compare."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffquant.core.affine import scale_from_range
from diffquant.core.clock import StepClock
from diffquant.core.layers import QuantizedConv2d, make_quantizable
from diffquant.core.model import ModelState, freeze, quantized_layers, quantizers
from diffquant.core.spec import LayerSpec, QuantSpec
from diffquant.host.denoiser import tick

TIMESTEPS = (900.0, 500.0, 100.0)
CHANNELS = 16
EDGE = 1e-4  # of a step: closer to the middle between two codes, float rounding decides


@torch.no_grad()
def calibrate(model: nn.Module, call: Callable[[], Any], widest: float = 1.0) -> None:
    """Min-max of the weights, and of the inputs that `call` brings; the sets share the zero point and differ in their scales."""
    seen: dict[str, list[Tensor]] = {}
    for name, quantizer in quantizers(model):
        if quantizer.clock is not None:
            quantizer.observer = seen.setdefault(name, []).append
    call()
    for _, layer in quantized_layers(model):
        weight = layer.weight_quantizer
        if weight is not None:
            for index, part in enumerate(layer.weight.float().split(weight.splits or layer.weight.shape[1], dim=1)):
                rows = part.reshape(weight.rows, -1)
                weight.scale[:, index], weight.zero_point[:, index] = scale_from_range(rows.amin(1), rows.amax(1), weight.spec)
    for name, quantizer in quantizers(model):
        if quantizer.clock is not None:
            quantizer.observer = None
            low, high = min(x.min() for x in seen[name]), max(x.max() for x in seen[name])
            scale, zero_point = scale_from_range(low, high, quantizer.spec)
            quantizer.scale.copy_(scale * torch.linspace(1, widest, quantizer.rows).view(-1, 1))
            quantizer.zero_point.copy_(zero_point.expand_as(quantizer.zero_point))
    freeze(model)


class Layers(nn.Module):
    """A denoiser whose layers stand side by side: convolutions read the sample, linears its pixels as tokens."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor, ...]:
        tokens = sample.flatten(2).transpose(1, 2)
        return tuple(layer(sample if isinstance(layer, nn.Conv2d) else tokens) for layer in self.layers)


def spec(weight: int, input: int, weight_symmetric: bool = True, input_symmetric: bool = False, **others: Any) -> LayerSpec:
    channel = QuantSpec(bits=weight, symmetric=weight_symmetric, granularity="channel")
    return LayerSpec(weight=channel, input=QuantSpec(bits=input, symmetric=input_symmetric), **others)


MAKE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(CHANNELS, 12),
    "conv": lambda: nn.Conv2d(CHANNELS, 12, 3, padding=1),
    "linear without bias": lambda: nn.Linear(CHANNELS, 12, bias=False),
    "strided conv": lambda: nn.Conv2d(CHANNELS, 12, 3, stride=2, padding=(1, 0), dilation=(1, 2)),
    "grouped conv": lambda: nn.Conv2d(CHANNELS, 32, 3, groups=2),
    "depthwise conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS, bias=False),
    "circular conv": lambda: nn.Conv2d(CHANNELS, 12, 3, padding=1, padding_mode="circular"),
}
SPLITS = (6, 10)
SPECS = {
    f"w{bits}{'s' if weight else 'u'} a{bits}{'s' if given else 'u'}": spec(bits, bits, weight, given)
    for bits in range(2, 9)
    for weight in (True, False)
    for given in (True, False)
}
FEATURES = {
    "smooth": spec(4, 8, smooth=True),
    "shift": spec(4, 8, shift=True),
    "splits": spec(4, 8, splits=SPLITS),
    "all at once": spec(8, 6, False, True, splits=SPLITS, smooth=True, shift=True),
}
MIXED = {"w4s a8u": spec(4, 8)}
WHOLE = LayerSpec(weight=QuantSpec(bits=4), input=QuantSpec(bits=8))
CASES = {
    **{
        f"{name} {text}": (name, each)
        for name in ("linear", "conv")
        for text, each in (SPECS | FEATURES | {"whole": WHOLE}).items()
    },
    **{f"{name} {text}": (name, (SPECS | MIXED)[text]) for name in list(MAKE)[2:] for text in ("w4s a8u", "w8u a8s", "w8s a8u")},
    "grouped conv shift": ("grouped conv", FEATURES["shift"]),
    "linear weight only": ("linear", LayerSpec(weight=MIXED["w4s a8u"].weight)),
    "linear input only": ("linear", LayerSpec(input=QuantSpec(bits=8), shift=True, smooth=True)),
}
HALF_FLOAT = ("linear weight only", "linear input only")
OF_SETS = {
    "conv": ("conv", spec(4, 8, sets=3)),
    "linear": ("linear", spec(8, 6, sets=3)),
    "conv with everything": ("conv", spec(8, 8, False, True, sets=3, splits=SPLITS, smooth=True, shift=True)),
}


def sample(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(seed))


def make_layers(cases: Sequence[tuple[str, LayerSpec]], timesteps: Sequence[float] = ()) -> Layers:
    torch.manual_seed(0)
    model, clock = Layers([MAKE[name]() for name, _ in cases]), StepClock(timesteps)
    for layer, (_, each) in zip(model.layers, cases, strict=True):
        make_quantizable(layer, each, clock)
        if layer.smooth is not None:
            layer.smooth.copy_(torch.linspace(0.6, 1.7, CHANNELS))
        given = layer.input_quantizer
        if given is not None and given.shift is not None:
            given.shift.copy_((torch.arange(CHANNELS) % 4).expand_as(given.shift))
    model.diffquant = ModelState(clock, ("timestep", 1))
    model.register_forward_pre_hook(tick, with_kwargs=True)
    calibrate(model, lambda: model(0.6 * sample(), 0), widest=1.6)  # smaller than what is compared, so that some codes are clamped
    return model


@torch.no_grad()
def assert_equal_but_for_edges(layer: Any, x: Tensor, expected: Tensor, output: Tensor) -> None:
    """Equal up to float rounding where no code is within `EDGE` of a rounding edge, else within one step of those codes."""
    if layer.smooth is not None:
        x = x / layer.smooth.view(layer.channel_view)
    weight = layer.float_weight
    if weight is None:
        weight = layer.weight_quantizer.dequantized_codes()
    elif layer.smooth is not None:
        weight = weight * layer.smooth

    def product(values: Tensor) -> Tensor:
        if isinstance(layer, QuantizedConv2d):
            return layer._conv_forward(values, weight.abs(), None)
        return nn.functional.linear(values, weight.abs())

    given = layer.input_quantizer
    step = torch.zeros(()) if given is None else given.operands(x)[0]
    fraction = torch.zeros_like(x) if given is None else x / step - (x / step).floor()
    edge = (fraction - 0.5).abs() < EDGE
    assert edge.float().mean() < 0.01
    rounding = 2e-6 * (product(x.abs()) + (0 if layer.bias is None else expected.abs()) + 1)
    assert ((expected - output).abs() <= rounding + product(edge * step)).all()
