"""The sensitivity of every quantizer, by step: against finite differences, whole, resumed, and a model left as it was."""

import copy
import dataclasses
import json

import pytest
import torch

import diffquant as dq
from diffquant.analysis.drawing import draw_sensitivity
from diffquant.analysis.sensitivity import QuantizerSensitivity
from diffquant.calibration import fit
from diffquant.calibration.rollout import Rollout
from diffquant.core.model import full_precision, quantizers
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan
from diffquant.methods import sensitivity as method
from diffquant.methods.base import evaluating
from diffquant.methods.ranges import CalibrateRanges
from tests import pipelines

QUICK = ("passes.0.samples=8", "passes.0.candidates=8")


@pytest.fixture(scope="module")
def pipe():
    return pipelines.micro()


@pytest.fixture(scope="module")
def data(pipe):
    return dq.record(pipe, dq.Calibration(samples=4, steps=4, batch_size=4), progress=False)


def test_each_step_is_what_a_small_part_of_the_error_does_there(pipe, data):
    """Every quantizer of the plan, attention's too, on at one step and off at the others."""
    model = copy.deepcopy(pipe.unet)
    prepare(model, plan(model, dq.load_recipe("mse-w3a3").layers), data.timesteps)
    with fit.run(show=False) as run:
        CalibrateRanges(samples=8, batch_size=4, activations="minmax").apply(model, data, torch.Generator(), run)
    rollout, trajectory = Rollout(model, data), torch.tensor([2])
    chain = rollout.chain(trajectory, range(rollout.steps))
    direction = torch.randn(chain.recorded(0).shape, generator=torch.Generator().manual_seed(0))
    with evaluating(model), full_precision(model), method.gated(dict(quantizers(model))) as gates:
        changes = method.changes_along(direction, chain, gates)
        latents, states = chain.run()
        for k in (1, rollout.steps - 1):
            largest = float(changes[:, k].abs().max())
            assert largest > 0
            for row, gate in enumerate(gates.values()):
                ends = []
                for small in (1e-3, -1e-3):
                    gate.data.fill_(small)
                    reached, after = method.Chain(rollout, trajectory, range(k, k + 1), states[k]).run(latents[k])
                    gate.data.zero_()
                    ends.append(float((rollout.finish(trajectory, k + 1, reached[-1], after[-1]).double() * direction).sum()))
                assert float(changes[row, k]) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.05, abs=0.02 * largest)


def test_shares_of_all_quantizers_of_a_plan(pipe, data):
    before = copy.deepcopy(pipe.unet.state_dict())
    result = dq.sensitivity(pipe, dq.load_recipe("mse-w4a6", QUICK), data, trajectories=3, progress=False)
    assert not hasattr(pipe.unet, "diffquant")
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    assert sum(row.share for row in result.rows) == pytest.approx(1.0)
    assert list(result.timesteps) == sorted(result.timesteps, reverse=True) and len(result.timesteps) == 4
    assert all(len(row.by_step) == 4 and min(row.by_step) >= 0 for row in result.rows)
    planned = {row.name for row in plan(pipe.unet, dq.load_recipe("mse-w4a6").layers) if row.spec is not None}
    assert {row.layer for row in result.rows} == planned
    assert {row.operand for row in result.rows} == {"weight", "input", "query", "key", "value", "softmax"}
    attention = next(row.layer for row in result.rows if row.operand == "softmax")
    assert result.of_layer(attention, weight=True) is None
    assert result.of_layer(attention, weight=False) == sum(row.share for row in result.rows if row.layer == attention)
    assert result.uncertainty == pytest.approx((2 / 3) ** 0.5) and result.passes == ()


def test_a_killed_run_goes_on_and_another_recipe_starts_anew(pipe, data, tmp_path, monkeypatch):
    measured = method.changes_along
    calls = []

    def counted(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments)
        return measured(*arguments)

    def run(bits, folder):
        return dq.sensitivity(pipe, dq.load_recipe(f"mse-{bits}", QUICK), data, trajectories=2, folder=folder, progress=False)

    monkeypatch.setattr(method, "changes_along", counted)
    whole = run("w4a6", None)
    calls.pop()
    with pytest.raises(KeyboardInterrupt):
        run("w4a6", tmp_path)
    calls.clear()
    assert run("w4a6", tmp_path) == whole and len(calls) == 1
    calls.clear()
    assert run("w4a8", tmp_path) != whole and len(calls) == 2


