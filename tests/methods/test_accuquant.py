"""Gradients of several steps against autograd through them, memory, and the pass on a small pipeline."""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch import nn

import diffquant as dq
from chains import gradient_into_leaves
from diffquant.calibration.record import record
from diffquant.calibration.rollout import Chain, Rollout
from diffquant.core.model import quantized_layers, quantizers
from diffquant.errors import RecipeError, SpecError
from diffquant.host.conditions import Calibration
from diffquant.host.pipeline import Host
from diffquant.methods.accuquant import AccuQuant, visited
from diffquant.methods.base import quantizer_state
from diffquant.recipe import load_recipe
from tests import pipelines

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SMALL = Calibration(samples=4, batch_size=2, steps=4, seed=1)
QUICK = [
    "passes.0.candidates=8",
    "passes.0.samples=8",
    "passes.1.iterations=2",
    "passes.1.samples=8",
    "passes.2.iterations=6",
    "passes.2.cosines=false",
]


class Hand(Chain):
    """The hand case of one number: eps = theta x, DDIM, abar 0.25 -> 0.49 -> 0.81, x = 1."""

    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    abar = (0.25, 0.49, 0.81)

    def recorded(self, i):
        return torch.ones(1, 1, dtype=torch.float64)

    def predict(self, latent, i, state):
        return self.theta * latent

    def step(self, model_output, latent, i, state):
        now, after = self.abar[i], self.abar[i + 1]
        a = (after / now) ** 0.5
        return a * latent + ((1 - after) ** 0.5 - a * (1 - now) ** 0.5) * model_output, state


@pytest.mark.parametrize(("gradient", "expected"), [("exact", -0.649942), ("chain", -0.649942), ("identity", -0.636523)])
def test_the_hand_computed_case(gradient, expected):
    chain = Hand(object.__new__(Rollout), torch.zeros(1, dtype=torch.long), range(2), {})
    Hand.theta.grad = None
    loss = gradient_into_leaves(chain, torch.full((1, 1), 0.9, dtype=torch.float64), gradient)
    assert float(loss) == pytest.approx((1.202144 - 0.9) ** 2, abs=1e-6)
    assert float(Hand.theta.grad) == pytest.approx(expected, abs=2e-6)


def double(name, tmp_path):
    """A pipeline in float64, its recording, and a rollout through a disturbed copy whose weights take gradients."""
    if name == "stable_diffusion":
        pipe = pipelines.stable_diffusion(tmp_path)
        pipe.text_encoder.double()
        pipe.unet.double()
        data = record(pipe, SMALL, progress=False)
    elif name == "eta":
        pipe = pipelines.micro()
        pipe.unet.double()
        data = record(pipe, dataclasses.replace(SMALL, eta=1.0), progress=False)
    else:
        pipe = pipelines.micro()
        pipe.unet.double()
        pipe.scheduler = {"dpm": DPMSolverMultistepScheduler, "pndm": PNDMScheduler, "clipped": DDIMScheduler}[name].from_config(
            pipe.scheduler.config
        )
        data = record(pipe, dataclasses.replace(SMALL, steps=6), run=pipelines.own_loop, progress=False)
    model = Host(pipe).denoiser
    disturbed = copy.deepcopy(model).requires_grad_(True)
    with torch.no_grad():
        for parameter in disturbed.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return Rollout(model, data).through(disturbed)


