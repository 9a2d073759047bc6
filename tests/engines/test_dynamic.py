"""Scales of each call on the int8 engine, against integer arithmetic in float64."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.core.clock import StepClock
from diffquant.core.dynamic import DynamicQuantizer
from diffquant.core.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear, make_quantizable
from diffquant.core.spec import LayerSpec, QuantSpec
from diffquant.engines.int8 import dynamic
from diffquant.engines.int8 import engine as int8
from diffquant.engines.int8.integer_layers import IntegerConv2d, IntegerLinear

pytestmark = pytest.mark.skipif(bool(int8.Int8.unsupported()), reason=int8.Int8.unsupported() or "integer kernels")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 5), (2, 3, 12)),
    "linear without bias": (lambda: nn.Linear(12, 5, bias=False), (3, 12)),
    "conv": (lambda: nn.Conv2d(12, 5, 3, padding=1), (3, 12, 6, 5)),
    "conv without padding": (lambda: nn.Conv2d(12, 5, 3, bias=False), (3, 12, 6, 5)),
    "pointwise conv": (lambda: nn.Conv2d(12, 5, 1), (2, 12, 6, 5)),
    "strided conv": (lambda: nn.Conv2d(12, 5, 3, stride=2, padding=(1, 0), dilation=(1, 2)), (2, 12, 8, 9)),
    "grouped conv": (lambda: nn.Conv2d(12, 6, 3, groups=3), (2, 12, 6, 5)),
    "depthwise conv": (lambda: nn.Conv2d(12, 12, 3, groups=12, padding=1, bias=False), (2, 12, 5, 5)),
}
CASES = [
    (kind, scale)
    for kind in LAYERS
    for scale in ("dynamic-sample", "dynamic-row")
    if scale == "dynamic-sample" or kind.startswith(("linear", "pointwise"))
]


@pytest.fixture(autouse=True)
def of_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two products of integers take longer than one in floating point; and small chunks of rows."""
    monkeypatch.setattr(int8, "faster_in_float", lambda layer, products, largest: False)
    monkeypatch.setattr(dynamic, "ROWS", 4)


def lowered(kind: str, scale: str, bits: int, symmetric: bool, weight_symmetric: bool = True, smooth: bool = False) -> Any:
    """A frozen and lowered layer with random codes."""
    layer = LAYERS[kind][0]().requires_grad_(False)
    weight_spec = QuantSpec(bits=8, symmetric=weight_symmetric, granularity="channel")
    operand = QuantSpec(bits=bits, symmetric=symmetric)
    options = {"input_scale": scale, "smooth": smooth}
    make_quantizable(layer, LayerSpec.model_validate({"weight": weight_spec, "input": operand, **options}), StepClock(()))
    assert isinstance(layer, QuantizedLayer) and layer.input_quantizer is not None
    weight = layer.weight_quantizer
    assert weight is not None
    codes = torch.randint(weight_spec.code_min, weight_spec.code_max + 1, layer.weight.shape)
    weight.codes = codes.to(torch.int8 if weight_symmetric else torch.uint8)
    weight.scale.copy_(torch.rand_like(weight.scale) * 0.05 + 0.01)
    if not weight_symmetric:
        weight.zero_point.copy_(torch.randint(0, 256, weight.zero_point.shape))
    if layer.smooth is not None:
        layer.smooth.copy_(2.0 ** torch.randint(-2, 3, layer.smooth.shape))
    layer.forget_weight()
    weight.enabled = layer.input_quantizer.enabled = True
    assert int8.lower_layer(layer) == ""
    return layer


def on_the_grid(shape: tuple[int, ...], axis: int, scale: str, spec: QuantSpec) -> Tensor:
    """Values of integer codes around random zero points, times powers of two, whose ranges give back exactly these scales."""
    places = list(range(1, len(shape))) if scale == "dynamic-sample" else [axis % len(shape)]
    rows = [1 if dim in places else size for dim, size in enumerate(shape)]
    codes = torch.randint(spec.code_min, spec.code_max + 1, shape).float()
    zero_point = torch.zeros(rows) if spec.symmetric else torch.randint(spec.code_min, spec.code_max + 1, rows).float()
    first, second = (
        tuple(slice(index, index + 1) if dim in places else slice(None) for dim in range(len(shape))) for index in (0, 1)
    )
    codes[first], codes[second] = spec.code_max, -spec.code_max if spec.symmetric else spec.code_min
    return (codes.clamp(min=-spec.code_max) - zero_point) * 2.0 ** torch.randint(-4, 5, rows)


