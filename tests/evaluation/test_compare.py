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
from diffquant.evaluation import distances, metrics, observers
from diffquant.evaluation import reference as references
from diffquant.evaluation.compare import compare, compare_to, final_error_ratio
from diffquant.evaluation.features import DataStatistics
from diffquant.evaluation.reference import run_reference
from diffquant.evaluation.sampling import sample
from diffquant.evaluation.sampling_protocol import SamplingProtocol
from tests import pipelines

PROTOCOL = SamplingProtocol(samples=24, steps=3, batch_size=10, seed=3, trajectory_samples=15, accumulation_samples=4)


class Corners:
    """Four pixels as features, and a classifier that is sure of nothing."""

    name = "corners"
    sha256 = "c0"

    def features(self, pictures):
        return pictures[:, 0, ::7, ::7].flatten(1).float() / 255

    def confidence(self, pictures):
        return metrics.confidence(self.features(pictures))

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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
def worse(pipe, reference):
    return compare_to(reference, disturbed(pipe, 0.1), name="worse")


def test_a_model_compared_with_itself_differs_in_nothing(pipe, reference):
    same = compare_to(reference, copy.deepcopy(pipe))
    assert same.drift == (0.0, 0.0, 0.0) and same.noise_sqnr_db == (math.inf,) * 3
    assert same.final_error == same.final_error_median == metrics.Interval(0.0, 0.0, 0.0)
    assert same.psnr == metrics.Interval(math.inf, math.inf, math.inf) and same.psnr_median == math.inf
    assert same.ssim.value == 1.0
    assert abs(same.to_reference.fid.value) < 1e-6 and abs(same.to_reference.kid.value) < 1e-12
    assert same.to_data == reference.to_data and same.legibility == reference.legibility
    assert same.legibility_change == same.to_data_change == metrics.Interval(0.0, 0.0, 0.0)
    assert torch.equal(same.pictures, reference.pictures)


def test_every_figure_is_that_of_the_metric_on_the_samples(pipe, reference, worse):
    other = disturbed(pipe, 0.1)
    latents, noise = ([torch.zeros(15, 3, 8, 8) for _ in range(3)] for _ in range(2))

    def keep(indices, result):
        for row, i in enumerate(indices):
            if i < 15:
                latents[result.step][i] = result.sample_after[row]
                noise[result.step][i] = result.noise_prediction[row]

    drawn = sample(other, PROTOCOL, on_step=keep)
    pictures = drawn.pictures
    for step in range(3):
        assert worse.drift[step] == float(metrics.relative_l2(reference.trajectory.latents[step], latents[step]).mean())
        assert worse.noise_sqnr_db[step] == float(metrics.sqnr_db(reference.trajectory.noise[step], noise[step]).mean())
    errors = metrics.relative_l2(sample(pipe, PROTOCOL).last_samples, drawn.last_samples)
    assert torch.equal(worse.final_errors, errors) and worse.final_error.value == float(errors.mean())
    assert worse.final_error_median.value == float(np.median(errors.numpy()))
    pooled = metrics.mean_squared_error(reference.pictures, pictures).mean()
    assert worse.psnr.value == pytest.approx(10 * math.log10(255**2 / float(pooled)))
    assert worse.ssim.value == float(metrics.ssim(reference.pictures, pictures).mean())
    extractor = Corners()
    fid = distances.frechet_distance(
        *distances.moments(extractor.features(pictures)), *distances.moments(extractor.features(reference.pictures))
    )
    assert worse.to_reference.fid.value == pytest.approx(fid, rel=1e-9)
    assert worse.legibility.value == pytest.approx(float(extractor.confidence(pictures).mean()))
    assert worse.legibility_change.value == pytest.approx(worse.legibility.value - reference.legibility.value)
    change = worse.to_data.fid.extrapolated - reference.to_data.fid.extrapolated
    assert worse.to_data_change.value == pytest.approx(change) and worse.to_data_change.low < change < worse.to_data_change.high


def test_a_larger_disturbance_is_further_away(pipe, reference, worse):
    better = compare_to(reference, disturbed(pipe, 0.01), name="better")
    assert better.final_error.value < 0.5 * worse.final_error.value  # measured 0.12
    assert better.psnr.value > worse.psnr.value and better.ssim.value > worse.ssim.value
    assert better.noise_sqnr_db[0] > worse.noise_sqnr_db[0] + 10
    ratio = final_error_ratio(better, worse)
    assert ratio.low <= ratio.value <= ratio.high < 1
    assert ratio.value == pytest.approx(better.final_error.value / worse.final_error.value)


