"""The formulas of affine quantization against plain Python, float32 by float32, code by code."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from diffquant.core.affine import (
    SMALLEST_SCALE,
    dequantize,
    fake_quantize,
    quantize,
    quantize_rounded,
    round_down,
    round_straight_through,
    scale_around,
    scale_from_range,
)
from diffquant.core.spec import QuantSpec
from diffquant.errors import SpecError

bits = st.integers(2, 8)
symmetries = st.booleans()
numbers = st.floats(-(2.0**100), 2.0**100, width=32)
tensors = st.lists(numbers, min_size=1, max_size=12)


def reference_parameters(values: Sequence[float], bits: int, symmetric: bool) -> tuple[np.float32, int]:
    """Scale and zero point of the range of `values`, by the textbook."""
    low, high = np.float32(min([*values, 0.0])), np.float32(max([*values, 0.0]))
    if symmetric:
        scale = np.float32(max(-low, high)) / np.float32(2 ** (bits - 1) - 1)
        return max(scale, np.float32(SMALLEST_SCALE)), 0
    scale = max(np.float32(high - low) / np.float32(2**bits - 1), np.float32(SMALLEST_SCALE))
    return scale, min(max(-round(float(low / scale)), 0), 2**bits - 1)


def reference_code(value: float, scale: np.float32, zero_point: int, bits: int, symmetric: bool) -> int:
    """One code; Python's `round` takes halves to even."""
    smallest, largest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    return min(max(round(float(np.float32(value) / scale)) + zero_point, smallest), largest)


