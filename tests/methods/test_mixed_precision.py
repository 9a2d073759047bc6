"""Bits by sensitivity: the estimate against finite differences, the choice by hand, and bits through passes and checkpoint."""

import copy

import pytest
import torch
from torch import nn

import diffquant as dq
from diffquant.calibration import fit
from diffquant.calibration.record import record
from diffquant.calibration.rollout import Rollout
from diffquant.core.clock import StepClock
from diffquant.core.model import full_precision, quantized_layers
from diffquant.core.quantizer import Quantizer
from diffquant.core.spec import LayerRule, QuantSpec
from diffquant.host.conditions import Calibration
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan
from diffquant.methods.base import evaluating
from diffquant.methods.mixed_precision import AllocateBits, AllocateWeightBits, dealt, multiplications
from diffquant.methods.ranges import CalibrateRanges
from diffquant.methods.sensitivity import changes_along, gated
from diffquant.recipe import load_recipe
from tests import pipelines

QUICK = ["passes.0.samples=8", "passes.0.candidates=8", "passes.2.samples=8", "passes.2.candidates=8", "passes.1.samples=8"]
QUICK += ["passes.3.iterations=2", "passes.3.samples=8", "passes.4.iterations=2", "passes.4.cosines=false"]


@pytest.fixture(scope="module")
def pipe():
    return pipelines.micro()


@pytest.fixture(scope="module")
def data(pipe):
    return record(pipe, Calibration(samples=4, steps=4, batch_size=4), progress=False)


def calibrated(pipe, data):
    model = copy.deepcopy(pipe.unet)
    prepare(model, plan(model, (LayerRule(match="@all", weight_bits=3, input_bits=3),)), data.timesteps)
    with fit.run(show=False) as run:
        CalibrateRanges(samples=8, batch_size=4, activations="minmax").apply(model, data, torch.Generator(), run)
    return model