def expected_output(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """In float64, of the input itself: it is on the grid."""
    weight = layer.weight_quantizer
    assert weight is not None and weight.codes is not None
    scale, zero_point = (each.double() for each in weight.operands(weight.codes))
    dense = (weight.codes.double() - zero_point) * scale
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, QuantizedConv2d):
        return functional.conv2d(x.double(), dense, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return functional.linear(x.double(), dense, bias)


def bound(layer: QuantizedLayer, x: Tensor) -> float:
    """Some roundings of float32, of a sum as large as the largest one of unsigned codes by the largest scale there is."""
    weight = layer.weight_quantizer
    assert weight is not None and weight.codes is not None
    terms = weight.codes[0].numel() * 255 * 255 * float(weight.scale.max()) * float(x.abs().max())
    return terms * 2.0**-22


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("kind", "scale"), CASES)
def test_output_is_that_of_integers(kind: str, scale: str, bits: int, symmetric: bool) -> None:
    layer = lowered(kind, scale, bits, symmetric)
    assert isinstance(layer, IntegerLinear | IntegerConv2d) and isinstance(layer.product, dynamic.DynamicProduct)
    x = on_the_grid(LAYERS[kind][1], layer.channel_axis, scale, QuantSpec(bits=bits, symmetric=symmetric))
    assert isinstance(layer.input_quantizer, DynamicQuantizer)
    assert torch.equal(layer.input_quantizer.simulated(x), x)
    assert (layer(x) - expected_output(layer, x)).abs().max() <= bound(layer, x)


@pytest.mark.parametrize(("kind", "scale"), [CASES[1], CASES[4], CASES[7]])
def test_two_digits_and_smoothing(kind: str, scale: str) -> None:
    layer = lowered(kind, scale, 8, False, weight_symmetric=False, smooth=True)
    x = on_the_grid(LAYERS[kind][1], layer.channel_axis, scale, QuantSpec(bits=8))
    assert layer.smooth is not None
    smoothed = x * layer.smooth.view(layer.channel_view)
    assert (layer(smoothed) - expected_output(layer, x)).abs().max() <= bound(layer, x)


@pytest.mark.parametrize(("kind", "scale"), CASES[:2] + CASES[4:5])
def test_copies_and_pickles_compute_the_same(kind: str, scale: str) -> None:
    layer = lowered(kind, scale, 8, False)
    x = torch.randn(LAYERS[kind][1])
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer) and torch.equal(again(x), expected)


def test_bfloat16_and_what_is_simulated() -> None:
    layer = lowered("linear", "dynamic-row", 8, False)
    x = torch.randn(2, 3, 12)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    wanted = x.clone().requires_grad_(True)
    layer(wanted).sum().backward()
    assert wanted.grad is not None
    int8.Int8().uninstall(layer)
    assert type(layer) is QuantizedLinear
    # one code may be on either side of a rounding edge: a scale of the input times the largest weight
    assert layer.weight_quantizer is not None
    edge = float((x.amax(-1) - x.amin(-1)).max() / 255 * layer.weight.abs().max())
    assert (layer(x) - lowered_again(layer)(x)).abs().max() <= 2 * edge


def lowered_again(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    assert isinstance(layer, QuantizedLayer) and int8.lower_layer(layer) == ""
    return layer


@pytest.mark.parametrize(("kind", "scale"), [("linear", "dynamic-row"), ("conv", "dynamic-sample")])
def test_compiled(kind: str, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what checks shapes cannot be compiled
    layer = lowered(kind, scale, 8, False)
    x = on_the_grid(LAYERS[kind][1], layer.channel_axis, scale, QuantSpec(bits=8))
    output = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert (output - expected_output(layer, x)).abs().max() <= bound(layer, x)
