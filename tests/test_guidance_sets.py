"""Parameter sets for each half of a guided call, from the recording to the integer engine, on small stock pipelines."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import diffquant as dq
from diffquant.calibration.replay import call_recorded, conditional_half
from diffquant.core.affine import scale_from_range
from diffquant.core.clock import StepClock
from diffquant.core.layers import QuantizedConv2d, QuantizedLinear
from diffquant.core.model import full_precision, quantized_layers, quantizers
from diffquant.core.quantizer import Quantizer
from diffquant.core.spec import LayerRule, QuantSpec
from diffquant.engines import openvino
from diffquant.engines.int8.engine import Int8
from diffquant.engines.int8.kernels import Product
from diffquant.errors import CalibrationError, SpecError
from diffquant.host.denoiser import prepare
from diffquant.host.pipeline import Host
from diffquant.host.structure import plan
from diffquant.quantization import pass_names
from tests import pipelines

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # schedulers of diffusers
GUIDED = dq.Calibration(samples=3, steps=2, batch_size=2, guidance_scale=3.0)
BRANCHES = ("layers.0.guidance_sets=true", "layers.1.guidance_sets=true")
CONDITIONAL = {"stable_diffusion": 1, "stable_diffusion_xl": 1, "pixart": 1, "stable_diffusion_3": 1, "dit": 0, "cogvideox": 1}
PLAIN = [LayerRule(match="@all", weight_bits=8, input_bits=8), LayerRule(match="@attention", input_bits=8, softmax_bits=8)]
SPLIT = [rule.model_copy(update={"guidance_sets": True}) for rule in PLAIN]


def sampled(pipe, calibration=GUIDED) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        result = Host(pipe).run(calibration, torch.Generator().manual_seed(0), range(2))
    return torch.as_tensor(result[0]).float().numpy()


def quantization_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# ---- the clock


def test_intervals_of_halves():
    clock = StepClock([900, 500, 100], conditional=1)
    assert (clock.intervals, clock.times, clock.branches) == (6, 3, 2)
    assert clock.table(2, True).tolist() == [0, 0, 0, 1, 1, 1] and clock.table(6, True).tolist() == list(range(6))
    assert clock.table(4, True).tolist() == [0, 0, 1, 2, 2, 3]
    assert clock.table(3, False).tolist() == [0, 1, 2, 0, 1, 2] and clock.table(1, False).tolist() == [0] * 6
    latents = torch.randn(2, 3, 4, 4)
    guided = torch.cat([latents, latents])
    clock.set_timestep(torch.tensor(480), clock.halves(guided))
    assert clock.interval.tolist() == [1, 1, 4, 4]
    clock.set_timestep(torch.tensor([900, 100, 900, 100]), clock.halves(guided))
    assert clock.interval.tolist() == [0, 2, 3, 5]
    for alone in (latents, latents[:1], torch.randn(4, 3, 4, 4)):  # no guidance: the conditional half's
        clock.set_timestep(torch.tensor(900), clock.halves(alone))
        assert clock.interval == 3
    with clock.rows_are(torch.tensor([1, 0, -1])):
        assert clock.halves(torch.zeros(3, 1)).tolist() == [1, 0, 1]
        with pytest.raises(SpecError, match="a batch of 2 where 3 rows"):
            clock.halves(latents)
    assert clock.row_halves is None


def test_a_clock_without_halves_is_as_it_was():
    clock = StepClock([900, 500, 100])
    clock.set_timestep(torch.tensor(100))
    assert (clock.interval, clock.intervals, clock.branches) == (2, 3, 1)
    assert torch.equal(clock.table(2, False), clock.table(2, True))


# ---- the recording


@pytest.mark.parametrize("kind", list(CONDITIONAL))
def test_the_conditional_half_is_read_off_the_recording(kind, tmp_path):
    data = dq.record(pipelines.build(kind, tmp_path), GUIDED, progress=False)
    assert conditional_half(data) == CONDITIONAL[kind]
    half = data.half_of
    assert half.unique().tolist() == [0, 1] and (half == 0).sum() == (half == 1).sum() == 6


def test_without_guidance_there_are_no_halves(tmp_path):
    pipe = pipelines.stable_diffusion(tmp_path)
    data = dq.record(pipe, dq.Calibration(samples=2, steps=2, guidance_scale=1.0), progress=False)
    assert data.half_of.unique().tolist() == [-1]
    with pytest.raises(CalibrationError, match="StableDiffusionPipeline: 2 calls .* up to 1 rows a sample for 2 steps"):
        dq.quantize(pipe, dq.load_recipe("minmax-w8a8", BRANCHES), data, progress=False)
    assert not hasattr(pipe.unet, "diffquant")


# ---- calibration


def test_sets_are_the_ranges_of_their_half(tmp_path):
    """Against the extremes of whole recorded calls, cut in two here."""
    pipe = pipelines.stable_diffusion(tmp_path)
    data = dq.record(pipe, GUIDED, progress=False)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    seen: list[torch.Tensor] = []
    handle = pipe.unet.get_submodule(name).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        for arguments, _ in pipelines.recorded_calls(data):
            pipe.unet(**arguments)
    handle.remove()
    halves = [torch.cat([call.chunk(2)[which] for call in seen]) for which in (0, 1)]
    low, high = (torch.stack([getattr(half, side)() for half in halves])[:, None] for side in ("min", "max"))
    wanted, _ = scale_from_range(low, high, QuantSpec(bits=8))

    dq.quantize(pipe, dq.load_recipe("minmax-w8a8", (*BRANCHES, "passes.0.samples=12")), data, progress=False)
    found = pipe.unet.get_submodule(name).input_quantizer
    assert found.scale.shape == (2, 1) and found.scale[0] != found.scale[1]
    assert torch.equal(found.scale, wanted) and found.table.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["stable_diffusion", "dit"])
def test_round_trip(kind, tmp_path):
    pipe = pipelines.build(kind, tmp_path)
    data = dq.record(pipe, GUIDED, progress=False)
    recipe = dq.load_recipe("minmax-w8a8", (*BRANCHES, "layers.0.sets=2", "passes.0.samples=12"))
    report = dq.quantize(pipe, recipe, data, progress=False)
    denoiser = Host(pipe).denoiser
    activations = [one for _, one in quantizers(denoiser) if one.clock is not None]
    assert denoiser.diffquant.clock.conditional == CONDITIONAL[kind] and {one.rows for one in activations} == {2, 4}
    differing = [one for one in activations if not torch.equal(one.scale[: one.rows // 2], one.scale[one.rows // 2 :])]
    assert len(differing) > len(activations) / 2

    before = sampled(pipe)
    dq.save(pipe, tmp_path / "packed")
    component = "unet" if kind == "stable_diffusion" else "transformer"
    written = quantization_config(tmp_path / "packed" / component)
    assert written["conditional_half"] == CONDITIONAL[kind]
    assert {group["spec"]["sets"] for group in written["layers"]} == {2} and all(
        "guidance_sets" in g["spec"] for g in written["layers"]
    )
    with dq.engine("simulate"):
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "packed")
    assert np.array_equal(sampled(loaded), before)
    dq.verify(tmp_path / "packed")
    dq.save(loaded, tmp_path / "again")
    assert quantization_config(tmp_path / "again" / component) == written
    if not Int8.unsupported():
        rows = dq.use_engine(loaded, "int8")
        assert {row.name for row in rows} == {row["name"] for row in report.layers if row["spec"] is not None}
        assert pipelines.not_integer(rows) == []
        assert np.isfinite(sampled(loaded)).all()


@pytest.mark.skipif(bool(Int8.unsupported()), reason=Int8.unsupported())
@pytest.mark.parametrize("kind", ["stable_diffusion", "dit"])
def test_integer_codes_of_both_halves(kind, tmp_path):
    """Layer by layer in guided calls of the int8 engine: codes and outputs are those of the simulation for the same input."""
    pipe = pipelines.build(kind, tmp_path)
    data = dq.record(pipe, GUIDED, progress=False)
    dq.quantize(pipe, dq.load_recipe("minmax-w8a8", (*BRANCHES, "passes.0.samples=12")), data, progress=False)
    denoiser = Host(pipe).denoiser
    assert not pipelines.not_integer(dq.use_engine(pipe, "int8"))
    checked = []

    def check(layer: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x, quantizer = given[0], layer.input_quantizer
        rows = quantizer.present_rows(x.device)
        simulated = quantizer.quantize(x) - quantizer.spec.code_min
        for row in rows.unique().tolist() if isinstance(getattr(layer, "product", None), Product) else ():  # else in floating point
            some = rows == row
            codes = torch.cat(layer.product.codes(x[some], row), dim=quantizer.axis).float()
            assert (codes - simulated[some]).abs().max() <= 1 and (codes != simulated[some]).float().mean() < 0.01
        plain = QuantizedLinear if isinstance(layer, QuantizedLinear) else QuantizedConv2d
        expected = plain.forward(layer, x)
        assert (output - expected).norm() <= 0.01 * expected.norm()  # a code on an edge moves it by a step
        checked.append(len(rows.unique()))

    handles = [layer.register_forward_hook(check) for _, layer in quantized_layers(denoiser)]
    sampled(pipe)
    for handle in handles:
        handle.remove()
    assert set(checked) == {2} and len(checked) >= 2 * len(handles)


def test_integer_attention_of_both_halves():
    """Softmax sets that differ: each half is what it is alone."""
    model = pipelines.stable_diffusion_3_transformer().eval()
    prepare(model, plan(model, SPLIT), (900.0, 100.0), conditional=1)
    products = next(module for name, module in model.named_modules() if name.endswith("attention_products"))
    for name, quantizer in products.named_children():
        assert isinstance(quantizer, Quantizer) and quantizer.rows == 2
        quantizer.scale.copy_(torch.tensor([[1 / 255], [1 / 100]]) if name == "softmax" else torch.tensor([[0.02], [0.05]]))
        quantizer.zero_point.fill_(0 if name == "softmax" else 128)
        quantizer.enabled = True
    from diffquant.engines.int8.attention import BlockedProducts

    query, key, value = (torch.randn(4, 3, tokens, 8) for tokens in (20, 9, 9))
    mask = torch.rand(4, 1, 20, 9)
    clock = model.diffquant.clock
    with torch.no_grad():
        clock.set_interval(torch.tensor([0, 2, 0, 2]))
        simulated = products(query, key, value, mask)
        products.__class__ = BlockedProducts
        together = products(query, key, value, mask)
        for interval, some in ((0, [0, 2]), (2, [1, 3])):
            clock.set_interval(interval)
            assert torch.equal(together[some], products(query[some], key[some], value[some], mask[some]))
    assert ((together - simulated).abs() > 1e-5).float().mean() < 0.01 and not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("kind", ["stable_diffusion", "dit"])
def test_equal_ranges_in_both_halves_are_the_plain_model(kind, tmp_path):
    pipe = pipelines.build(kind, tmp_path)
    plain, split = (copy.deepcopy(pipe) for _ in range(2))
    denoisers = [Host(one).denoiser for one in (plain, split)]
    pipelines.freeze_by_hand(denoisers[0])
    rule = [LayerRule(match="@all", guidance_sets=True), LayerRule(match="@attention", guidance_sets=True)]
    pipelines.freeze_by_hand(denoisers[1], rules=rule, conditional=CONDITIONAL[kind])
    for (name, ours), (_, theirs) in zip(quantizers(denoisers[1]), quantizers(denoisers[0]), strict=True):
        if ours.clock is not None:
            assert (ours.rows, theirs.rows) == (2, 1), name
            ours.scale.copy_(theirs.scale.expand_as(ours.scale))
            ours.zero_point.copy_(theirs.zero_point.expand_as(ours.zero_point))
    wanted = sampled(plain)
    assert np.array_equal(sampled(split), wanted)
    for _, one in quantizers(denoisers[1]):  # and the sets of the unconditional half count
        if one.clock is not None:
            one.scale[1 - CONDITIONAL[kind]] *= 2
    assert not np.array_equal(sampled(split), wanted)
    unguided = dq.Calibration(samples=2, steps=2, guidance_scale=1.0)
    assert np.array_equal(sampled(split, unguided), sampled(plain, unguided))  # takes those of the conditional half


def test_rows_of_a_recording_take_their_half_in_any_order(tmp_path):
    """Gathered rows are no guided call to look at; the recording says of each which half it is."""
    pipe = pipelines.stable_diffusion(tmp_path)
    data = dq.record(pipe, GUIDED, progress=False)
    prepare(pipe.unet, plan(pipe.unet, SPLIT), data.timesteps, conditional_half(data))
    picked = torch.tensor([7, 0, 3, 9])
    with torch.no_grad(), full_precision(pipe.unet):
        call_recorded(pipe.unet, data, picked)
    timestep = [data.timesteps.index(value) for value in data.timestep_of[picked].tolist()]
    wanted = [interval + 2 * half for interval, half in zip(timestep, data.half_of[picked].tolist(), strict=True)]
    assert pipe.unet.diffquant.clock.interval.tolist() == wanted and len(set(wanted)) > 2


@pytest.mark.parametrize("name", ["accuquant", "adp-dm", "dmq"])  # the first begins as brecq does
def test_every_method_fits_them(name, tmp_path):
    pipe = pipelines.dit()  # few layers
    data = dq.record(pipe, GUIDED, progress=False)
    own = {"adp-dm": ["layers.0.sets=2", "layers.1.sets=2"], "dmq": ["layers.2.match=transformer_blocks.0.ff.net.2"]}
    overrides = (*pipelines.small_budget(f"{name}-w4a8", 12), *BRANCHES, *own.get(name, []))
    dq.quantize(pipe, dq.load_recipe(f"{name}-w4a8", overrides), data, progress=False)
    found = [one for _, one in quantizers(pipe.transformer) if one.clock is not None]
    assert all(one.rows % 2 == 0 and len(one.table) == 4 and torch.isfinite(one.scale).all() for one in found)
    before = sampled(pipe)
    dq.save(pipe, tmp_path / "packed")
    with dq.engine("simulate"):
        assert np.array_equal(sampled(DiffusionPipeline.from_pretrained(tmp_path / "packed")), before)


# ---- what is refused, and what stays as it was


def test_graphs_of_other_runtimes_are_refused(tmp_path):
    pipe = pipelines.stable_diffusion(tmp_path)
    rule = [LayerRule(match="@all", guidance_sets=True)]
    pipelines.freeze_by_hand(pipe.unet, rules=rule, conditional=1)
    with pytest.raises(SpecError, match="has parameter sets for each half of a guided call .*, which OpenVINO graphs do not"):
        openvino.OpenVino().install(pipe.unet)


def test_sets_without_a_known_half_are_refused(tmp_path):
    unet = pipelines.stable_diffusion(tmp_path).unet
    with pytest.raises(SpecError, match="guidance_sets, but no half of a call is known"):
        prepare(unet, plan(unet, SPLIT), (900.0, 100.0))


def test_files_without_them_hold_no_word_of_them(tmp_path):
    pipe = pipelines.stable_diffusion(tmp_path)
    pipelines.freeze_by_hand(pipe.unet, sets=2)
    dq.save(pipe, tmp_path / "packed")
    text = (tmp_path / "packed" / "unet" / "config.json").read_text()
    assert "guidance_sets" not in text and "conditional_half" not in text


def test_passes_that_were_finished_before_keep_their_names(tmp_path):
    """The hash in a pass's name is that of rules without later fields, unless they are set."""
    pipe = pipelines.stable_diffusion(tmp_path)
    data = dq.record(pipe, GUIDED, progress=False)
    plain, split = (dq.load_recipe("minmax-w8a8", overrides) for overrides in ((), BRANCHES))
    rules = [rule.model_dump(mode="json", exclude={"guidance_sets", "input_scale"}) for rule in plain.layers]
    recorded = {key: data.manifest[key] for key in ("model_hash", "scheduler", "calibration", "run")}
    digest = hashlib.sha256(json.dumps([0, recorded, rules], sort_keys=True).encode())
    digest.update(f"CalibrateRanges {plain.built_passes()[0].model_dump_json()}".encode())
    (name,), (other,) = (pass_names(recipe, plan(pipe.unet, recipe.layers), 0, data) for recipe in (plain, split))
    assert name == f"pass-00-CalibrateRanges-{digest.hexdigest()[:12]}" and other != name


def test_inspect_says_so(tmp_path):
    pipe = pipelines.stable_diffusion(tmp_path)
    plain, split = (dq.inspect(pipe, dq.load_recipe("mse-w4a8", overrides)) for overrides in ((), BRANCHES))
    operands = sum(
        (1 if row.kind != "attention products" else 4) for row in split.layers if row.spec is not None and row.spec.guidance_sets
    )
    assert split.file_bytes - plain.file_bytes == operands * (5 + 2 * 20)  # a second scale and zero point, and a table
