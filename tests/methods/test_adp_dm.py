"""ADP-DM against hand-computed mixtures, entropies and choices; and what a search does to a model."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import diffquant as dq
from diffquant.calibration import fit
from diffquant.calibration.gain import StepGain
from diffquant.calibration.record import record
from diffquant.core.affine import fake_quantize
from diffquant.core.clock import StepClock
from diffquant.core.model import ModelState, quantizers, switched
from diffquant.core.quantizer import Quantizer
from diffquant.core.spec import LayerRule, QuantSpec
from diffquant.errors import CalibrationError, SpecError
from diffquant.host.conditions import Calibration
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan
from diffquant.methods.adp_dm.clusters import clustered
from diffquant.methods.adp_dm.mixture import entropies, mixture
from diffquant.methods.adp_dm.pool import Pool
from diffquant.methods.adp_dm.search import SearchParameterSets, _Search
from diffquant.methods.ranges import CalibrateRanges
from tests import pipelines

SPEC = QuantSpec(bits=6)
QUICK = {"images": 16, "rounds": 8, "updates": 1, "batch_size": 4}


def quantizer(scales: list[float], intervals: int = 4, splits: tuple[int, ...] = ()) -> Quantizer:
    made = Quantizer(SPEC, len(scales), splits, clock=StepClock(tuple(float(i) for i in range(intervals))))
    made.scale.copy_(torch.tensor(scales)[:, None].expand_as(made.scale))
    made.zero_point.fill_(20)
    made.enabled = True
    return made


def test_a_mixture_by_hand():
    """0.9 is 1.0 in steps of 0.5 and 0.8 in steps of 0.4; three quarters and one quarter of them are 0.95."""
    one = quantizer([0.5, 0.4])
    logits = torch.tensor([[math.log(3), 0.0]]).expand(4, 2)
    assert torch.allclose(mixture(one, logits, torch.tensor([[0.9]])), torch.tensor([[0.95]]))


def test_one_hot_shares_are_the_table_and_equal_sets_the_plain_quantizer():
    one, x = quantizer([0.1, 0.3, 0.05], splits=(2, 4)), torch.randn(5, 6, 3)
    one.clock.set_interval(torch.tensor([0, 1, 2, 3, 1]))
    table = torch.tensor([2, 0, 1, 1])
    one.table = table.to(torch.uint8)
    logits = torch.nn.functional.one_hot(table, 3) * 1000.0
    assert torch.equal(mixture(one, logits, x), one(x))
    same = quantizer([0.1, 0.1])
    assert torch.allclose(mixture(same, torch.randn(4, 2), x), same(x), atol=1e-6)


@pytest.mark.parametrize("block", [1 << 15, 5])
def test_gradients_are_those_of_the_formulas(monkeypatch, block):
    """The hand-written backward pass against autograd through `fake_quantize`, in one piece a sample and in three."""
    monkeypatch.setattr("diffquant.methods.adp_dm.mixture.BLOCK", block)
    one, x = quantizer([0.02, 0.11, 0.3]), torch.randn(6, 4, 3)
    one.clock.set_interval(torch.tensor([0, 1, 2, 3, 1, 0]))
    weights = torch.randn_like(x)
    found = []
    for by_hand in (True, False):
        scale, zero_point, logits, value = (
            tensor.clone().requires_grad_(True) for tensor in (one.scale, one.zero_point, torch.randn(4, 3), x)
        )
        if not by_hand:
            logits = found[0][0].clone().requires_grad_(True)
        own = quantizer([1.0, 1.0, 1.0])
        own.clock, own.scale, own.zero_point = one.clock, scale, zero_point
        if by_hand:
            output = mixture(own, logits, value)
        else:
            shares = logits[one.clock.interval].softmax(dim=1)[..., None, None]
            output = sum(shares[:, g] * fake_quantize(value, scale[g], zero_point[g], SPEC) for g in range(3))
        (output * weights).sum().backward()
        found.append([logits.detach(), logits.grad, value.grad, scale.grad, zero_point.grad])
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) and ours.abs().sum() > 0


def test_entropy_by_hand():
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], requires_grad=True)
    found = entropies(logits)
    assert torch.allclose(found, torch.tensor([0.562335, math.log(2)]), atol=1e-6)
    found.sum().backward()
    assert torch.allclose(logits.grad, torch.tensor([[-0.205990, 0.205990], [0.0, 0.0]]), atol=1e-6)


def chosen(count: int, entropy: list[float]) -> list[int]:
    """Intervals chosen one after the other where a search's mixtures have these entropies; enough latents everywhere."""
    clock = StepClock(tuple(float(i) for i in range(len(entropy))))
    pool, found = Pool(0, torch.arange(len(entropy)).repeat_interleave(50), clock), []
    for _ in range(count):
        found.append(pool.choose(torch.tensor(entropy)))
        pool.counts[found[-1]] += 1
    return found


