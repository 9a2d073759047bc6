"""Comparisons of a tiny model with itself and with a disturbed copy."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffquant.errors import CalibrationError, EvaluationError
from diffquant.evaluation import distances, features, pairs
from diffquant.evaluation.compare import Comparison, compare_to, measure_reference, run_reference
from diffquant.evaluation.features import DataStatistics
from diffquant.evaluation.intervals import Interval
from diffquant.evaluation.metrics import accumulation
from diffquant.sampling import observers
from diffquant.sampling.protocol import SamplingProtocol
from diffquant.sampling.sample import sample
from tests import pipelines

PROTOCOL = SamplingProtocol(samples=24, steps=3, batch_size=10, seed=3, trajectory_samples=15, accumulation_samples=4)


class Corners:
    """Four pixels as features, and a classifier that is sure of nothing."""

    name = "corners"
    sha256 = "c0"

    def features(self, pictures):
        return pictures[:, 0, ::7, ::7].flatten(1).float() / 255

    def confidence(self, pictures):
        return features.confidence(self.features(pictures))

    def agreement(self, pictures, conditions):
        return torch.tensor([float(condition == conditions[0]) for condition in conditions])


class OnlyFeatures(Corners):
    def confidence(self, pictures):
        return None


def disturbed(pipe, amount: float):
    """A copy whose denoiser errs, as a quantized one would."""
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * parameter.abs().mean()
    return other


def compare(full, other, protocol, *, features=None, **options) -> Comparison:
    return compare_to(run_reference(full, protocol, features=features, progress=options.get("progress")), other, **options)


@pytest.fixture(scope="module")
def pipe():
    return pipelines.ddim()


@pytest.fixture(scope="module")
def data():
    return DataStatistics(torch.rand(30, 4, generator=torch.Generator().manual_seed(2)), "d0")


@pytest.fixture(scope="module")
def reference(pipe, data):
    return run_reference(pipe, PROTOCOL, features=Corners(), data=data)


@pytest.fixture(scope="module")
def full(reference):
    return measure_reference(reference).figures


@pytest.fixture(scope="module")
def worse(pipe, reference):
    return compare_to(reference, disturbed(pipe, 0.1), name="worse")


def test_a_model_compared_with_itself_differs_in_nothing(pipe, reference, full):
    compared = compare_to(reference, copy.deepcopy(pipe))
    same, none = compared.figures, Interval(0.0, 0.0, 0.0)
    assert same["drift"].values == (0.0, 0.0, 0.0) and same["noise_sqnr_db"].values == (math.inf,) * 3
    assert same["drift"].timesteps == reference.trajectory.timesteps
    assert same["final_error"] == same["final_error_median"] == none
    assert same["psnr"] == Interval(math.inf, math.inf, math.inf) and same["psnr_median"] == math.inf
    assert same["ssim"].value == 1.0
    assert abs(same["fid_to_reference"].distance.value) < 1e-6 and abs(same["kid_to_reference"].distance.value) < 1e-12
    assert same["kid_to_data"] == full["kid_to_data"] and same["legibility"].mean == full["legibility"].mean
    assert same["fid_to_data"] == dataclasses.replace(full["fid_to_data"], change=none) and same["legibility"].change == none
    assert full["fid_to_data"].change is full["legibility"].change is None
    assert torch.equal(compared.pictures, reference.samples.pictures)
    assert full.keys() == {"fid_to_data", "kid_to_data", "legibility"}  # how far it is from itself is no figure


def test_every_figure_is_that_of_the_metric_on_the_samples(pipe, reference, full, worse):
    other = disturbed(pipe, 0.1)
    latents, noise = ([torch.zeros(15, 3, 8, 8) for _ in range(3)] for _ in range(2))

    def keep(indices, result):
        for row, i in enumerate(indices):
            if i < 15:
                latents[result.step][i] = result.sample_after[row]
                noise[result.step][i] = result.noise_prediction[row]

    drawn = sample(other, PROTOCOL, on_step=keep)
    pictures = drawn.pictures
    figures = worse.figures
    for step in range(3):
        assert figures["drift"].values[step] == float(pairs.relative_l2(reference.trajectory.latents[step], latents[step]).mean())
        assert figures["noise_sqnr_db"].values[step] == float(pairs.sqnr_db(reference.trajectory.noise[step], noise[step]).mean())
    errors = pairs.relative_l2(sample(pipe, PROTOCOL).last_samples, drawn.last_samples)
    assert torch.equal(worse.final_errors, errors) and figures["final_error"].value == pytest.approx(
        float(errors.mean()), rel=1e-12
    )
    assert figures["final_error_median"].value == float(np.median(errors.numpy()))
    pooled = pairs.mean_squared_error(reference.samples.pictures, pictures).mean()
    assert figures["psnr"].value == pytest.approx(10 * math.log10(255**2 / float(pooled)))
    assert figures["ssim"].value == pytest.approx(float(pairs.ssim(reference.samples.pictures, pictures).mean()), rel=1e-12)
    extractor = Corners()
    fid = distances.frechet_distance(
        *distances.moments(extractor.features(pictures)), *distances.moments(extractor.features(reference.samples.pictures))
    )
    assert figures["fid_to_reference"].distance.value == pytest.approx(fid, rel=1e-9)
    legibility, to_data = figures["legibility"], figures["fid_to_data"]
    assert legibility.mean.value == pytest.approx(float(extractor.confidence(pictures).mean()))
    assert legibility.change.value == pytest.approx(legibility.mean.value - full["legibility"].mean.value)
    change = to_data.distance.extrapolated - full["fid_to_data"].distance.extrapolated
    assert to_data.change.value == pytest.approx(change) and to_data.change.low < change < to_data.change.high


def test_a_larger_disturbance_is_further_away(pipe, reference, worse):
    better = compare_to(reference, disturbed(pipe, 0.01), name="better")
    near, far = better.figures, worse.figures
    assert near["final_error"].value < 0.5 * far["final_error"].value  # measured 0.12
    assert near["psnr"].value > far["psnr"].value and near["ssim"].value > far["ssim"].value
    assert near["noise_sqnr_db"].values[0] > far["noise_sqnr_db"].values[0] + 10


def test_the_floor_is_full_precision_with_other_noise(pipe, reference, full, worse, data):
    extractor = Corners()
    other = sample(pipe, PROTOCOL, seed=PROTOCOL.floor_seed).pictures
    ours, theirs = (distances.moments(extractor.features(p)) for p in (reference.samples.pictures, other))
    floor = worse.figures["fid_to_reference"].floor.value
    assert floor == pytest.approx(distances.frechet_distance(*ours, *theirs), rel=1e-9) and floor > 0
    features = (extractor.features(p).double() for p in (reference.samples.pictures, other))
    assert worse.figures["kid_to_reference"].floor == distances.kid(*features, "independent")
    to_data = pytest.approx(distances.frechet_distance(*theirs, *distances.moments(data.features)), rel=1e-9)
    assert full["fid_to_data"].floor.value == worse.figures["fid_to_data"].floor.value == to_data


def test_without_features_only_pairs_are_compared(pipe):
    protocol = dataclasses.replace(PROTOCOL, samples=2)
    told = []
    comparison = compare(pipe, disturbed(pipe, 0.1), protocol, name="q", progress=lambda *news: told.append(news))
    pairwise = {"final_error", "final_error_median", "psnr", "psnr_median", "ssim", "drift", "noise_sqnr_db", "accumulation"}
    assert comparison.figures.keys() == pairwise
    assert told == [("full precision", 2, 2), ("q", 2, 2), ("q, step by step", 2, 2)]  # no floor is sampled
    assert comparison.measurement.seconds > 0


def test_an_extractor_need_not_classify(pipe):
    protocol = dataclasses.replace(PROTOCOL, samples=4)
    comparison = compare(pipe, pipe, protocol, features=OnlyFeatures())
    assert "fid_to_reference" in comparison.figures and not {"legibility", "fid_to_data"} & comparison.figures.keys()


def test_latent_models_are_compared_by_their_latents(tmp_path):
    pipe = pipelines.ldm()
    comparison = compare(pipe, disturbed(pipe, 0.1), SamplingProtocol(samples=3, steps=2, batch_size=2))
    drift = comparison.figures["drift"].values
    assert len(drift) == 2 and drift[-1] > 0
    # all three samples fit in the kept trajectories, so the last drift is the final error
    assert comparison.figures["final_error"].value == pytest.approx(drift[-1])


def test_non_finite_samples_are_named_by_step(pipe, reference):
    broken = copy.deepcopy(pipe)
    calls = []

    def poison(module, args, output):
        calls.append(None)
        if len(calls) == 2:
            output.sample[1] = math.nan

    broken.unet.register_forward_hook(poison)
    with pytest.raises(EvaluationError, match=r"w2a2: step 1 \(timestep 333\): 1 of 10 samples hold non-finite values"):
        compare_to(reference, broken, name="w2a2")
    calls.clear()
    with pytest.raises(EvaluationError, match=r"full precision: step 1"):
        run_reference(broken, PROTOCOL)


def test_another_scheduler_is_refused(pipe, reference):
    other = copy.deepcopy(pipe)
    other.scheduler = DDIMScheduler(beta_end=0.03)
    with pytest.raises(EvaluationError, match=r"q: its scheduler differs: beta_end 0.03 \(full precision: 0.02\)"):
        compare_to(reference, other, name="q")


def test_trajectories_beyond_the_memory_limit_are_refused(pipe, monkeypatch):
    monkeypatch.setattr(observers, "MEMORY_LIMIT", 3 * 2 * 192 * 4 * 14)  # 3 steps, latents and noise, 192 float32, 14 samples
    with pytest.raises(EvaluationError, match=r"trajectory_samples: the steps of 15 samples take .*; at most 14 samples fit"):
        run_reference(pipe, PROTOCOL)
    run_reference(pipe, dataclasses.replace(PROTOCOL, samples=2, trajectory_samples=14))


def test_data_without_an_extractor_are_refused(pipe, data):
    with pytest.raises(EvaluationError, match="data: statistics are given without an extractor"):
        run_reference(pipe, PROTOCOL, data=data)


def test_noisy_samples_are_compared_on_the_way(pipe, reference, worse):
    by_step = worse.figures["fid_by_step"]
    assert [at.steps for at in by_step] == sorted(reference.samples.noisy) == [1, 2]
    for at in by_step:
        assert at.floor == reference.prepared["fid_by_step"][at.steps]
        assert at.distance.value > 0


def test_a_reference_that_cannot_be_replayed_is_compared_without(monkeypatch):
    def refuse(pipe, protocol):
        raise CalibrationError("DDIMPipeline with DDIMScheduler: no")

    monkeypatch.setattr(accumulation, "trace", refuse)
    pipe = pipelines.micro()
    reference = run_reference(pipe, dataclasses.replace(PROTOCOL, samples=8, trajectory_samples=8))
    assert reference.prepared["accumulation"] is None
    assert "accumulation" not in compare_to(reference, pipe).figures


def test_trajectories_of_another_size(tmp_path):
    protocol = SamplingProtocol(samples=2, steps=2, trajectory_samples=2, accumulation_samples=2, height=16, width=8)
    pixels = run_reference(pipelines.micro(), protocol)
    rollout = pixels.prepared["accumulation"]
    assert rollout.data.step(torch.zeros(1, dtype=torch.long), 0).sample.shape[2:] == (16, 8)
    latents = run_reference(pipelines.stable_diffusion(tmp_path), protocol)
    assert latents.prepared["accumulation"] is None  # recorded at the pipeline's own size only


def test_what_was_asked_for_is_the_same_on_both_sides_and_counted():
    """A pipeline's default labels go into the protocol, whatever the other pipeline's defaults are."""
    pipe = pipelines.dit()
    pipe.register_to_config(id2label={"0": "A", "1": "B", "2": "C"})
    protocol = SamplingProtocol(samples=6, steps=2, batch_size=6, trajectory_samples=2, accumulation_samples=0)
    reference = run_reference(pipe, protocol, features=Corners())
    assert reference.protocol.sampling.class_labels == (0, 1, 2, 0, 1, 2)
    assert measure_reference(reference).figures["accuracy"].value == pytest.approx(1 / 3)
    other = pipelines.dit()  # names no classes: would take others
    figures = compare_to(reference, other).figures
    assert figures["final_error"].value == 0.0 and figures["accuracy"].value == pytest.approx(1 / 3)
