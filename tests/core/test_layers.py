"""Quantizable layers against layers put together by hand: numpy quantizes, torch multiplies."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from diffquant.core import quantizer as quantizers_module
from diffquant.core.affine import scale_from_range
from diffquant.core.attention import AttentionProducts, attach_products
from diffquant.core.clock import StepClock
from diffquant.core.layers import QUANTIZABLE, QuantizedLayer, QuantizedLinear, make_quantizable
from diffquant.core.memory import allows
from diffquant.core.model import enable
from diffquant.core.quantizer import Quantizer
from diffquant.core.spec import AttentionSpec, LayerSpec, QuantSpec
from diffquant.errors import SpecError

INT4 = QuantSpec(bits=4, symmetric=True, granularity="channel")
UINT4 = QuantSpec(bits=4, symmetric=False, granularity="channel")
UINT8 = QuantSpec(bits=8)
W4A8 = LayerSpec(weight=INT4, input=UINT8)


def by_hand(x: Tensor, scale: Tensor | float, zero_point: Tensor | float, spec: QuantSpec) -> Tensor:
    """Fake quantization in numpy, float32; scale and zero point broadcast against `x`."""
    step, zero = np.asarray(scale, dtype=np.float32), np.asarray(zero_point, dtype=np.float32)
    code = np.clip(np.rint(x.detach().numpy() / step) + zero, spec.code_min, spec.code_max)
    return torch.from_numpy((code - zero) * step)


def weight_by_hand(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Min-max fake quantization of a weight, one scale per output channel."""
    rows = weight.detach().flatten(1)
    view = [-1, *[1] * (weight.dim() - 1)]
    scale, zero_point = scale_from_range(rows.amin(1), rows.amax(1), spec)
    return by_hand(weight, scale.view(view), zero_point.view(view), spec)


def calibrate(layer: nn.Module, input_scale: object = 0.02, input_zero_point: object = 128.0) -> None:
    """Min-max the weight as it is smoothed now; give the input these parameters; switch both on."""
    assert isinstance(layer, QuantizedLayer)
    quantizer = layer.weight_quantizer
    if quantizer is not None:
        parts = layer.weight_to_quantize().split(quantizer.splits or layer.weight.shape[1], dim=1)
        for index, part in enumerate(parts):
            rows = part.flatten(1) if quantizer.rows > 1 else part.reshape(1, -1)
            scale, zero_point = scale_from_range(rows.amin(1), rows.amax(1), quantizer.spec)
            quantizer.scale[:, index], quantizer.zero_point[:, index] = scale, zero_point
        quantizer.enabled = True
    if layer.input_quantizer is not None:
        layer.input_quantizer.scale.copy_(torch.as_tensor(input_scale))
        layer.input_quantizer.zero_point.copy_(torch.as_tensor(input_zero_point))
        layer.input_quantizer.enabled = True


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (2, 6)),
    "conv": (lambda: nn.Conv2d(6, 4, 3, padding=1), (2, 6, 5, 5)),
    "strided conv": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=(1, 0), dilation=(1, 2)), (2, 6, 8, 8)),
    "grouped conv": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "depthwise conv": (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 5, 5)),
    "conv over frames": (lambda: nn.Conv3d(6, 4, (1, 3, 3), padding=(0, 1, 1)), (2, 6, 3, 5, 5)),
    "circular conv": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (2, 6, 5, 5)),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[request.param]
    return make(), torch.randn(shape)


@pytest.mark.parametrize("weight_spec", [INT4, UINT4])
@torch.no_grad()
def test_a_layer_is_the_float_layer_on_quantized_operands(
    layer_and_input: tuple[nn.Module, Tensor], weight_spec: QuantSpec
) -> None:
    layer, x = layer_and_input
    expected = copy.deepcopy(layer)
    expected.weight.copy_(weight_by_hand(layer.weight, weight_spec))
    make_quantizable(layer, LayerSpec(weight=weight_spec, input=UINT8), StepClock())
    calibrate(layer)
    assert torch.equal(layer(x), expected(by_hand(x, 0.02, 128, UINT8)))