def test_intervals_are_chosen_by_entropy_and_seldomness(monkeypatch):
    assert chosen(4, [2.0, 1.0, 1.9]) == [0, 2, 0, 2]
    assert sorted(chosen(6, [1.0] * 6)) == list(range(6))
    assert chosen(2, [1.74, 1.0]) == [0, 1] and chosen(2, [1.76, 1.0]) == [0, 0]  # 1.5 that was not chosen, 0.75 that was once
    monkeypatch.setattr("diffquant.methods.adp_dm.pool.BONUS", 0.0)
    assert chosen(3, [1.0, 1.2, 0.9]) == [1, 1, 1]


def test_clusters_group_by_range():
    low = -torch.tensor([1.0, 9, 1.1, 9.1, 4, 0.9])[:, None]
    table, found_low, found_high = clustered(low, -low, 3)
    assert table[0] == table[2] == table[5] and table[1] == table[3] and len(table.unique()) == 3
    assert torch.allclose(found_low[table[0]], torch.tensor([-1.0])) and torch.allclose(found_high[table[4]], torch.tensor([4.0]))
    table, _, _ = clustered(torch.zeros(5, 1), torch.ones(5, 1), 4)  # all alike: no set is left without an interval
    assert len(table.unique()) == 4


# ---- whole searches


@pytest.fixture(scope="module")
def pipe():
    return pipelines.micro()


@pytest.fixture(scope="module")
def data(pipe):
    return record(pipe, Calibration(samples=4, steps=4, batch_size=4), progress=False)


def prepared(pipe, data, sets: int) -> nn.Module:
    model = copy.deepcopy(pipe.unet)
    rules = [LayerRule(match="@all", input_bits=4, sets=sets), LayerRule(match="@attention", input_bits=4, sets=sets)]
    prepare(model, plan(model, rules), data.timesteps)
    with fit.run(show=False) as run:
        CalibrateRanges(candidates=4, samples=16).apply(model, data, torch.Generator().manual_seed(0), run)
    return model


def searched(model, data, **options) -> dict:
    with fit.run(show=False) as run:
        return SearchParameterSets(**(QUICK | options)).apply(model, data, torch.Generator().manual_seed(0), run)


def test_every_quantizer_gets_a_gradient_and_entropy_falls(pipe, data, monkeypatch):
    model, seen = prepared(pipe, data, 2), []
    loss = _Search.loss

    def spied(self, iteration, generator):
        value = loss(self, iteration, generator)
        seen.append({name: float(logits.grad.abs().sum()) for name, logits in self.logits.items()})
        return value

    monkeypatch.setattr(_Search, "loss", spied)
    monkeypatch.setattr("diffquant.methods.adp_dm.search.ENTROPY", 5.0)
    figures = searched(model, data, rounds=16, updates=2)
    assert len(seen[0]) == sum(one.clock is not None for _, one in quantizers(model))
    assert all(any(step[name] > 0 for step in seen) for name in seen[0])
    assert figures["entropy_at_end"] < 0.8 * figures["entropy_at_start"] == pytest.approx(0.8 * math.log(2))
    assert sum(figures["intervals_chosen"]) == 16 and figures["hardening_gap"] < 0.5
    assert all(one.table.max() < 2 and not hasattr(one, "mixture") for _, one in quantizers(model))


