"""Layers of the int8 engine in floating point, on a machine whose kernels add products of two 8-bit operands in 16 bits."""

import copy

import pytest
import torch
from torch import Tensor

import diffquant as dq
import pipelines
from diffquant.core.layers import QuantizedConv2d, QuantizedLinear
from diffquant.core.model import quantized_layers
from diffquant.core.spec import LayerRule
from diffquant.engines.base import engine_of
from diffquant.engines.exactness import Answer
from diffquant.engines.int8 import engine as int8
from diffquant.engines.int8.float_layers import FloatLinear, faster_in_float
from diffquant.engines.int8.integer_layers import INTEGER, products_of
from layer_cases import CASES, TIMESTEPS, assert_equal_but_for_edges, make_layers, sample, spec

SATURATES = (64, 128, 128, 128, 128, 128, 128)
REASON = "2 products of integers would take longer here than one in floating point"
WIDE = {name: CASES[name] for name in ("linear w8s a8u", "linear w8s a8s", "linear w8u a8u", "linear without bias w8s a8u")}
WIDE["linear with sets"] = ("linear", spec(8, 8, sets=3))
WIDE["linear with splits"] = ("linear", spec(8, 8, splits=(6, 10), sets=3))
WIDE["linear smooth"] = ("linear", spec(8, 8, smooth=True))


@pytest.fixture(autouse=True)
def saturating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "answer_of", lambda kernel: Answer(kernel, SATURATES, 2.0, ""))


@torch.no_grad()
def test_they_compute_what_the_simulation_does() -> None:
    model = make_layers(list(WIDE.values()), TIMESTEPS)
    x, state = sample(3, seed=1), copy.deepcopy(model.state_dict())
    for timestep in (900, 500, torch.tensor([100, 900, 500])):
        dq.use_engine(model, "simulate")
        expected = model(x, torch.as_tensor(timestep))
        rows = dq.use_engine(model, "int8")
        assert {row.reason for row in rows} == {REASON} and engine_of(model) == "int8"
        assert all(isinstance(layer, FloatLinear) for layer in model.layers)
        outputs = model(x, torch.as_tensor(timestep))
        assert dq.use_engine(model, "int8")[0].reason == REASON  # a second time
        for layer, ours, theirs in zip(model.layers, outputs, expected, strict=True):
            assert_equal_but_for_edges(layer, x.flatten(2).transpose(1, 2), theirs, ours)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    dq.use_engine(model, "simulate")
    assert {type(layer) for layer in model.layers} == {QuantizedLinear}
    assert not any(hasattr(layer, "product") for layer in model.layers)


def test_which_layers() -> None:
    rules = [LayerRule(match="@all", weight_bits=4), LayerRule(match="@embedding", weight_bits=8)]
    model = pipelines.freeze_by_hand(pipelines.unet(), rules=rules)
    rows = dict(dq.use_engine(model, "int8"))
    wide = {name for name, layer in quantized_layers(model) if layer.weight_quantizer.spec.bits == 8}  # type: ignore[union-attr]
    assert wide and {name for name, reason in rows.items() if reason} == wide
    assert all(isinstance(layer, INTEGER) is (name not in wide) for name, layer in quantized_layers(model))


@pytest.mark.parametrize(
    ("layer", "products", "largest", "expected"),
    [
        (QuantizedLinear(8, 8), 1, 64, False),
        (QuantizedLinear(8, 8), 2, 64, True),
        (QuantizedLinear(4096, 4096), 2, 64, True),
        (QuantizedLinear(8, 8), 2, 128, False),
        (QuantizedLinear(8, 8), 2, 127, False),
        (QuantizedConv2d(8, 8, 3), 2, 64, False),
        (QuantizedConv2d(8, 8, 1), 2, 64, False),
    ],
)
def test_the_table(layer: QuantizedLinear | QuantizedConv2d, products: int, largest: int, expected: bool) -> None:
    assert faster_in_float(layer, products, largest) is expected


def test_products_are_counted_over_splits_and_zero_points() -> None:
    for name, count in (
        ("linear w4s a4s", 1),
        ("linear splits", 1),
        ("linear w8s a8u", 2),
        ("conv w8u a8u", 2),
    ):
        (layer,) = make_layers([CASES[name]]).layers
        assert products_of(layer.weight_quantizer, 64) == count, name


def test_gradients_and_observers_are_those_of_the_simulation() -> None:
    model = make_layers([WIDE["linear w8s a8u"]])
    layer, x = model.layers[0], torch.randn(2, 16, requires_grad=True)
    simulated = layer(x)
    dq.use_engine(model, "int8")
    assert torch.equal(layer(x), simulated)
    seen: list[Tensor] = []
    layer.input_quantizer.observer = seen.append
    with torch.no_grad():
        layer(x)
    assert torch.equal(seen[0], x)
