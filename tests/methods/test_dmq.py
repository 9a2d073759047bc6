"""DMQ against what can be computed by hand: scale invariance, weights of timesteps, votes, and the integer form of a shift."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from diffquant.calibration import fit
from diffquant.calibration.replay import UnitInputs
from diffquant.core.affine import fake_quantize, scale_from_range
from diffquant.core.clock import StepClock
from diffquant.core.layers import make_quantizable
from diffquant.core.quantizer import Quantizer
from diffquant.core.spec import LayerSpec, QuantSpec
from diffquant.errors import SpecError
from diffquant.host.structure import Unit
from diffquant.methods.dmq import LearnEquivalentScaling, PowerOfTwoScaling, TimestepWeights
from diffquant.methods.ranges import search_range
from diffquant.methods.scaling import Live, live_output, sample_errors, searched_shrink

W4 = QuantSpec(bits=4, symmetric=True, granularity="channel")
A6 = QuantSpec(bits=6)
STEPS = tuple(float(1000 - 50 * i) for i in range(20))


def layer(kind: str, splits: tuple[int, ...] = (), shift: bool = False, sets: int = 1, weight: QuantSpec | None = W4) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = nn.Linear(6, 5) if kind == "linear" else nn.Conv2d(6, 5, 3, padding=1)
    spec = LayerSpec(weight=weight, input=A6, splits=splits, smooth=True, shift=shift, sets=sets)
    make_quantizable(made, spec, StepClock(STEPS))
    return made.requires_grad_(False)


def inputs(kind: str, count: int = 8) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 6) if kind == "linear" else torch.randn(count, 6, 4, 4)


def exact(kind: str, module: nn.Module, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The output in floating point, of the layer's weight or another."""
    weight = module.weight if weight is None else weight
    return functional.linear(x, weight, module.bias) if kind == "linear" else module._conv_forward(x, weight, module.bias)