def weight_gradient(rollout, steps, gradient):
    rollout.model.zero_grad()
    chain = rollout.chain(torch.tensor([0, 2]), steps)
    gradient_into_leaves(chain, chain.recorded(len(steps)), gradient)
    return torch.cat([p.grad.flatten() for p in rollout.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["clipped", "eta", "dpm", "pndm", "stable_diffusion"])
def test_exact_is_autograd_through_the_chain(name, tmp_path):
    rollout = double(name, tmp_path)
    for steps in (range(0, 3), range(1, 4)):
        exact, chain = (weight_gradient(rollout, steps, gradient) for gradient in ("exact", "chain"))
        assert float((exact - chain).norm() / chain.norm()) < 1e-9


@pytest.mark.parametrize("name", ["clipped", "dpm"])
def test_all_gradients_are_one_at_a_single_step_bit_for_bit(name, tmp_path):
    rollout = double(name, tmp_path)
    found = [weight_gradient(rollout, range(1, 2), gradient) for gradient in ("identity", "exact", "chain")]
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("gradient", ["identity", "exact", "chain"])
def test_split_guidance_gives_the_same_gradient(gradient, tmp_path):
    rollout = double("stable_diffusion", tmp_path)
    whole = weight_gradient(rollout, range(1, 4), gradient)
    rollout.split_guidance = True
    assert float((weight_gradient(rollout, range(1, 4), gradient) - whole).norm() / whole.norm()) < 1e-9


def test_identity_differs_from_exact_over_several_steps(tmp_path):
    rollout = double("clipped", tmp_path)
    exact, identity = (weight_gradient(rollout, range(3), gradient) for gradient in ("exact", "identity"))
    assert 0.3 < float(nn.functional.cosine_similarity(exact, identity, dim=0)) < 1 - 1e-6


def saved_bytes(run) -> int:
    """The most bytes that autograd kept at one time."""
    alive = most = 0

    class Held:
        def __init__(self, tensor):
            nonlocal alive, most
            self.tensor = tensor
            alive += tensor.nbytes
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        run()
    return most


def test_memory_does_not_grow_with_the_steps(tmp_path):
    pipe = pipelines.micro()
    rollout = Rollout(pipe.unet, record(pipe, dataclasses.replace(SMALL, steps=8), progress=False)).through(
        copy.deepcopy(pipe.unet).requires_grad_(True)
    )

    def peak(gradient, steps):
        return saved_bytes(functools.partial(weight_gradient, rollout, range(steps), gradient))

    for gradient in ("identity", "exact"):
        assert peak(gradient, 8) <= 1.05 * peak(gradient, 1)
    assert peak("chain", 8) > 6 * peak("chain", 1)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A pipeline, its recording, and a folder with the passes that come before, which every test starts from."""
    pipe = pipelines.micro()
    data, begun = record(pipe, SMALL, progress=False), tmp_path_factory.mktemp("begun")
    recipe = load_recipe("accuquant-w4a4", QUICK)
    dq.quantize(copy.deepcopy(pipe), recipe.model_copy(update={"passes": recipe.passes[:2]}), data, folder=begun, progress=False)
    return pipe, data, begun


def quantized(recorded, *overrides, folder=None):
    pipe, data, begun = recorded
    pipe = copy.deepcopy(pipe)
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        shutil.copytree(begun, folder, dirs_exist_ok=True)
        report = dq.quantize(pipe, load_recipe("accuquant-w4a4", [*QUICK, *overrides]), data, folder=folder, progress=False)
    return pipe.unet, report


def test_the_stage_brings_the_ends_of_segments_nearer(recorded):
    _, report = quantized(
        recorded,
        "passes.0.activations=minmax",
        "passes.2.iterations=30",
        "passes.2.steps_per_segment=2",
        "passes.2.gradient=identity",
        "passes.2.cosines=true",
        "passes.2.rate=0.01",
    )
    figures = report.passes[-1]["figures"]
    assert figures["kept"]
    assert [row["steps"] for row in figures["segments"]] == [[0, 2], [2, 4]]
    before, after = (sum(row[key] for row in figures["segments"]) for key in ("error_before", "error_after"))
    assert after < 0.9 * before
    assert all(0 < row["cosine"] <= 1 for row in figures["segments"])


@pytest.mark.parametrize("override", ["gradient=identity", "gradient=exact", "rounding=true", "biases=true"])
def test_every_option_leaves_a_frozen_model_with_plain_parameters(recorded, override):
    model, report = quantized(recorded, f"passes.2.{override}", "passes.2.steps_per_segment=2")
    for name, quantizer in quantizers(model):
        assert quantizer.scale.is_leaf and not quantizer.scale.requires_grad, name
        assert quantizer.calibrated and quantizer.rounding is None
        assert torch.equal(quantizer.zero_point, quantizer.zero_point.round())
    assert len(report.passes[-1]["figures"]["segments"]) == 2


def test_a_parameter_set_per_segment(recorded, tmp_path):
    options = [f"passes.2.{option}" for option in ("steps_per_segment=3", "per_segment=true", "rate=0.005", "iterations=8")]
    options.append("passes.0.activations=minmax")
    model, report = quantized(recorded, *options, folder=tmp_path / "work")
    assert report.passes[-1]["figures"]["kept"]
    resumed, _ = quantized(recorded, *options, folder=tmp_path / "work")  # from the kept pass
    for one in (model, resumed):
        found = [quantizer for _, quantizer in quantizers(one) if quantizer.clock is not None]
        assert all(quantizer.rows == 2 and quantizer.table.tolist() == [0, 0, 0, 1] for quantizer in found)
        assert any(not torch.equal(quantizer.scale[0], quantizer.scale[1]) for quantizer in found)
    pipe = copy.deepcopy(recorded[0])
    pipe.unet = resumed
    dq.save(pipe, tmp_path / "out")  # reads back what it wrote
    loaded = dq.load(tmp_path / "out", engine="simulate").unet
    arguments, _ = recorded[1].batch(torch.arange(4))
    with torch.no_grad():
        assert torch.equal(loaded(**arguments).sample, model(**arguments).sample)


def test_biases_are_learned_and_kept(recorded, tmp_path):
    """They are in the frozen model's biases, in what a finished pass keeps, and in the checkpoint."""
    options = ["passes.2.biases=true", "passes.2.rate=0.01", "passes.0.activations=minmax", "passes.2.iterations=20"]
    model, report = quantized(recorded, *options, folder=tmp_path / "work")
    assert report.passes[-1]["figures"]["kept"]
    resumed, _ = quantized(recorded, *options, folder=tmp_path / "work")  # from the kept pass
    before = dict(recorded[0].unet.named_parameters())
    biases = {name: value for name, value in model.named_parameters() if name.endswith("bias")}
    moved = [name for name, value in biases.items() if not torch.equal(value, before[name])]
    assert {name.removesuffix(".bias") for name in moved} == {
        name for name, layer in quantized_layers(model) if layer.bias is not None
    }
    assert all(torch.equal(value, dict(resumed.named_parameters())[name]) for name, value in biases.items())
    pipe = copy.deepcopy(recorded[0])
    pipe.unet = model
    dq.save(pipe, tmp_path / "out")
    loaded = dict(dq.load(tmp_path / "out", engine="simulate").unet.named_parameters())
    assert all(torch.equal(value, loaded[name]) for name, value in biases.items())


def test_smooth_is_learned_with_codes_as_they_are(recorded, tmp_path):
    """It starts at one, is part of what a finished pass keeps and of the checkpoint, and brings segments nearer."""
    shared = ["layers.0.smooth=true", "passes.0.activations=minmax", "passes.2.iterations=20", "passes.2.rate=0.02"]
    options = [*shared, "passes.2.smooth=true"]
    model, report = quantized(recorded, *options, folder=tmp_path / "work")
    figures = report.passes[-1]["figures"]
    assert figures["kept"]
    before, after = (sum(row[key] for row in figures["segments"]) for key in ("error_before", "error_after"))
    assert after < 0.95 * before
    resumed, _ = quantized(recorded, *options, folder=tmp_path / "work")
    without, _ = quantized(recorded, *shared)
    learned, kept, started = (dict(quantized_layers(one)) for one in (model, resumed, without))
    for name, layer in learned.items():
        assert layer.smooth.is_leaf and not layer.smooth.requires_grad
        assert torch.equal(layer.smooth, kept[name].smooth) and not torch.equal(layer.smooth, started[name].smooth)
        assert torch.equal(started[name].smooth, torch.ones_like(layer.smooth))
        assert torch.equal(layer.weight_quantizer.codes, started[name].weight_quantizer.codes)
    pipe = copy.deepcopy(recorded[0])
    pipe.unet = model
    dq.save(pipe, tmp_path / "out")  # reads back what it wrote
    loaded = dict(quantized_layers(dq.load(tmp_path / "out", engine="simulate").unet))
    assert all(torch.equal(layer.smooth, loaded[name].smooth) for name, layer in learned.items())


def test_smooth_without_a_vector_or_beside_rounding_is_refused(recorded):
    with pytest.raises(SpecError, match=r"AccuQuant: no layer has smooth: true and quantizes both operands"):
        quantized(recorded, "passes.2.smooth=true", "layers.0.smooth=false", "layers.1.smooth=true")
    with pytest.raises(RecipeError, match=r"AccuQuant: smooth is learned .* leave out rounding or smooth"):
        load_recipe("accuquant-w4a4", ["passes.2.smooth=true", "passes.2.rounding=true"])


def test_codes_of_weights_stay_while_their_steps_move(recorded):
    model, _ = quantized(recorded, "passes.2.rate=0.02")
    pipe, data, _ = recorded
    start = copy.deepcopy(pipe)
    recipe = load_recipe("accuquant-w4a4", QUICK)
    dq.quantize(start, recipe.model_copy(update={"passes": recipe.passes[:2]}), data, progress=False)
    moved = 0
    for (_, one), (_, two) in zip(quantizers(model), quantizers(start.unet), strict=True):
        if one.clock is None:
            assert torch.equal(one.codes, two.codes)
            moved += not torch.equal(one.scale, two.scale)
    assert moved


@pytest.mark.parametrize("last", [2, 4])
def test_a_killed_stage_goes_on_and_ends_bit_equal(recorded, tmp_path, monkeypatch, last):
    options = ["passes.2.steps_per_segment=2"]
    whole, _ = quantized(recorded, *options)
    real = AccuQuant._loss

    def killed(self, iteration, *given):
        if iteration == last:
            raise KeyboardInterrupt
        return real(self, iteration, *given)

    monkeypatch.setattr("diffquant.methods.accuquant.SAVE_EVERY", 2)
    monkeypatch.setattr(AccuQuant, "_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        quantized(recorded, *options, folder=tmp_path)
    assert list(tmp_path.rglob("fit.safetensors"))

    def late(self, iteration, *given):
        assert iteration >= last
        return real(self, iteration, *given)

    monkeypatch.setattr(AccuQuant, "_loss", late)
    resumed, _ = quantized(recorded, *options, folder=tmp_path)
    one, two = quantizer_state(whole), quantizer_state(resumed)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_stage_that_makes_segments_worse_is_undone(recorded, monkeypatch):
    _, report = quantized(recorded, "passes.2.rate=3.0", "passes.2.iterations=3")
    figures = report.passes[-1]["figures"]
    assert not figures["kept"]


def test_too_long_a_segment_is_warned_of(recorded, capsys, monkeypatch):
    monkeypatch.setattr("diffquant.methods.accuquant.LOW_COSINE", 1.1)
    quantized(recorded, "passes.2.steps_per_segment=4", "passes.2.gradient=identity", "passes.2.cosines=true")
    assert "shorten steps_per_segment" in " ".join(capsys.readouterr().err.split())


def test_every_segment_is_visited_once_in_shuffled_order():
    for cycle in range(3):
        found = [visited(7, 7 * cycle + place, seed=5) for place in range(7)]
        assert found == torch.randperm(7, generator=torch.Generator().manual_seed(5 + cycle)).tolist()
