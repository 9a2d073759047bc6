"""Inputs in files are the inputs in memory, and graphs that are computed again give the gradients of those that were kept."""

from __future__ import annotations

import copy
import functools
import gc
import os
import weakref

import pytest
import torch
from torch import nn

import diffquant as dq
from chains import gradient_into_leaves
from diffquant.calibration import fit, memory, replay
from diffquant.calibration.record import record
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import conditional_half
from diffquant.calibration.rollout import Rollout
from diffquant.core.model import enable, quantizers
from diffquant.core.spec import LayerRule
from diffquant.errors import CalibrationError
from diffquant.host.conditions import Calibration
from diffquant.host.denoiser import prepare
from diffquant.host.pipeline import Host
from diffquant.host.structure import Unit, plan, units
from diffquant.methods.accuquant import AccuQuant
from diffquant.methods.base import quantizer_state
from diffquant.methods.ranges import CalibrateRanges
from diffquant.methods.reconstruction import LearnScales, ReconstructRounding
from diffquant.methods.units import _UnitCalls
from diffquant.recipe import load_recipe
from tests import pipelines

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
RANGES = CalibrateRanges(samples=8, batch_size=4, candidates=4)
PASSES = {
    "rounding": ReconstructRounding(iterations=3, samples=8, batch_size=3),
    "scales": LearnScales(iterations=3, samples=8, batch_size=3),
}


@pytest.fixture(scope="module")
def recorded():
    pipe = pipelines.micro()
    return pipe, record(pipe, Calibration(samples=4, steps=4, batch_size=4), progress=False)


@pytest.fixture
def spilled(monkeypatch):
    """Bytes of every tensor that went to a file."""
    sizes: list[int] = []
    original = memory.mapped

    def counted(*arguments):
        tensor = original(*arguments)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(memory, "mapped", counted)
    return sizes


def learned(recorded, step, budget: float, folder=None) -> dict[str, torch.Tensor]:
    pipe, data = recorded
    model = copy.deepcopy(pipe.unet)
    prepare(model, plan(model, (LayerRule(match="@all", weight_bits=4, input_bits=8, sets=4),)), data.timesteps)
    with fit.run(folder, show=False, memory=budget) as run:
        for one in (RANGES, step):
            one.apply(model, data, torch.Generator().manual_seed(0), run)
    return quantizer_state(model)


def open_files(folder) -> list[str]:
    """What the process has mapped or open below `folder`, deleted or not."""
    with open("/proc/self/maps") as maps:
        return [line for line in maps if str(folder) in line]


@pytest.mark.parametrize("name", PASSES)
def test_units_learn_the_same_from_files(name, recorded, spilled, tmp_path):
    """And with targets that were observed for all units at once, or for each."""
    kept = learned(recorded, PASSES[name], memory.BUDGET)
    assert not spilled
    found = learned(recorded, PASSES[name], 0, tmp_path)
    assert len(spilled) >= 2 * 10
    assert kept.keys() == found.keys() and all(torch.equal(kept[key], found[key]) for key in kept)
    names = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert names == {"unit.safetensors"}
    assert not open_files(tmp_path)