@pytest.mark.parametrize("splits", [(), (4, 2)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_only_the_direction_of_the_vector_matters(kind, splits):
    module, x = layer(kind, splits), inputs(kind)
    target = exact(kind, module, x)
    smooth = torch.rand(6).add(0.5).requires_grad_(True)

    def loss(smooth: torch.Tensor) -> torch.Tensor:
        return sample_errors(live_output(module, smooth, x), target, module).mean()

    assert torch.equal(loss(smooth), loss(2 * smooth))  # powers of two scale exactly
    loss(smooth).backward()
    moved = smooth * smooth.grad
    assert moved.sum().abs() < 1e-4 * moved.abs().sum()  # Euler: the gradient of a function of the direction is orthogonal


def test_ones_are_plain_minmax_quantization():
    module, x = layer("linear"), inputs("linear")
    scale, zero_point = scale_from_range(x.min(), x.max(), A6)
    rows = scale_from_range(module.weight.amin(1), module.weight.amax(1), W4)[0][:, None]
    expected = functional.linear(
        fake_quantize(x, scale, zero_point, A6), fake_quantize(module.weight, rows, torch.zeros(1), W4), module.bias
    )
    assert torch.equal(live_output(module, torch.ones(6), x), expected)


@pytest.mark.parametrize("splits", [(), (4, 2)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_errors_and_losses_are_of_the_live_output(kind, splits):
    """The error is found batch by batch; the loss is that of a batch, here of all samples."""
    module, x = layer(kind, splits), inputs(kind)
    target = exact(kind, module, x)
    data = UnitInputs([x], {}, [target], torch.zeros(len(x), dtype=torch.long))
    for batch_size in (3, 8):
        module.smooth = torch.ones(6)
        step = LearnEquivalentScaling(iterations=1, batch_size=batch_size)
        with fit.run(show=False) as run:
            fitted = step._fit_layer(StepClock(), Unit("x", module, (("x", module),)), data, 0, run)
        found = torch.cat([live_output(module, torch.ones(6), batch) for batch in x.split(batch_size)])
        assert abs(fitted.error_before - float((found - target).norm() / target.norm())) < 1e-5
    assert fitted.loss == pytest.approx([float(sample_errors(found, target, module).mean())], rel=1e-5)


@pytest.mark.parametrize("splits", [(), (4, 2)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_shrunk_ranges(kind, splits):
    """Extremes times the factors; the factors are the search's own on a batch that is everything."""
    module, x = layer(kind, splits), inputs(kind, 64)
    x[0] *= 6  # a range of extremes has hardly a code for the rest
    low, high = searched_shrink(module, x, 64)
    sizes = splits or (6,)
    for part, ends in zip(x.split(sizes, dim=1), zip(low, high, strict=True), strict=True):
        row = part.reshape(1, -1)
        searched = search_range(row, A6, (row.amin(dim=1), row.amax(dim=1)))
        assert 0 < float(ends[0]) <= 1 and 0 < float(ends[1]) <= 1
        torch.testing.assert_close(torch.cat(searched), torch.stack([row.amin() * ends[0], row.amax() * ends[1]]))
    assert min(float(low.min()), float(high.min())) < 0.99
    halved = Live(shrink=(0.5 * torch.ones(len(sizes)), 0.5 * torch.ones(len(sizes))))
    found = live_output(module, torch.ones(6), x, halved)
    clipped = [fake_quantize(part, *scale_from_range(part.amin() / 2, part.amax() / 2, A6), A6) for part in x.split(sizes, dim=1)]
    rounded = []
    for part in module.weight.split(sizes, dim=1):
        scale, zero_point = scale_from_range(part.flatten(1).amin(1), part.flatten(1).amax(1), W4)
        shape = (-1, *[1] * (part.dim() - 1))
        rounded.append(fake_quantize(part, scale.view(shape), zero_point.view(shape), W4))
    torch.testing.assert_close(found, exact(kind, module, torch.cat(clipped, dim=1), torch.cat(rounded, dim=1)))


def test_one_channel_far_larger_than_the_rest(monkeypatch):
    """64 channels, one of them 30 times the others: the specification's synthetic layer."""
    torch.manual_seed(0)
    module = nn.Linear(64, 64, bias=False)
    nn.init.normal_(module.weight)
    make_quantizable(module, LayerSpec(weight=W4, input=A6, smooth=True), StepClock())
    x = torch.randn(256, 64)
    x[:, 7] *= 30
    module.requires_grad_(False)
    monkeypatch.setattr("diffquant.methods.dmq.LR", 2e-2)
    step = LearnEquivalentScaling(iterations=400)
    data = UnitInputs([x], {}, [functional.linear(x, module.weight)], torch.zeros(256, dtype=torch.long))
    with fit.run(show=False) as run:
        fitted = step._fit_layer(StepClock(), Unit("x", module, (("x", module),)), data, 0, run)
    assert (fitted.error_before / fitted.error_after) ** 2 > 5, fitted  # the specification: 5 to 14; measured: 8.6
    assert module.smooth.argmax() == 7 and not module.smooth.requires_grad


def test_equal_losses_weigh_equally():
    found = TimestepWeights(StepClock(STEPS))(torch.full((20,), 3.0), torch.arange(20))
    assert torch.allclose(found, torch.tensor(0.3585), atol=1e-4)


def test_half_of_the_timesteps_three_times_as_wrong():
    found = TimestepWeights(StepClock(STEPS))(torch.tensor([1.0] * 10 + [3.0] * 10), torch.arange(20))
    assert torch.allclose(found[[0, 19]], torch.tensor([0.6027, 0.2103]), atol=1e-4)


def test_running_losses():
    """A mean over the samples that a bin has in the batch; 0.05 of it, and 0.95 of what was; bins without samples stay."""
    weights = TimestepWeights(StepClock(STEPS))
    weights(torch.tensor([4.0, 8.0, 2.0]), torch.tensor([3, 3, 5]))
    assert weights.losses[[3, 5, 0]].tolist() == pytest.approx([0.3, 0.1, 0.0])
    weights(torch.tensor([1.0]), torch.tensor([5]))
    assert weights.losses[[3, 5, 0]].tolist() == pytest.approx([0.3, 0.145, 0.0])


# ---- power-of-two scaling


def calibrated(module: nn.Module, x: torch.Tensor) -> Quantizer:
    quantizer = module.input_quantizer
    scale, zero_point = scale_from_range(x.min(), x.max(), quantizer.spec)
    quantizer.scale.fill_(scale)
    quantizer.zero_point.fill_(zero_point)
    return quantizer


def spread_out(count: int = 64) -> torch.Tensor:
    """Gaussian channels of standard deviations 10 to 0.3."""
    return torch.randn(count, 6, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [10, 5, 2.5, 1.2, 0.6, 0.3]
    ).view(6, 1, 1)


def chosen(step: PowerOfTwoScaling, x: torch.Tensor, sets: int = 1) -> nn.Module:
    module = layer("conv", shift=True, sets=sets)
    module.input_quantizer.spec = QuantSpec(bits=8)
    calibrated(module, x)
    step._choose(module, UnitInputs([x], {}, [], torch.arange(len(x)) % 20))
    return module


def test_exponents_by_hand():
    quantizer = chosen(PowerOfTwoScaling(), spread_out()).input_quantizer
    assert quantizer.shift.tolist() == [[3, 2, 1, 0, 0, 0]]
    x = spread_out()
    scale, _ = scale_from_range(x.min(), x.max(), quantizer.spec)
    assert torch.equal(quantizer.scale * 8, scale.view(1, 1))


def test_no_agreement_changes_nothing(monkeypatch):
    monkeypatch.setattr("diffquant.methods.dmq.AGREEMENT", 1.01)
    x = spread_out()
    module, plain = chosen(PowerOfTwoScaling(), x), layer("conv", shift=True)
    plain.input_quantizer.spec = QuantSpec(bits=8)
    calibrated(plain, x)
    assert (module.input_quantizer.shift == 3).all()
    for each in (module, plain):
        each.input_quantizer.enabled = True
    assert torch.equal(module.input_quantizer(x), plain.input_quantizer(x))


def test_votes_and_ties():
    errors, step = torch.ones(32, 1, 4), PowerOfTwoScaling()
    assert step.decide(errors)[0].tolist() == [3]  # all alike: the coarsest
    errors[:27, 0, 1] = 0.5
    exponents, agreement = step.decide(errors)
    assert exponents.tolist() == [3] and agreement.tolist() == [27 / 32]  # less than 0.85
    errors[27, 0, 1] = 0.5
    exponents, agreement = step.decide(errors)
    assert exponents.tolist() == [1] and agreement.tolist() == [28 / 32]
    errors[31, 0, 1] = 99.0  # one sample clipped hard has one vote
    assert step.decide(errors)[0].tolist() == [1]


def test_sets_vote_for_themselves():
    x = spread_out(80)
    x[torch.arange(80) % 20 < 10, 5] *= 30  # the last channel is small in the second half of the timesteps only
    own = chosen(PowerOfTwoScaling(), x, sets=20).input_quantizer
    assert own.shift.shape == (20, 6) and set(own.shift[:10, 5].tolist()) == {3} and set(own.shift[10:, 5].tolist()) == {0}


@pytest.mark.parametrize(
    ("bits", "symmetric", "fits"), [(4, True, True), (4, False, True), (5, True, True), (5, False, False), (8, True, False)]
)
def test_shifted_weights_must_fit_8_bits(bits, symmetric, fits):
    module = layer("conv", shift=True, weight=QuantSpec(bits=bits, symmetric=symmetric, granularity="channel"))
    reason = PowerOfTwoScaling()._refusal(module)
    assert reason == ("" if fits else f"a weight of {bits} bits shifted by 3 does not fit 8 bits")


def test_factors_are_not_chosen_twice():
    module = chosen(PowerOfTwoScaling(), spread_out())
    with pytest.raises(SpecError, match="has factors already; calibrate its ranges again first"):
        PowerOfTwoScaling()._choose(module, UnitInputs([spread_out()], {}, [], torch.zeros(64, dtype=torch.long)))


def test_integer_form_of_a_shift():
    """sum over channels of code * (weight code << shift), in integers, is the fake-quantized layer."""
    module, x = layer("linear", shift=True), inputs("linear")
    quantizer = calibrated(module, x)
    quantizer.scale /= 8
    quantizer.shift.copy_(torch.tensor([[0, 1, 2, 3, 0, 2]]))
    module.weight_quantizer.scale.copy_(module.weight.abs().amax(1, keepdim=True) / 7)
    module.weight_quantizer.enabled = quantizer.enabled = True
    codes, weights = quantizer.quantize(x).long(), module.weight_quantizer.quantize(module.weight).long()
    shifted = weights << quantizer.shift.long()
    assert shifted.abs().max() <= 64  # fits int8
    accumulated = codes @ shifted.T - quantizer.zero_point.long() * shifted.sum(dim=1)
    expected = accumulated * quantizer.scale.double() * module.weight_quantizer.scale.double().T + module.bias
    assert torch.allclose(module(x).double(), expected, rtol=1e-6, atol=1e-6)