def parameters(values: Sequence[float], spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The values as a tensor, and scale and zero point of their range."""
    x = torch.tensor(values, dtype=torch.float32)
    return x, *scale_from_range(x.min(), x.max(), spec)


@given(tensors, bits, symmetries)
@example([0.0], 4, True)  # nothing but zeros
@example([0.0, 0.0], 8, False)
@example([3.5, 3.5, 3.5], 2, True)  # constant
@example([-7.25] * 3, 3, False)
@example([1.0, 2.0, 3.0], 4, False)  # all positive
@example([0.1], 2, False)  # one element
@example([-1.0, 1.0], 2, True)
@example([1e-30, -2e-30], 8, False)  # below the smallest scale
def test_scale_zero_point_and_codes_equal_the_reference(values: list[float], bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    x, scale, zero_point = parameters(values, spec)
    expected_scale, expected_zero_point = reference_parameters(values, bits, symmetric)
    assert scale.dtype == zero_point.dtype == torch.float32
    assert (scale.item(), zero_point.item()) == (float(expected_scale), expected_zero_point)
    expected = [reference_code(value, expected_scale, expected_zero_point, bits, symmetric) for value in values]
    assert quantize(x, scale, zero_point, spec).tolist() == expected
    with torch.no_grad():  # a path of its own
        assert quantize(x, scale, zero_point, spec).tolist() == expected
    values_again = [np.float32(code - expected_zero_point) * expected_scale for code in expected]
    assert fake_quantize(x, scale, zero_point, spec).tolist() == [float(value) for value in values_again]


@given(tensors, tensors, bits, symmetries)
def test_values_out_of_range_take_the_outermost_code(inside: list[float], wild: list[float], bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    _, scale, zero_point = parameters(inside, spec)
    expected_scale, expected_zero_point = reference_parameters(inside, bits, symmetric)
    wild = [value for value in wild if abs(value) < 1e24]  # the quotient by SMALLEST_SCALE stays finite
    codes = quantize(torch.tensor(wild), scale, zero_point, spec)
    assert codes.tolist() == [reference_code(value, expected_scale, expected_zero_point, bits, symmetric) for value in wild]


@given(tensors, bits, symmetries)
def test_zero_is_exact_and_the_error_at_most_half_a_step(values: list[float], bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    x, scale, zero_point = parameters(values, spec)
    assert fake_quantize(torch.zeros(1), scale, zero_point, spec).item() == 0.0
    assert spec.code_min <= zero_point.item() <= spec.code_max
    error = (fake_quantize(x, scale, zero_point, spec).double() - x.double()).abs()
    # half a step, and what float32 loses in quotient and product: 2 roundings of at most 2 ** bits steps each
    assert (error <= scale.double() * (0.5 + 2**bits * 2.0**-22)).all()


@given(tensors, bits, symmetries)
def test_quantizing_twice_is_quantizing_once(values: list[float], bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    x, scale, zero_point = parameters(values, spec)
    once = fake_quantize(x, scale, zero_point, spec)
    assert torch.equal(fake_quantize(once, scale, zero_point, spec), once)


@pytest.mark.parametrize("grad", [True, False])
def test_halves_are_rounded_to_even(grad: bool) -> None:
    spec = QuantSpec(bits=4, symmetric=True)
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    with torch.set_grad_enabled(grad):
        assert quantize(x, torch.tensor(1.0), torch.tensor(0.0), spec).tolist() == [-2, -2, 0, 0, 2, 2, 4]


def test_ranges_are_taken_element_by_element() -> None:
    spec = QuantSpec(bits=4, symmetric=False)
    low, high = torch.tensor([[-1.0, 2.0], [-4.0, 0.0]]), torch.tensor([[1.0, 6.0], [-2.0, 0.0]])
    scale, zero_point = scale_from_range(low, high, spec)
    for index in np.ndindex(2, 2):
        expected = reference_parameters([low[index].item(), high[index].item()], 4, False)
        assert (scale[index].item(), zero_point[index].item()) == (float(expected[0]), expected[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_that_are_not_finite_are_refused(bad: float, symmetric: bool) -> None:
    spec = QuantSpec(bits=8, symmetric=symmetric)
    good = torch.zeros(3)
    with pytest.raises(SpecError, match=r"^range: not finite; the tensor holds inf or nan$"):
        scale_from_range(torch.tensor([0.0, bad, 0.0]), good, spec)
    with pytest.raises(SpecError, match=r"^range: not finite"):
        scale_from_range(good, torch.tensor([0.0, 0.0, bad]), spec)


def test_a_range_upside_down_is_refused() -> None:
    with pytest.raises(SpecError, match=r"^range: low is above high$"):
        scale_from_range(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]), QuantSpec(bits=8))


@pytest.mark.parametrize("wrong", [1, 9, 4.5])
def test_bits_are_two_to_eight(wrong: float) -> None:
    with pytest.raises(ValueError, match="bits"):
        QuantSpec(bits=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_ranges(bits: int) -> None:
    signed, unsigned = QuantSpec(bits=bits, symmetric=True), QuantSpec(bits=bits)
    assert (signed.code_min, signed.code_max) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (unsigned.code_min, unsigned.code_max) == (0, 2**bits - 1)


@given(tensors, bits, symmetries, st.floats(0, 1, width=32))
def test_learned_rounding_goes_from_the_floor(values: list[float], bits: int, symmetric: bool, up: float) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    x, scale, zero_point = parameters(values, spec)
    codes = quantize_rounded(x, scale, zero_point, torch.full_like(x, up), spec)
    floors = [math.floor(np.float32(value) / np.float32(scale.item())) for value in values]
    expected = [np.float32(floor) + np.float32(up) + np.float32(zero_point.item()) for floor in floors]
    assert codes.tolist() == [min(max(float(value), spec.code_min), spec.code_max) for value in expected]


def test_rounding_passes_gradients_straight_through() -> None:
    x = torch.tensor([-1.7, 0.5, 2.2], requires_grad=True)
    for function, values in ((round_straight_through, [-2.0, 0.0, 2.0]), (round_down, [-2.0, 0.0, 2.0])):
        y = function(x)
        assert y.tolist() == values
        (gradient,) = torch.autograd.grad(y, x, torch.tensor([1.0, -2.0, 3.0]))
        assert gradient.tolist() == [1.0, -2.0, 3.0]


def test_floor_is_not_rounding() -> None:
    assert round_down(torch.tensor([1.9, -1.1, 3.0])).tolist() == [1.0, -2.0, 3.0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_of_the_scale_is_that_of_lsq(symmetric: bool) -> None:
    """d x^ / d scale = (code - zero point) - x / scale where the code is free, the clamped code less zero point elsewhere."""
    spec = QuantSpec(bits=4, symmetric=symmetric)
    zero_point = torch.tensor(0.0 if symmetric else 5.0)
    for value in (-40.0, -3.3, -0.2, 0.0, 0.4, 1.1, 2.6, 40.0):
        scale = torch.tensor(0.5, requires_grad=True)
        x = torch.tensor(value, requires_grad=True)
        fake_quantize(x, scale, zero_point, spec).backward()
        free = round(value / 0.5) + zero_point.item()
        clamped = not spec.code_min <= free <= spec.code_max
        expected = min(max(free, spec.code_min), spec.code_max) - zero_point.item() - (0 if clamped else value / 0.5)
        assert scale.grad is not None and x.grad is not None
        assert scale.grad.item() == pytest.approx(expected, abs=1e-6)  # float32 sums of numbers below 10
        assert x.grad.item() == (0.0 if clamped else 1.0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("of_scale", "of_zero_point"),
    [
        ((1, 1, 1, 1), (1, 1, 1, 1)),
        ((3, 1, 1, 1), (3, 1, 1, 1)),
        ((3, 5, 1, 1), (3, 5, 1, 1)),
        ((3, 5, 1, 1), (3, 1, 1, 1)),
        ((), ()),
    ],
)
def test_gradients_are_those_of_the_steps_one_by_one(
    of_scale: tuple[int, ...], of_zero_point: tuple[int, ...], symmetric: bool
) -> None:
    """Quantizing and dequantizing at once against autograd through one after the other, whatever broadcasts; a part is clamped."""
    spec = QuantSpec(bits=3, symmetric=symmetric)
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64)
    given = (x, 0.2 + torch.rand(of_scale, dtype=torch.float64), torch.randint(0, 4, of_zero_point).double())
    towards = torch.randn_like(x)
    for asked in ((True, True, True), (True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        found = []
        for function in (fake_quantize, lambda x, s, z, spec: dequantize(quantize(x, s, z, spec), s, z)):
            leaves = [tensor.clone().requires_grad_(needed) for tensor, needed in zip(given, asked, strict=True)]
            value = function(*leaves, spec)
            gradients = torch.autograd.grad(value, [leaf for leaf in leaves if leaf.requires_grad], towards)
            found.append([value, *gradients])
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-12, atol=1e-12)


def test_dequantize_is_code_less_zero_point_times_scale() -> None:
    codes = torch.tensor([0.0, 3.0, 15.0])
    assert dequantize(codes, torch.tensor(0.25), torch.tensor(4.0)).tolist() == [-1.0, -0.25, 2.75]


def test_scale_around_a_zero_point_covers_both_sides():
    spec = QuantSpec(bits=4)
    low, high, zero_point = torch.tensor([-1.0, -3.0, 0.0]), torch.tensor([12.0, 3.0, 6.0]), torch.tensor(3.0)
    scale = scale_around(low, high, zero_point, spec)
    assert scale.tolist() == [1.0, 1.0, 0.5]  # above: 12 / 12; below: 3 / 3; above: 6 / 12
    for value in (low, high):
        assert torch.equal(fake_quantize(value, scale, zero_point, spec), value)
    assert scale_around(low, high, torch.tensor(0.0), spec).tolist() == pytest.approx([0.8, 0.2, 0.4])  # no codes below zero