def test_equivalent_scaling_learns_the_same_from_files(recorded, spilled, tmp_path):
    pipe, data = recorded
    recipe = load_recipe("dmq-w4a8", pipelines.small_budget("dmq-w4a8"))
    states = []
    for gib in (2.0, 1e-9):
        model = copy.deepcopy(pipe.unet)
        dq.quantize(model, recipe, data, memory_gib=gib, progress=False)
        states.append(quantizer_state(model))
        assert bool(spilled) == (gib < 1)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_failure_leaves_no_file(recorded, spilled, tmp_path, monkeypatch):
    def failing(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffquant.methods.reconstruction.fit", failing)
    with pytest.raises(KeyboardInterrupt):
        learned(recorded, PASSES["rounding"], 0, tmp_path)
    gc.collect()  # the traceback held the tensors
    assert spilled and not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not open_files(tmp_path)


def test_the_budget_is_that_of_one_unit(recorded, spilled):
    """The largest that a unit is given, or wanted to put out, just fits into its half, or just does not."""
    pipe, data = recorded
    model = copy.deepcopy(pipe.unet)
    prepare(model, plan(model, (LayerRule(match="@all", weight_bits=4),)), data.timesteps)

    def bytes_of(tensors: list[object]) -> int:
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))

    observed = [replay.observe(model, [unit.module], data, torch.arange(8))[0] for unit in units(model)]
    sizes = [bytes_of(tensors) for calls in observed for tensors in ([*calls.arguments, *calls.keywords.values()], calls.outputs)]
    step = ReconstructRounding(iterations=1, samples=8, batch_size=8)
    learned(recorded, step, 2 * max(sizes))
    assert not spilled
    learned(recorded, step, 2 * max(sizes) - 1)
    assert sum(spilled) == sum(size for size in sizes if size == max(sizes))


def test_targets_are_observed_for_as_many_units_as_fit(recorded):
    pipe, data = recorded
    ordered = [Unit(str(i), nn.Identity(), ()) for i in range(5)]
    targets = _UnitCalls(pipe.unet, ordered, data, torch.arange(2), 1)
    targets.sizes = [3, 1, 2, 20, 2]  # bytes that a sample takes
    groups = [[unit.name for unit in targets._group(first, memory=10)] for first in ordered]
    assert groups == [["0", "1"], ["1", "2"], ["2"], ["3"], ["4"]]


def test_a_full_disk_is_said(monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CalibrationError, match=r"a unit's inputs need 0\.00 GiB there .*; free some space, or raise memory_gib"):
        memory.mapped((4, 4), torch.float32, tmp_path)
    assert not list(tmp_path.iterdir())


def test_columns_refuse_other_shapes():
    columns = memory.Columns(4)
    columns.add(2, {("argument", 0): torch.zeros(2, 3), ("argument", 1): torch.ones(1, 5), ("argument", 2): None})
    with pytest.raises(CalibrationError, match=r"argument 0: has shape \(2, 1\) after \(2, 3\); calls of different shapes"):
        columns.add(2, {("argument", 0): torch.zeros(2, 1), ("argument", 1): torch.ones(1, 5), ("argument", 2): None})


def test_one_unit_and_its_optimizer_are_held_at_a_time(recorded, monkeypatch):
    """What a unit was given and its optimizer are gone before the next unit is observed, without the garbage collector."""
    alive: list[weakref.ref] = []
    most: list[int] = []

    def watched(*arguments, **keywords):
        inputs = keywords.get("inputs", True)
        if inputs:
            most.append(sum(reference() is not None for reference in alive))
        observed = replay.observe(*arguments, **keywords)
        alive.extend(weakref.ref((calls.arguments if inputs else calls.outputs)[0]) for calls in observed)
        return observed

    class Watched(torch.optim.Adam):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.append(weakref.ref(self))

    monkeypatch.setattr("diffquant.methods.units.observe", watched)
    monkeypatch.setattr(torch.optim, "Adam", Watched)
    gc.disable()
    try:
        learned(recorded, PASSES["scales"], 0)
    finally:
        gc.enable()
    assert len(alive) == 40  # of each of 10 units, one sample's outputs among them
    assert most == [0] * 10


@functools.cache
def guided() -> tuple[nn.Module, Trajectory]:
    """A guided model whose quantizers, with a parameter set per timestep, are on; and its recording."""
    pipe = pipelines.dit()
    model = Host(pipe).denoiser.requires_grad_(False)
    data = record(pipe, Calibration(samples=2, batch_size=2, steps=3, seed=1), progress=False)
    rules = (LayerRule(match="@all", weight_bits=8, input_bits=8, sets=3), LayerRule(match="@attention", input_bits=8, sets=3))
    prepare(model, plan(model, rules), data.timesteps)
    step = CalibrateRanges(weights="minmax", activations="minmax", samples=12, batch_size=4)
    with fit.run(show=False) as run:
        step.apply(model, data, torch.Generator().manual_seed(0), run)
    enable(model)
    return model, data