def test_timesteps_of_equal_scale_share_a_set():
    """Inputs of four scales over eight timesteps: the search finds them, and one step for all is worse."""
    torch.manual_seed(0)
    model = nn.Module()
    model.diffquant = ModelState(StepClock(tuple(float(i) for i in range(8))))
    one = quantizer([1.0] * 4, 8)
    one.clock = model.diffquant.clock
    scales = torch.tensor([1.0, 4, 16, 64, 64, 16, 4, 1])
    table, low, high = clustered(-3 * scales[:, None], 3 * scales[:, None], 4)
    one.set_ranges(low, high)
    one.table = table.to(torch.uint8)
    assert len({(int(table[i]), int(table[7 - i])) for i in range(4)}) == 4 and all(table[i] == table[7 - i] for i in range(4))
    x = torch.randn(8, 500) * scales[:, None]
    one.clock.set_interval(torch.arange(8))
    static = fake_quantize(x, one.scale[table[3]], one.zero_point[table[3]], SPEC)
    assert ((one(x) - x) / scales[:, None]).norm() < 0.1 * ((static - x) / scales[:, None]).norm()


@pytest.mark.parametrize(("method", "killed"), [("loss", 6), ("loss", 8), ("decide", 1)])
def test_resumed_searches_are_equal(pipe, data, tmp_path, monkeypatch, method, killed):
    """Killed while searching, in the last update, and before the choice."""
    whole = prepared(pipe, data, 2)
    figures = searched(whole, data)
    broken, resumed = prepared(pipe, data, 2), prepared(pipe, data, 2)
    original, calls = getattr(_Search, method), SimpleNamespace(count=0)

    def failing(self, *given):
        calls.count += 1
        if calls.count == killed:
            raise KeyboardInterrupt
        return original(self, *given)

    fitted = fit.fit
    monkeypatch.setattr("diffquant.methods.adp_dm.search.fit", lambda *given, **more: fitted(*given, **more, save_every=2))
    with fit.run(tmp_path, show=False) as run:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(_Search, method, failing)
            SearchParameterSets(**QUICK).apply(broken, data, torch.Generator().manual_seed(0), run)
        again = SearchParameterSets(**QUICK).apply(resumed, data, torch.Generator().manual_seed(0), run)
    assert again == figures
    for (name, ours), (_, theirs) in zip(quantizers(whole), quantizers(resumed), strict=True):
        assert torch.equal(ours.scale, theirs.scale) and torch.equal(ours.table, theirs.table), name


@pytest.mark.parametrize("learn_ranges", [True, False])
def test_every_interval_takes_the_set_with_the_largest_logit(pipe, data, monkeypatch, learn_ranges):
    """And the report has the errors before and after. Steps are those that a search starts with, unless they are learned."""
    model, start, seen, decide = prepared(pipe, data, 2), prepared(pipe, data, 2), [], _Search.decide

    def spied(self):
        with self.mixed():
            mixed = self.error()
        seen.append((self, mixed, decide(self)))
        return seen[-1][-1]

    monkeypatch.setattr(_Search, "decide", spied)
    figures = searched(model, data, learn_ranges=learn_ranges)
    searched(start, data, learn_ranges=False, table="clusters")
    ((search, mixed, found),) = seen
    assert bool(search.pool.visited().all())
    for name, one in search.searched.items():
        assert torch.equal(one.table.long(), search.logits[name].argmax(dim=1)), name
    pairs = [(a.scale, b.scale) for (_, a), (_, b) in zip(quantizers(model), quantizers(start), strict=True) if a.clock is not None]
    assert all(torch.equal(ours, theirs) != learn_ranges for ours, theirs in pairs)
    assert figures["mixture_error"] == found[0] == pytest.approx(mixed, rel=1e-5)
    assert figures["hardened_error"] == found[1] == pytest.approx(figures["settled_error"], rel=1e-5)
    assert figures["hardening_gap"] == pytest.approx(found[1] / found[0] - 1) and abs(figures["hardening_gap"]) > 1e-4