def test_the_floor_is_full_precision_with_other_noise(pipe, reference, data):
    extractor = Corners()
    other = sample(pipe, PROTOCOL, seed=PROTOCOL.floor_seed).pictures
    ours, theirs = (distances.moments(extractor.features(p)) for p in (reference.pictures, other))
    assert reference.floor.fid.value == pytest.approx(distances.frechet_distance(*ours, *theirs), rel=1e-9)
    assert reference.floor.fid.value > 0
    assert reference.floor_to_data.fid.value == pytest.approx(
        distances.frechet_distance(*theirs, *distances.moments(data.features)), rel=1e-9
    )


def test_without_features_only_pairs_are_compared(pipe):
    protocol = dataclasses.replace(PROTOCOL, samples=2)
    told = []
    found = compare(pipe, disturbed(pipe, 0.1), protocol, name="q", progress=lambda *news: told.append(news))
    assert found.to_reference is found.to_data is found.legibility is None
    assert told == [("full precision", 2, 2), ("q", 2, 2), ("q, step by step", 2, 2)]  # no floor is sampled
    assert found.seconds > 0


def test_an_extractor_need_not_classify(pipe):
    protocol = dataclasses.replace(PROTOCOL, samples=4)
    found = compare(pipe, pipe, protocol, features=OnlyFeatures())
    assert found.legibility is None and found.to_reference is not None and found.to_data is None


def test_latent_models_are_compared_by_their_latents(tmp_path):
    pipe = pipelines.ldm()
    found = compare(pipe, disturbed(pipe, 0.1), SamplingProtocol(samples=3, steps=2, batch_size=2))
    assert len(found.drift) == 2 and found.drift[-1] > 0
    # all three samples fit in the kept trajectories, so the last drift is the final error
    assert found.final_error.value == pytest.approx(found.drift[-1])


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


def test_ratios_of_different_runs_are_refused(pipe, worse):
    other = compare(pipe, pipe, dataclasses.replace(PROTOCOL, samples=2))
    with pytest.raises(EvaluationError, match="final_error_ratio: 2 and 24 samples"):
        final_error_ratio(other, worse)


def test_noisy_samples_are_compared_on_the_way(reference, worse):
    assert [at.steps for at in worse.by_step] == sorted(reference.step_features) == [1, 2]
    for at in worse.by_step:
        assert at.floor == reference.step_features[at.steps][1]
        assert at.to_reference.fid.value > 0


def test_a_reference_that_cannot_be_replayed_says_why(monkeypatch):
    def refuse(pipe, protocol):
        raise CalibrationError("DDIMPipeline with DDIMScheduler: no")

    monkeypatch.setattr(references, "trace", refuse)
    pipe = pipelines.micro()
    reference = run_reference(pipe, dataclasses.replace(PROTOCOL, samples=8, trajectory_samples=8))
    assert reference.traced is None and reference.untraced == "DDIMPipeline with DDIMScheduler: no"
    assert compare_to(reference, pipe).accumulation is None


def test_trajectories_of_another_size(tmp_path):
    protocol = SamplingProtocol(samples=2, steps=2, trajectory_samples=2, accumulation_samples=2, height=16, width=8)
    pixels = run_reference(pipelines.micro(), protocol)
    assert pixels.traced is not None and pixels.traced.data.step(torch.zeros(1, dtype=torch.long), 0).sample.shape[2:] == (16, 8)
    latents = run_reference(pipelines.stable_diffusion(tmp_path), protocol)
    assert latents.traced is None and "recorded at the pipeline's own size only" in str(latents.untraced)


def test_what_was_asked_for_is_the_same_on_both_sides_and_counted():
    """A pipeline's default labels go into the protocol, whatever the other pipeline's defaults are."""
    pipe = pipelines.dit()
    pipe.register_to_config(id2label={"0": "A", "1": "B", "2": "C"})
    protocol = SamplingProtocol(samples=6, steps=2, batch_size=6, trajectory_samples=2, accumulation_samples=0)
    reference = run_reference(pipe, protocol, features=Corners())
    assert reference.protocol.class_labels == (0, 1, 2, 0, 1, 2) and reference.accuracy.value == pytest.approx(1 / 3)
    other = pipelines.dit()  # names no classes: would take others
    result = compare_to(reference, other)
    assert result.final_error.value == 0.0 and result.accuracy.value == pytest.approx(1 / 3)