@pytest.mark.parametrize("operand", ["input_quantizer", "weight_quantizer"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_a_small_part_of_the_error_does_to_the_output(pipe, data, checkpointing, operand, monkeypatch):
    """Of 400 directions its relative standard deviation is sqrt(2 / 400) = 0.07; five of them are allowed."""
    monkeypatch.setattr("diffquant.methods.sensitivity.DIRECTIONS", 400)
    model = calibrated(pipe, data)
    layers = dict(quantized_layers(model))
    present = {name: getattr(layer, operand) for name, layer in layers.items()}
    options = AllocateBits(samples=4, batch_size=4, checkpointing=checkpointing)
    with fit.run(show=False) as run:
        squares = options.squares(model, present, data, torch.Generator().manual_seed(0), run)
    picked = data.subset(4, torch.Generator().manual_seed(0))
    arguments, _ = data.batch(picked)
    model.double()
    arguments = {key: value.double() if value.is_floating_point() else value for key, value in arguments.items()}
    with evaluating(model), full_precision(model), torch.no_grad(), gated(present) as gates:
        plain = model(**arguments).sample
        largest = max(squares.values())
        for name, gate in gates.items():
            gate.data.fill_(1e-4)
            moved = float(((model(**arguments).sample - plain) / 1e-4).square().sum())
            gate.data.zero_()
            assert squares[name] == pytest.approx(moved, rel=0.35, abs=1e-6 * largest), name


@pytest.mark.parametrize("operand", ["input_quantizer", "weight_quantizer"])
def test_the_change_of_the_last_sample_is_that_of_a_small_part_of_the_error(pipe, data, operand):
    model = calibrated(pipe, data)
    present = {name: getattr(layer, operand) for name, layer in quantized_layers(model)}
    rollout = Rollout(model, data)
    chain = rollout.chain(torch.tensor([2]), range(rollout.steps))
    direction = torch.randn(chain.recorded(0).shape, generator=torch.Generator().manual_seed(0))
    with evaluating(model), full_precision(model), gated(present) as gates:
        changes = dict(zip(gates, changes_along(direction, chain, gates).sum(dim=1).tolist(), strict=True))
        largest = max(map(abs, changes.values()))
        for name, gate in gates.items():
            ends = []
            for small in (1e-4, -1e-4):  # an error jumps where its operand moves past the edge of a code
                gate.data.fill_(small)
                ends.append(float((chain.run()[0][-1].double() * direction).sum()))
            gate.data.zero_()
            assert changes[name] == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=0.05, abs=0.02 * largest), name
        assert largest > 0


def test_shares_of_the_last_sample_and_their_resumption(pipe, data, tmp_path, monkeypatch):
    """They sum to 1; a run that was killed after two of three trajectories computes the third alone, and ends equal."""
    model = calibrated(pipe, data)
    present = {name: layer.weight_quantizer for name, layer in quantized_layers(model)}
    calls = []

    def counted(*arguments):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(arguments)
        return changes_along(*arguments)

    def squares(folder):
        with fit.run(folder, show=False) as run:
            options = AllocateWeightBits(of="sample", trajectories=3)
            return options.squares(model, present, data, torch.Generator().manual_seed(0), run)

    monkeypatch.setattr("diffquant.methods.sensitivity.changes_along", counted)
    whole = squares(None)
    assert len(calls) == 3 and sum(whole.values()) == pytest.approx(1.0) and min(whole.values()) > 0
    with pytest.raises(KeyboardInterrupt):
        squares(tmp_path)
    calls.clear()
    assert squares(tmp_path) == whole and len(calls) == 1


def test_multiplications(pipe, data):
    model = calibrated(pipe, data)
    layers = dict(quantized_layers(model))
    products = multiplications(model, layers, data)
    assert products["conv_in"] == layers["conv_in"].weight.numel() * pipe.unet.config.sample_size**2
    assert min(products.values()) > 0 and not any(layer._forward_hooks for layer in layers.values())


def test_layers_are_chosen_by_the_error_taken_away_for_each_multiplication():
    bits = {"a": 6, "b": 6, "c": 6, "full": 8, "d": 4}
    squares = {"a": 1.0, "b": 0.5, "c": 0.2, "full": 9.0, "d": 0.0}
    products = {"a": 10, "b": 1, "c": 100, "full": 1, "d": 1}  # 113
    assert AllocateBits(products=0.0)._chosen(bits, squares, products) == set()
    assert AllocateBits(products=0.01)._chosen(bits, squares, products) == {"b"}
    assert AllocateBits(products=0.095)._chosen(bits, squares, products) == {"b"}  # a fits alone, but not beside b
    assert AllocateBits(products=0.1)._chosen(bits, squares, products) == {"a", "b"}
    assert AllocateBits(products=1.0)._chosen(bits, squares, products) == {"a", "b", "c"}
    assert AllocateBits(products=1.0, bits=5)._chosen(bits, squares, products) == set()


def test_bits_of_weights_are_dealt_by_the_error_taken_away_for_each_weight():
    """From 2 bits each: b has most to gain for each weight, then a, then b again; c has nothing to gain."""
    errors = {"a": {2: 40.0, 3: 10.0, 4: 3.0}, "b": {2: 16.0, 3: 4.0, 4: 1.0}, "c": {2: 0.0, 3: 0.0, 4: 0.0}}
    sizes = {"a": 10, "b": 2, "c": 5}  # 34 bits at 2 bits each; gains of a 3.0 and 0.7, of b 6.0 and 1.5
    expected = {34: (2, 2), 35: (2, 2), 36: (2, 3), 46: (3, 3), 48: (3, 4), 57: (3, 4), 58: (4, 4), 99: (4, 4)}
    for total, (a, b) in expected.items():
        assert dealt(errors, sizes, total, 2, 4) == {"a": a, "b": b, "c": 2}, total
    assert dealt(errors, sizes, 44, 2, 4) == {"a": 2, "b": 4, "c": 2}  # a has more to gain than b's second bit but does not fit
    assert dealt(errors, sizes, 20, 2, 4) == {"a": 2, "b": 2, "c": 2}


def test_bits_of_weights_are_kept_and_the_file_does_not_grow(pipe, data, tmp_path):
    """The loaded model has the weights' bits that were chosen, and its weights have no more bits than one width for all."""
    recipe = load_recipe("mixed-w4a8", [each for each in QUICK if "passes.1." not in each])
    passes = [{"pass": "AllocateWeightBits", "samples": 8} if step["pass"] == "AllocateBits" else step for step in recipe.passes]
    recipe = recipe.model_copy(update={"passes": tuple(passes)})
    one, two = copy.deepcopy(pipe), copy.deepcopy(pipe)
    sizes = {name: layer.weight.numel() for name, layer in pipe.unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    report = dq.quantize(one, recipe, data, folder=tmp_path / "work", progress=False)
    rows = {row["layer"]: row for row in report.passes[1]["figures"]["layers"]}
    bits = {name: layer.weight_quantizer.spec.bits for name, layer in quantized_layers(one.unet)}
    assert bits == {name: row["bits"] for name, row in rows.items()} and len(set(bits.values())) > 2
    before = sum(row["bits_before"] * sizes[name] for name, row in rows.items())
    after = sum(row["bits"] * sizes[name] for name, row in rows.items())
    assert 0.97 * before < after <= before
    dq.quantize(two, recipe, data, folder=tmp_path / "work", progress=False)
    assert bits == {name: layer.weight_quantizer.spec.bits for name, layer in quantized_layers(two.unet)}
    dq.save(one, tmp_path / "out")
    loaded = dq.load(tmp_path / "out", engine="simulate").unet
    assert bits == {name: layer.weight_quantizer.spec.bits for name, layer in quantized_layers(loaded)}
    arguments, _ = data.batch(torch.arange(4))
    with torch.no_grad():
        assert torch.equal(loaded(**arguments).sample, one.unet(**arguments).sample)


def test_least_above_most_is_refused():
    with pytest.raises(ValueError, match=r"least \(6\) is above most \(4\)"):
        AllocateWeightBits(least=6, most=4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_more_bits_cover_the_same_range(symmetric):
    quantizer = Quantizer(QuantSpec(bits=4, symmetric=symmetric), rows=2, clock=StepClock((1.0, 0.0)))
    low, high = torch.tensor([[-1.0], [-0.25]]), torch.tensor([[2.0], [0.5]])
    quantizer.set_ranges(low, high)
    spec, scale, zero_point = quantizer.spec, quantizer.scale.clone(), quantizer.zero_point.clone()
    quantizer.set_bits(8)
    for end, then in ((quantizer.spec.code_min, spec.code_min), (quantizer.spec.code_max, spec.code_max)):
        reached, wanted = (end - quantizer.zero_point) * quantizer.scale, (then - zero_point) * scale
        assert ((reached - wanted).abs() <= 1.001 * scale).all()
    assert quantizer.spec.bits == 8 and (quantizer.scale < scale / 8).all()


def test_bits_are_kept_by_finished_passes_and_in_the_checkpoint(pipe, data, tmp_path):
    """The report's rows, a run that goes on after a kill, and the loaded model have the bits that were chosen."""
    recipe = load_recipe("mixed-w4a4", QUICK)
    one, two = copy.deepcopy(pipe), copy.deepcopy(pipe)
    report = dq.quantize(one, recipe, data, folder=tmp_path / "work", progress=False)
    figures = report.passes[1]["figures"]
    assert 0 < figures["products"] <= 0.1 and 4 < figures["mean_bits"] < 8
    raised = {row["layer"] for row in figures["layers"] if row["bits"] > row["bits_before"]}
    assert raised
    bits = {name: None if it.input_quantizer is None else it.input_quantizer.spec.bits for name, it in quantized_layers(one.unet)}
    assert bits["conv_in"] is None and {name for name, count in bits.items() if count == 8} >= raised and 4 in bits.values()
    rows = {row["name"]: row["spec"] for row in report.layers}
    assert all(rows[name]["input"]["bits"] == 8 for name in raised)
    dq.quantize(two, recipe, data, folder=tmp_path / "work", progress=False)
    for (_, ours), (_, theirs) in zip(quantized_layers(one.unet), quantized_layers(two.unet), strict=True):
        assert (ours.input_quantizer and ours.input_quantizer.spec) == (theirs.input_quantizer and theirs.input_quantizer.spec)
    dq.save(one, tmp_path / "out")
    loaded = dq.load(tmp_path / "out", engine="simulate").unet
    assert bits == {
        name: None if layer.input_quantizer is None else layer.input_quantizer.spec.bits for name, layer in quantized_layers(loaded)
    }
    arguments, _ = data.batch(torch.arange(4))
    with torch.no_grad():
        assert torch.equal(loaded(**arguments).sample, one.unet(**arguments).sample)