def test_what_finished_passes_leave(pipe, data, tmp_path):
    """Their codes and ranges: as far as `quantize` got, and nothing of another seed's."""
    overrides = (*QUICK, *(f"passes.{index}.{option}" for index in (1, 2) for option in ("samples=8", "iterations=40")))
    recipe = dq.load_recipe("brecq-w3a8", overrides)
    alone = dq.sensitivity(pipe, recipe, data, trajectories=2, folder=tmp_path, progress=False)
    dq.quantize(copy.deepcopy(pipe), recipe, data, folder=tmp_path, progress=False)
    learned = dq.sensitivity(pipe, recipe, data, trajectories=2, folder=tmp_path, progress=False)
    assert (alone.passes, learned.passes) == ((), ("CalibrateRanges", "ReconstructRounding", "LearnScales"))
    assert learned.rows != alone.rows
    assert dq.sensitivity(pipe, recipe, data, trajectories=2, folder=tmp_path, seed=1, progress=False).passes == ()
    next(tmp_path.glob("pass-01-*.safetensors")).unlink()
    ranged = dq.sensitivity(pipe, recipe, data, trajectories=2, folder=tmp_path, progress=False)
    assert ranged.passes == ("CalibrateRanges",)


def test_the_error_of_a_weight_is_that_of_its_decided_codes(pipe, data):
    model = copy.deepcopy(pipe.unet)
    prepare(model, plan(model, dq.load_recipe("mse-w4a8").layers), data.timesteps)
    with fit.run(show=False) as run:
        CalibrateRanges(samples=8, candidates=8).apply(model, data, torch.Generator(), run)
    quantizer, weight = model.conv_in.weight_quantizer, model.conv_in.weight.detach()
    quantizer.decide(weight)
    quantizer.codes = (quantizer.codes - 1).clamp(min=quantizer.spec.code_min)  # not the nearest
    with method.gated({"weight": quantizer}) as gates, torch.no_grad():
        gates["weight"].fill_(1.0)
        assert torch.allclose(quantizer(weight), quantizer.dequantized_codes(), atol=1e-6)


def test_shares_counted_by_hand(pipe, data, monkeypatch):
    """Two trajectories; the first quantizer adds up over steps, the second undoes part of it, the others do nothing."""

    def known(model, result, *arguments):
        changes = torch.zeros(2, len(result), 4, dtype=torch.float64)
        changes[:, 0, :2] = torch.tensor([[2.0, 2.0], [3.0, 0.0]])
        changes[:, 1, 1:3] = torch.tensor([[-3.0, 0.0], [2.0, 2.0]])
        return changes

    monkeypatch.setattr("diffquant.analysis.sensitivity.changes_of_last_samples", known)
    result = dq.sensitivity(pipe, dq.load_recipe("mse-w4a6", QUICK), data, trajectories=2, progress=False)
    first, second, *others = result.rows
    assert [first.share, second.share] == pytest.approx([(16 / 25 + 9 / 25) / 2, (9 / 25 + 16 / 25) / 2])
    assert first.by_step == pytest.approx([(4 / 25 + 9 / 25) / 2, (4 / 25 + 0) / 2, 0, 0])
    assert not any(row.share for row in others)


def test_its_file_and_its_picture(tmp_path):
    """More quantizers than the picture has lines, and one that adds nothing."""
    rows = tuple(
        QuantizerSensitivity(f"block.{i}", "weight" if i % 2 else "input", 4, i / 780, (i / 2000, i / 1000)) for i in range(40)
    )
    result = dq.Sensitivity("mse-w4a4", ("CalibrateRanges",), 8, (900.0, 100.0), rows)
    result.write(tmp_path / "sensitivity.json")
    written = json.loads((tmp_path / "sensitivity.json").read_text())
    assert written["rows"][3] == {"layer": "block.3", "operand": "weight", "bits": 4, "share": 0.003846, "by_step": [0.0015, 0.003]}
    tall, low = (draw_sensitivity(dataclasses.replace(result, passes=(), rows=some)) for some in (rows, rows[:4]))
    assert tall.width == low.width and tall.height > low.height