@torch.no_grad()
def test_off_is_bit_equal_and_the_weight_is_never_written(layer_and_input: tuple[nn.Module, Tensor]) -> None:
    layer, x = layer_and_input
    expected, weight, kind = layer(x), layer.weight.clone(), type(layer)
    make_quantizable(layer, W4A8, StepClock())
    assert torch.equal(layer(x), expected)
    calibrate(layer)
    layer(x)
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        quantizer.enabled = False
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.weight, weight)
    assert isinstance(layer, kind)


@pytest.mark.parametrize("spec", [LayerSpec(weight=INT4), LayerSpec(input=UINT8)])
@torch.no_grad()
def test_weight_only_and_input_only(spec: LayerSpec) -> None:
    layer, x = nn.Linear(6, 4), torch.randn(2, 6)
    weight = layer.weight if spec.weight is None else weight_by_hand(layer.weight, INT4)
    quantized = x if spec.input is None else by_hand(x, 0.02, 128, UINT8)
    expected = functional.linear(quantized, weight, layer.bias)
    make_quantizable(layer, spec, StepClock())
    calibrate(layer)
    assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_one_scale_for_the_whole_weight() -> None:
    spec = QuantSpec(bits=4, symmetric=True, granularity="tensor")
    layer, x = nn.Linear(6, 4), torch.randn(2, 6)
    weight = by_hand(layer.weight, float(layer.weight.abs().max() / 7), 0, spec)
    expected = functional.linear(x, weight, layer.bias)
    make_quantizable(layer, LayerSpec(weight=spec), StepClock())
    calibrate(layer)
    assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_splits_add_the_parts_of_a_concatenated_skip() -> None:
    layer, x = nn.Conv2d(6, 4, 1), torch.randn(2, 6, 3, 3)
    x[:, 4:] *= 30
    weight = torch.cat([weight_by_hand(part, INT4) for part in layer.weight.split((4, 2), dim=1)], dim=1)
    inputs = [by_hand(part, scale, 128, UINT8) for part, scale in zip(x.split((4, 2), dim=1), (0.02, 0.6), strict=True)]
    expected = functional.conv2d(torch.cat(inputs, dim=1), weight, layer.bias)
    make_quantizable(layer, LayerSpec(weight=INT4, input=UINT8, splits=(4, 2)), StepClock())
    calibrate(layer, [[0.02, 0.6]])
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", ["linear", "conv"])
@torch.no_grad()
def test_smooth_of_ones_is_identity_and_smooth_divides_inputs_and_multiplies_weights(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    plain = copy.deepcopy(layer)
    make_quantizable(layer, W4A8.model_copy(update={"smooth": True}), StepClock())
    make_quantizable(plain, W4A8, StepClock())
    calibrate(layer)
    calibrate(plain)
    assert torch.equal(layer(x), plain(x))
    assert isinstance(layer.smooth, Tensor)
    layer.smooth.copy_(torch.tensor([1.0, 2.0, 0.3, 5.0, 1.7, 0.9]))
    calibrate(layer)
    along_weight, along_x = layer.smooth.view(1, -1, *[1] * (plain.weight.dim() - 2)), layer.smooth
    along_x = along_x if name == "linear" else along_x.view(1, -1, 1, 1)
    expected = copy.deepcopy(plain)
    expected.weight.copy_(weight_by_hand(plain.weight * along_weight, INT4))
    for quantizer in (expected.weight_quantizer, expected.input_quantizer):
        quantizer.enabled = False
    assert torch.equal(layer(x), expected(by_hand(x / along_x, 0.02, 128, UINT8)))


@pytest.mark.parametrize("name", ["linear", "conv"])
@torch.no_grad()
def test_an_offset_counts_while_quantizers_are_on_and_is_the_bias_of_a_frozen_layer(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    plain = copy.deepcopy(layer)
    make_quantizable(layer, W4A8, StepClock())
    calibrate(layer)
    without = layer(x)
    layer.offset = torch.linspace(0.5, 2.0, len(layer.bias))
    beside = (-1,) if name == "linear" else (-1, 1, 1)
    given = layer(x)
    assert torch.allclose(given, without + layer.offset.view(beside), rtol=0, atol=1e-5)
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        quantizer.enabled = False
    assert torch.equal(layer(x), plain(x))
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        quantizer.enabled = True
    layer.freeze()
    assert layer.offset is None and torch.equal(layer(x), given)


@torch.no_grad()
def test_the_integer_form_of_shifts_equals_the_simulation() -> None:
    """scale_x * scale_w * sum over channels of (code_x - zero point) * (code_w << shift): exact, as scales are powers of two."""
    layer, x = nn.Linear(3, 4, bias=False), torch.randn(5, 3) * torch.tensor([0.3, 2.0, 9.0])
    make_quantizable(layer, W4A8.model_copy(update={"shift": True}), StepClock())
    calibrate(layer, 2.0**-6, 100.0)
    shift, zero_point = torch.tensor([0, 2, 4]), 100
    assert isinstance(layer, QuantizedLinear) and layer.input_quantizer is not None and layer.weight_quantizer is not None
    layer.input_quantizer.shift.copy_(shift)
    layer.weight_quantizer.scale.fill_(2.0**-4)
    code_x = layer.input_quantizer.quantize(x).long()
    code_w = layer.weight_quantizer.quantize(layer.weight).long()
    steps = [2.0 ** (int(k) - 6) for k in shift]
    assert code_x.tolist() == [
        [min(max(round(float(value) / steps[c]) + zero_point, 0), 255) for c, value in enumerate(row)] for row in x
    ]
    accumulated = (code_x - zero_point) @ (code_w << shift).T
    assert torch.equal(layer(x), accumulated.float() * 2.0**-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [W4A8, LayerSpec(input=UINT8), LayerSpec(weight=INT4)])
@torch.no_grad()
def test_a_smoothed_layer_keeps_the_dtype_of_its_input(spec: LayerSpec, dtype: torch.dtype) -> None:
    layer = nn.Linear(6, 4).to(dtype)
    make_quantizable(layer, spec.model_copy(update={"smooth": True}), StepClock())
    calibrate(layer)
    assert layer(torch.randn(2, 6).to(dtype)).dtype == dtype


# ---- freezing


@pytest.mark.parametrize("weight_spec", [INT4, UINT4])
@torch.no_grad()
def test_frozen_is_bit_equal_to_simulated(layer_and_input: tuple[nn.Module, Tensor], weight_spec: QuantSpec) -> None:
    layer, x = layer_and_input
    smooth = getattr(layer, "groups", 1) == 1
    make_quantizable(layer, LayerSpec(weight=weight_spec, input=UINT8, smooth=smooth), StepClock())
    if smooth:
        layer.smooth.copy_(torch.rand(6) + 0.5)
    calibrate(layer)
    weight, output = layer.weight_quantizer(layer.smoothed_weight()), layer(x)
    layer.freeze()
    assert layer.float_weight is None
    assert torch.equal(layer.weight_quantizer.dequantized_codes(), weight)
    assert torch.equal(layer(x), output)
    layer.freeze()  # a second time changes nothing
    assert torch.equal(layer(x), output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_freezing_is_decided_in_float32(dtype: torch.dtype) -> None:
    layer = nn.Linear(256, 64).to(dtype)
    make_quantizable(layer, LayerSpec(weight=INT4, smooth=True), StepClock())
    layer.smooth.copy_(torch.rand(256) + 0.5)
    exact = layer.weight.detach().float() * layer.smooth
    calibrate(layer)
    layer.freeze()
    assert torch.equal(layer.weight_quantizer.dequantized_codes(), weight_by_hand(exact, INT4))


@torch.no_grad()
def test_a_frozen_layer_cannot_run_with_quantizers_off() -> None:
    layer = nn.Linear(6, 4)
    make_quantizable(layer, W4A8, StepClock())
    calibrate(layer)
    layer.freeze()
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        quantizer.enabled = False
    with pytest.raises(SpecError, match=r"^frozen layer: its float weight is gone, so it cannot run with quantizers off$"):
        layer(torch.randn(2, 6))


def test_freezing_leaves_a_layer_without_weight_quantizer_alone() -> None:
    layer = nn.Linear(6, 4)
    make_quantizable(layer, LayerSpec(input=UINT8), StepClock())
    layer.freeze()
    assert isinstance(layer.weight, nn.Parameter)


# ---- refusals


class Special(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("layer", "spec", "message"),
    [
        (Special(2, 2), W4A8, "Special: only nn.Linear, nn.Conv2d, nn.Conv3d and nn.Embedding themselves can be quantized"),
        (
            nn.ConvTranspose2d(2, 2, 1),
            W4A8,
            "ConvTranspose2d: only nn.Linear, nn.Conv2d, nn.Conv3d and nn.Embedding themselves can be quantized",
        ),
        (
            nn.Conv2d(6, 4, 1),
            LayerSpec(weight=INT4, splits=(4, 3)),
            r"splits \[4, 3\]: must add up to 6 input channels of an ungrouped layer",
        ),
        (
            nn.Conv2d(6, 4, 1, groups=2),
            LayerSpec(weight=INT4, splits=(3, 3)),
            r"splits \[3, 3\]: must add up to 6 input channels of an ungrouped layer",
        ),
        (nn.Conv2d(6, 4, 1, groups=2), LayerSpec(weight=INT4, smooth=True), "smooth: not defined for a grouped convolution"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused_and_changes_nothing(layer: nn.Module, spec: LayerSpec, message: str) -> None:
    before = type(layer)
    with pytest.raises(SpecError, match=f"^{message}$"):
        make_quantizable(layer, spec, StepClock())
    assert type(layer) is before and not hasattr(layer, "weight_quantizer")


# ---- attention products


class Attention(nn.Module):
    """What an attention module of diffusers is to us: projections, a processor, one call of scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.processor, self.fails = nn.Identity(), None, None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        output = functional.scaled_dot_product_attention(query, key, value, **options)
        if self.fails is not None:
            raise self.fails
        return output


class CountOriginals(TorchFunctionMode):
    """Counts calls that reach the original scaled_dot_product_attention."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


SPEC = AttentionSpec(query=UINT8, key=UINT8, value=UINT8, softmax=UINT8)
PARAMETERS = {"query": (0.035, 128.0), "key": (0.036, 120.0), "value": (0.034, 130.0), "softmax": (1 / 255, 0.0)}


def switch(attention: nn.Module, on: bool = True) -> None:
    """Calibrate the quantizers that are there, and turn them on or off."""
    for name, (scale, zero_point) in PARAMETERS.items():
        quantizer = getattr(attention.attention_products, name)
        if quantizer is not None:
            quantizer.scale.fill_(scale)
            quantizer.zero_point.fill_(zero_point)
            quantizer.enabled = on


def attention_by_hand(operands: tuple[Tensor, Tensor, Tensor], mask: Tensor | None = None, scale: float = 0.5) -> Tensor:
    """softmax(q k^T * scale + mask) v on operands that numpy quantized."""
    query, key, value = (by_hand(x, *PARAMETERS[name], UINT8) for x, name in zip(operands, PARAMETERS, strict=False))
    scores = torch.matmul(query, key.mT) * scale
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    return torch.matmul(by_hand(weights, *PARAMETERS["softmax"], UINT8), value)


@pytest.fixture
def attention() -> nn.Module:
    module = Attention()
    attach_products(module, SPEC, StepClock())
    return module


@pytest.fixture
def operands() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)


def test_off_the_original_attention_is_called(attention: nn.Module, operands: tuple[Tensor, Tensor, Tensor]) -> None:
    switch(attention, on=False)
    with CountOriginals() as originals:
        output = attention(*operands)
    assert originals.count == 1
    assert torch.equal(output, functional.scaled_dot_product_attention(*operands))


def test_on_the_products_are_quantized(attention: nn.Module, operands: tuple[Tensor, Tensor, Tensor]) -> None:
    switch(attention)
    with CountOriginals() as originals:
        output = attention(*operands)
    assert originals.count == 0
    assert torch.equal(output, attention_by_hand(operands))
    exact = functional.scaled_dot_product_attention(*operands)
    assert (output - exact).norm() < 0.03 * exact.norm()  # 8 bits over about 8 standard deviations; measured 0.013
    switch(attention, on=False)
    assert torch.equal(attention(*operands), exact)


def test_masks_and_scale_are_those_of_the_original(attention: nn.Module, operands: tuple[Tensor, Tensor, Tensor]) -> None:
    switch(attention)
    keep = torch.rand(2, 1, 5, 7) > 0.3
    keep[..., 0] = True
    added = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    expected = attention_by_hand(operands, added)
    assert torch.equal(attention(*operands, attn_mask=keep), expected)
    assert torch.equal(attention(*operands, attn_mask=added), expected)
    assert torch.equal(attention(*operands, scale=0.25), attention_by_hand(operands, scale=0.25))


def test_an_operand_without_spec_stays_float(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    module = Attention()
    attach_products(module, AttentionSpec(softmax=UINT8), StepClock())
    switch(module)
    query, key, value = operands
    weights = torch.softmax(query @ key.mT * 0.5, dim=-1)
    assert torch.equal(module(*operands), by_hand(weights, *PARAMETERS["softmax"], UINT8) @ value)


@pytest.mark.parametrize("option", [{"dropout_p": 0.1}, {"is_causal": True}, {"enable_gqa": True}])
def test_what_is_not_quantized_is_refused(
    attention: nn.Module, operands: tuple[Tensor, Tensor, Tensor], option: dict[str, Any]
) -> None:
    switch(attention)
    with pytest.raises(SpecError, match=r"^attention products: dropout, causal masks and grouped heads are not quantized"):
        attention(*operands, **option)


def test_attention_outside_the_module_is_the_original(attention: nn.Module, operands: tuple[Tensor, Tensor, Tensor]) -> None:
    switch(attention)
    exact = functional.scaled_dot_product_attention(*operands)
    attention(*operands)
    assert torch.equal(functional.scaled_dot_product_attention(*operands), exact)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_leaves_no_interception_behind(
    attention: nn.Module, operands: tuple[Tensor, Tensor, Tensor], kind: type[BaseException]
) -> None:
    switch(attention)
    exact = functional.scaled_dot_product_attention(*operands)
    attention.fails = kind("inside")
    with pytest.raises(kind, match="inside"):
        attention(*operands)
    assert torch.equal(functional.scaled_dot_product_attention(*operands), exact)
    attention.fails = None
    assert torch.equal(attention(*operands), attention_by_hand(operands))


def test_a_deep_copy_has_its_own_products(attention: nn.Module, operands: tuple[Tensor, Tensor, Tensor]) -> None:
    switch(attention)
    twin = copy.deepcopy(attention)
    switch(attention, on=False)
    assert torch.equal(twin(*operands), attention_by_hand(operands))
    assert torch.equal(attention(*operands), functional.scaled_dot_product_attention(*operands))


def test_products_follow_the_clock() -> None:
    clock = StepClock([900, 100])
    products = AttentionProducts(AttentionSpec(value=UINT8, sets=2), clock)
    value = products.value
    assert isinstance(value, Quantizer)
    value.scale.copy_(torch.tensor([[0.05], [0.5]]))
    value.zero_point.fill_(128.0)
    value.enabled = True
    x = torch.randn(2, 1, 1, 4)  # one key: its softmax is 1, the output its value
    clock.set_timestep(torch.tensor([100, 900]))
    expected = torch.stack([by_hand(x[0], 0.5, 128, UINT8), by_hand(x[1], 0.05, 128, UINT8)])
    assert torch.equal(products(x, x, x), expected)


def test_a_frozen_weight_is_kept_until_what_it_is_made_of_changes(monkeypatch):
    layer = nn.Linear(4, 3)
    make_quantizable(layer, LayerSpec(weight=QuantSpec(bits=4, symmetric=True)), StepClock())
    layer.weight_quantizer.scale.fill_(0.1)
    layer.weight_quantizer.enabled = True
    layer.freeze()
    quantizer, names = layer.weight_quantizer, set(layer.state_dict())
    weight = quantizer.frozen_weight(torch.float32)
    assert torch.equal(weight, quantizer.dequantized_codes()) and quantizer.frozen_weight(torch.float32) is weight
    assert quantizer.frozen_weight(torch.bfloat16).dtype == torch.bfloat16
    assert set(layer.state_dict()) == names
    kept = quantizer.frozen_weight(torch.float32)
    for change in (
        lambda: quantizer.scale.mul_(2),
        lambda: quantizer.codes.neg_(),
        lambda: setattr(quantizer, "codes", quantizer.codes.clone()),
        lambda: quantizer.double(),
    ):
        change()
        after = quantizer.frozen_weight(torch.float32)
        assert after is not kept and torch.equal(after, quantizer.dequantized_codes().float())
        kept = after
    monkeypatch.setattr(quantizers_module, "allows", lambda size, device: False)
    quantizer.scale.mul_(2)
    assert quantizer.frozen_weight(torch.float32) is not quantizer.frozen_weight(torch.float32)
    monkeypatch.undo()
    copied = copy.deepcopy(layer)
    assert torch.equal(copied.weight_quantizer.frozen_weight(torch.float32), quantizer.frozen_weight(torch.float32))


def test_memory_that_is_short_keeps_nothing():
    cpu = torch.device("cpu")
    assert allows(-(1 << 60), cpu) and not allows(1 << 60, cpu)
    assert not allows(0, torch.device("meta"))


def test_a_kind_of_layer_says_what_it_computes():
    with pytest.raises(SpecError, match="Silent: has no compute; define what a layer computes"):
        type("Silent", (QuantizedLayer, torch.nn.Conv1d), {}, of=torch.nn.Conv1d)
    assert torch.nn.Conv1d not in QUANTIZABLE


@pytest.mark.parametrize("spec", [INT4, UINT4, QuantSpec(bits=4)])
@torch.no_grad()
def test_a_table_gives_its_dequantized_entries(spec: QuantSpec) -> None:
    table = nn.Embedding(5, 7, padding_idx=2)
    indices = torch.tensor([[0, 4], [2, 0]])
    expected = table(indices)
    make_quantizable(table, LayerSpec(weight=spec), StepClock())
    assert torch.equal(table(indices), expected)
    quantizer = table.weight_quantizer
    low, high = table.weight.amin(1, keepdim=True), table.weight.amax(1, keepdim=True)
    quantizer.set_ranges(low, high) if spec.granularity == "channel" else quantizer.set_ranges(
        low.amin(0)[None], high.amax(0)[None]
    )
    enable(table)
    simulated = table(indices)
    assert not torch.equal(simulated, expected)
    table.freeze()
    assert table.float_weight is None
    assert torch.equal(table(indices), simulated) and torch.equal(table(indices), table.weight[indices])
    assert table.to(torch.bfloat16)(indices).dtype == torch.bfloat16