@pytest.mark.parametrize("error", ["output", "latent"])
def test_the_error_of_the_latent_is_the_outputs_times_what_the_sampler_makes_of_it(pipe, data, error):
    model, everything = prepared(pipe, data, 1), torch.arange(16)
    figures = searched(model, data, table="clusters", error=error)
    with torch.no_grad(), switched(model, True):
        arguments, target = data.batch(everything, torch.device("cpu"))
        missed = model(**arguments).sample - target
    weighed = missed * StepGain(model, data).of(everything) if error == "latent" else missed
    assert figures["images"] == 16 and figures["settled_error"] == pytest.approx(float(weighed.square().sum() / 16), rel=1e-5)


@pytest.mark.parametrize("sets", [1, 2, 4])
def test_the_control_learns_ranges_and_searches_nothing(pipe, data, monkeypatch, sets):
    """One set is static quantization, four for four intervals are one each. Tables stay, errors fall, all are visited."""
    model, start = prepared(pipe, data, sets), prepared(pipe, data, sets)
    monkeypatch.setattr("diffquant.methods.adp_dm.search.SCALE_LR", 2e-2)
    monkeypatch.setattr(CalibrateRanges, "calibrate_activations", lambda *given, **more: [])  # extremes: much to learn
    options = {"table": "clusters", "rounds": 16, "images": 16}
    before = searched(start, data, **options, learn_ranges=False)
    figures = searched(model, data, **options, updates=6)
    assert figures["settled_error"] < 0.9 * before["settled_error"] and "hardening_gap" not in figures
    assert figures["intervals_chosen"] == [4, 4, 4, 4]
    assert all(row["moved"] == 0 and row["entropy"] < 1e-30 and row["sets_used"] == sets for row in figures["layers"])
    ours = [one for _, one in quantizers(model) if one.clock is not None]
    theirs = [one for _, one in quantizers(start) if one.clock is not None]
    assert len(figures["layers"]) == len(ours)
    if sets == 1:
        assert all(one.table is None for one in ours)
    else:
        assert all(torch.equal(a.table, b.table) for a, b in zip(ours, theirs, strict=True))


def test_intervals_without_a_latent_keep_the_nearest_set(pipe, data):
    """Four sets for four intervals are one each; only the interval that was trained may take another."""
    model = prepared(pipe, data, 4)
    figures = searched(model, data, rounds=1, images=1)
    (trained,) = [interval for interval, count in enumerate(figures["intervals_chosen"]) if count]
    for _, one in quantizers(model):
        rest = [int(row) for interval, row in enumerate(one.table) if interval != trained]
        assert len(set(rest)) == 3


def test_a_recording_that_cannot_be_replayed_has_no_latent_error(pipe, data, monkeypatch):
    def refused(*given):
        raise CalibrationError("DDIMPipeline with DDIMScheduler: only such sums can be replayed")

    monkeypatch.setattr("diffquant.calibration.gain.StepGain", refused)
    with pytest.raises(SpecError, match="only such sums can be replayed; or set error: output"):
        searched(prepared(pipe, data, 2), data, error="latent")


def test_refused(pipe, data):
    with pytest.raises(SpecError, match="no quantizer has several parameter sets; add sets: 8 to a rule"):
        searched(prepared(pipe, data, 1), data)


def test_a_model_of_one_step_has_one_set_and_a_line_says_so(tmp_path, caplog):
    pipe = pipelines.micro()
    data = dq.record(pipe, dq.Calibration(samples=4, steps=1, batch_size=4), folder=tmp_path, progress=False)
    recipe = dq.load_recipe("adp-dm-w4a8", pipelines.small_budget("adp-dm-w4a8"))
    report = dq.quantize(pipe, recipe, data, progress=False)
    note = "the model was recorded at one timestep, so every input has one parameter set; nothing is searched"
    assert note in caplog.text and note in [row["figures"].get("note") for row in report.passes]
    assert all(quantizer.rows == 1 for _, quantizer in quantizers(pipe.unet) if quantizer.clock is not None)
