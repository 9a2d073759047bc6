import pytest
import torch
from torch import nn

from diffquant.core.affine import fake_quantize, scale_from_range
from diffquant.core.clock import StepClock
from diffquant.core.dynamic import DynamicQuantizer
from diffquant.core.layers import QuantizedLayer, make_quantizable
from diffquant.core.model import activation_quantizers, dynamic_quantizers, enable, quantizers, switched
from diffquant.core.spec import LayerSpec, QuantSpec
from diffquant.errors import SpecError

WEIGHT = QuantSpec(bits=8, symmetric=True, granularity="channel")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shape", "axis"), [((2, 5, 7), -1), ((3, 7, 4, 5), 1), ((6, 7), -1)])
def test_each_row_is_quantized_over_its_own_range(shape: tuple[int, ...], axis: int, bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    quantized = DynamicQuantizer(spec, axis, per_sample=False).simulated(x)
    for row, expected in zip(quantized.movedim(axis, -1).reshape(-1, 7), x.movedim(axis, -1).reshape(-1, 7), strict=True):
        scale, zero_point = scale_from_range(expected.min(), expected.max(), spec)
        assert torch.equal(row, fake_quantize(expected, scale, zero_point, spec))


def test_each_sample_is_quantized_over_its_own_range_whatever_the_batch() -> None:
    spec = QuantSpec(bits=8)
    quantizer = DynamicQuantizer(spec, 1, per_sample=True)
    x = torch.randn(3, 4, 5, 5) * torch.tensor([0.1, 1.0, 30.0]).view(-1, 1, 1, 1)
    for sample, alone in zip(quantizer.simulated(x), x, strict=True):
        assert torch.equal(sample, quantizer.simulated(alone[None])[0])
        assert torch.equal(sample, fake_quantize(alone, *scale_from_range(alone.min(), alone.max(), spec), spec))


def test_constant_zero_and_empty_inputs() -> None:
    quantizer = DynamicQuantizer(QuantSpec(bits=8), -1, per_sample=False)
    assert not quantizer.simulated(torch.zeros(2, 3)).any()
    assert quantizer.simulated(torch.zeros(0, 3)).shape == (0, 3)


def test_what_is_not_finite_stays_visible() -> None:
    x = torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    quantized = DynamicQuantizer(QuantSpec(bits=8), -1, per_sample=False).simulated(x)
    assert torch.isnan(quantized[0]).any() and torch.isfinite(quantized[1]).all()


def test_gradients_pass_through() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    DynamicQuantizer(QuantSpec(bits=8), -1, per_sample=False)(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


def dynamic_layer(layer: nn.Module, **options: object) -> QuantizedLayer:
    spec = LayerSpec.model_validate({"weight": WEIGHT, "input": {"bits": 8}, **options})
    make_quantizable(layer, spec, StepClock((900.0, 100.0)))
    assert isinstance(layer, QuantizedLayer)
    return layer


def test_a_dynamic_input_has_nothing_to_calibrate() -> None:
    layer = dynamic_layer(nn.Linear(6, 4), input_scale="dynamic-row")
    model = nn.ModuleList([layer])
    assert [name for name, _ in quantizers(model)] == ["0.weight_quantizer"]
    assert not activation_quantizers(model) and list(dynamic_quantizers(model)) == ["0.input_quantizer"]
    with pytest.raises(SpecError, match="weight_quantizer: not calibrated"):
        enable(model)
    assert layer.weight_quantizer is not None
    layer.weight_quantizer.set_ranges(torch.full((4, 1), -1.0), torch.full((4, 1), 1.0))
    x = torch.randn(3, 6)
    before = layer(x)
    with switched(model, True):
        assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), before)
    assert layer.present_spec == layer.layer_spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": (2, 4)}, "splits: needs calibrated scales"),
        ({"shift": True}, "shift: needs"),
        ({"shared_zero_point": True}, "shared_zero_point: needs"),
        ({"guidance_sets": True}, "guidance_sets: needs"),
        ({"sets": 2}, "sets: 2; a scale of each call has no parameter sets"),
    ],
)
def test_what_needs_calibrated_scales_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        dynamic_layer(nn.Linear(6, 4), input_scale="dynamic-sample", **options)


@pytest.mark.parametrize(
    ("layer", "rows"),
    [
        (nn.Conv2d(4, 4, 1), True),
        (nn.Conv2d(4, 4, 3), False),
        (nn.Conv2d(4, 4, 1, padding=1), False),
        (nn.Conv2d(4, 4, 1, stride=2), False),
        (nn.Conv2d(4, 4, 1, padding="valid"), True),
        (nn.Conv2d(4, 4, 1, padding="same"), False),
        (nn.Conv3d(4, 4, 1), True),
    ],
)
def test_rows_are_of_layers_that_read_one_place(layer: nn.Module, rows: bool) -> None:
    if rows:
        dynamic_layer(layer, input_scale="dynamic-row")
    else:
        with pytest.raises(SpecError, match="use dynamic-sample"):
            dynamic_layer(layer, input_scale="dynamic-row")