def rollout(**options: bool) -> Rollout:
    """Through a copy of the guided model whose scales take gradients."""
    model, data = guided()
    model = copy.deepcopy(model).eval()
    for _, quantizer in quantizers(model):
        quantizer.scale = quantizer.scale.detach().clone().requires_grad_(True)
    return Rollout(model, data, **options)


def gradient(kind: str, **options: bool) -> torch.Tensor:
    through = rollout(**options)
    chain = through.chain(torch.tensor([0, 1]), range(3))
    gradient_into_leaves(chain, chain.recorded(len(chain.steps)), kind)
    assert not any("forward" in vars(module) for module in through.model.modules())
    last = through.data.timesteps.index(min(through.data.timesteps))
    assert through.model.diffquant.clock.interval == (last if kind == "chain" else 0)  # of the last forward pass
    leaves = [quantizer.scale for _, quantizer in quantizers(through.model)]
    return torch.cat([torch.zeros_like(leaf).flatten() if leaf.grad is None else leaf.grad.flatten() for leaf in leaves])


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", ["identity", "chain"])
def test_checkpointing_gives_the_same_gradient_bit_for_bit(kind, split):
    """`chain` goes back through three timesteps at the end: each block is computed again with the parameter set of its own."""
    kept = gradient(kind, split_guidance=split)
    assert kept.count_nonzero() > 100
    assert torch.equal(gradient(kind, split_guidance=split, checkpointing=True), kept)


@pytest.mark.parametrize("split", [False, True])
def test_halves_that_are_called_apart_take_their_own_sets(split, tmp_path):
    """Gradients reach the sets of both halves; called apart, neither looks like half of a guided call."""
    pipe = pipelines.stable_diffusion(tmp_path)
    data = record(pipe, Calibration(samples=2, steps=2, guidance_scale=3.0), progress=False)
    prepare(
        pipe.unet,
        plan(pipe.unet, (LayerRule(match="@all", weight_bits=8, input_bits=8, guidance_sets=True),)),
        data.timesteps,
        conditional_half(data),
    )
    with fit.run(show=False) as run:
        CalibrateRanges(samples=4, batch_size=2).apply(pipe.unet, data, torch.Generator().manual_seed(0), run)
    enable(pipe.unet)
    scale = pipe.unet.conv_in.input_quantizer.scale.requires_grad_(True)
    chain = Rollout(pipe.unet, data, split_guidance=split).chain(torch.tensor([0, 1]), range(1))
    chain.predict(chain.recorded(0), 0, chain.state).square().sum().backward()
    assert scale.shape == (2, 1) and scale.grad is not None and scale.grad.count_nonzero() == 2


def test_graphs_are_smaller():
    """Bytes that autograd holds when the model has been called, for one step of two guided trajectories; parameters left out."""
    held: dict[tuple[bool, bool], int] = {}
    for checkpointing, split in ((False, False), (True, False), (False, True), (True, True)):
        through = rollout(checkpointing=checkpointing, split_guidance=split)
        own = {tensor.untyped_storage().data_ptr() for tensor in (*through.model.parameters(), *through.model.buffers())}
        sizes: dict[int, int] = {}

        def keep(tensor, own=own, sizes=sizes):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        chain = through.chain(torch.tensor([0, 1]), range(1))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = chain.predict(chain.recorded(0), 0, chain.state)
        held[checkpointing, split] = sum(sizes.values())
        del output
    assert held[True, False] < 0.5 * held[False, False], held
    assert held[False, True] < 0.1 * held[False, False], held
    assert held[True, True] < 0.5 * held[False, False], held


def test_accuquant_learns_the_same_with_checkpointing(recorded):
    options = {"iterations": 1, "steps_per_segment": 4, "batch_size": 2, "cosines": False}
    states = [learned(recorded, AccuQuant(checkpointing=on, **options), memory.BUDGET) for on in (False, True)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
