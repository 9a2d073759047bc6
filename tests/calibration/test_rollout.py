"""Replay of recorded stretches through stock pipelines and schedulers, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffquant.calibration import rollout as module
from diffquant.calibration.record import record
from diffquant.calibration.rollout import Rollout
from diffquant.errors import CalibrationError
from diffquant.host.conditions import Calibration
from diffquant.host.pipeline import Host
from diffquant.host.scheduler import restore, snapshot
from tests import pipelines

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SMALL = Calibration(samples=3, batch_size=2, steps=4, seed=1)
PIPELINES = (
    "ddim",
    "ddpm",
    "ldm",
    "dit",
    "stable_diffusion",
    "stable_diffusion_2",
    "stable_diffusion_xl",
    "pixart",
    "stable_diffusion_3",
    "flux",
    "cogvideox",
)
SCHEDULERS = (
    PNDMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)


def recorded_with(kind, **options):
    pipe = pipelines.micro()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    return pipe, record(pipe, dataclasses.replace(SMALL, steps=6), run=pipelines.own_loop, progress=False)


def worst(rollout: Rollout, length: int = 3) -> float:
    """The largest relative distance of any replayed segment's end from the recorded latent."""
    distances = []
    for segment in rollout.segments(length):
        chain = rollout.chain(torch.tensor([2, 0]), segment)
        wanted = chain.recorded(len(segment))
        distances.append(float((chain.run()[0][-1] - wanted).norm() / wanted.norm()))
    return max(distances)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_stock_pipeline_is_replayed_as_recorded(name, tmp_path):
    pipe = pipelines.build(name, tmp_path)
    rollout = Rollout(Host(pipe).denoiser, record(pipe, SMALL, progress=False))
    rollout.verify()
    assert worst(rollout) < 1e-4


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_with_a_history_or_noise_is_replayed_as_recorded(kind):
    pipe, data = recorded_with(kind)
    rollout = Rollout(pipe.unet, data)
    rollout.verify()
    assert rollout._stateful == (kind in (PNDMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler))
    assert rollout._stochastic == (kind is EulerAncestralDiscreteScheduler)
    assert worst(rollout) < 1e-4


def test_a_multistep_history_is_that_of_the_recorded_trajectory(monkeypatch):
    pipe, data = recorded_with(DPMSolverMultistepScheduler)
    rollout = Rollout(pipe.unet, data)
    monkeypatch.setattr(rollout, "_stateful", False)  # as if there were nothing to remember
    assert worst(rollout) > 1e-3


def test_the_guidance_weight_is_read_off_the_recording(tmp_path):
    pipe = pipelines.stable_diffusion(tmp_path)
    data = record(pipe, dataclasses.replace(SMALL, guidance_scale=3.25), progress=False)
    assert Rollout(pipe.unet, data).guidance == [3.25] * SMALL.steps


def test_a_combination_of_halves_that_is_not_linear_is_refused(tmp_path):
    def rescaled(pipe, generator, batch):
        pipe(["a"] * batch, num_inference_steps=4, guidance_rescale=0.7, generator=generator, output_type="latent")

    pipe = pipelines.stable_diffusion(tmp_path)
    data = record(pipe, SMALL, run=rescaled, progress=False)
    with pytest.raises(CalibrationError, match=r"StableDiffusionPipeline with DDIMScheduler: the guided prediction of step 0 is"):
        Rollout(pipe.unet, data)


def test_injected_noise_is_that_of_the_recording(monkeypatch):
    pipe = pipelines.micro()
    data = record(pipe, dataclasses.replace(SMALL, eta=1.0), progress=False)
    assert data.step(torch.tensor([0]), 0).options["eta"] == 1.0
    rollout = Rollout(pipe.unet, data)
    rollout.verify()
    assert worst(rollout, 4) < 1e-4
    monkeypatch.setattr(module.Chain, "_noise", lambda chain, i: torch.randn(2, 3, 8, 8))
    with pytest.raises(CalibrationError, match="replayed from the recording"):
        rollout.verify()


def test_eta_reaches_the_replayed_step():
    pipe = pipelines.micro()
    run = functools.partial(pipelines.own_loop, eta=1.0)
    run.__qualname__ = "own_loop"
    data = record(pipe, dataclasses.replace(SMALL, steps=6), run=run, progress=False)
    chain = Rollout(pipe.unet, data).chain(torch.tensor([0]), range(2, 4))
    step = chain._recorded_step(0)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(6)
    for eta, equal in ((1.0, True), (0.0, False)):
        mean = scheduler.step(step.model_output, step.timestep, step.sample, eta=eta, variance_noise=torch.zeros(1)).prev_sample
        assert torch.allclose(step.prev_sample - mean, chain._noise(0), atol=1e-6) == equal


def test_the_timetable_is_the_one_that_the_pipeline_asked_for(tmp_path):
    """Flux shifts its sigmas by the number of image tokens; `set_timesteps` is told so, the configuration is not."""
    pipe = pipelines.flux(tmp_path)
    data = record(pipe, SMALL, progress=False)
    assert data.timetable["sigmas"] == [1.0, 0.75, 0.5, 0.25] and 0.4 < data.timetable["mu"] < 0.5
    assert data.timesteps == [float(timestep / 1000) for timestep in Rollout(pipe.transformer, data).scheduler.timesteps]


def test_true_guidance_of_a_distilled_model_is_refused(tmp_path):
    def run(pipe, generator, batch):
        prompts = {"prompt": ["a"] * batch, "negative_prompt": ["b"] * batch, "true_cfg_scale": 2.0}
        pipe(**prompts, num_inference_steps=4, generator=generator, output_type="latent")

    pipe = pipelines.flux(tmp_path)
    data = record(pipe, SMALL, run=run, progress=False)
    with pytest.raises(CalibrationError, match=r"FluxPipeline with FlowMatchEulerDiscreteScheduler: 8 calls .* for 4 steps"):
        Rollout(pipe.transformer, data)


def test_a_scheduler_that_steps_otherwise_is_not_taken_for_noise():
    pipe, data = recorded_with(DDIMScheduler)
    data.manifest["scheduler"]["config"]["beta_end"] = 0.03
    with pytest.raises(CalibrationError, match="DDIMScheduler: the scheduler's own step 0 ends .* away from what was recorded"):
        Rollout(pipe.unet, data)


def test_the_quantized_model_takes_the_chain_of_full_precision():
    pipe, data = recorded_with(DDIMScheduler)
    rollout = Rollout(pipe.unet, data)
    other = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        other.conv_out.weight.mul_(1.5)
    chain = rollout.through(other).chain(torch.tensor([0]), range(2))
    assert chain.rollout.model is other
    assert not torch.allclose(chain.run()[0][-1], chain.recorded(2), rtol=1e-2)


def test_segments_are_consecutive_and_cover_all_steps():
    pipe, data = recorded_with(DDIMScheduler)
    assert Rollout(pipe.unet, data).segments(4) == [range(0, 4), range(4, 6)]


def test_a_model_that_is_called_twice_a_step_is_refused():
    def twice(pipe, generator, batch):
        sample = torch.randn(batch, 3, 8, 8, generator=generator)
        pipe.scheduler.set_timesteps(4)
        for timestep in pipe.scheduler.timesteps:
            pipe.unet(sample, timestep)
            sample = pipe.scheduler.step(pipe.unet(sample, timestep).sample, timestep, sample).prev_sample

    pipe = pipelines.micro()
    data = record(pipe, SMALL, run=twice, progress=False)
    with pytest.raises(CalibrationError, match=r"DDIMPipeline with DDIMScheduler: 8 calls .* for 4 steps; only one call a step"):
        Rollout(pipe.unet, data)


def test_timesteps_that_the_scheduler_would_not_choose_are_refused():
    def every_other(pipe, generator, batch):
        sample = torch.randn(batch, 3, 8, 8, generator=generator)
        pipe.scheduler.set_timesteps(8)
        for timestep in pipe.scheduler.timesteps[::2]:
            sample = pipe.scheduler.step(pipe.unet(sample, timestep).sample, timestep, sample).prev_sample

    pipe = pipelines.micro()
    with pytest.raises(CalibrationError, match="timesteps are not those of the scheduler's set_timesteps"):
        Rollout(pipe.unet, record(pipe, SMALL, run=every_other, progress=False))


def test_a_restored_state_does_not_share_its_lists():
    scheduler = PNDMScheduler()
    scheduler.set_timesteps(4)
    state = snapshot(scheduler)
    scheduler.ets.append(torch.ones(1))
    assert state["ets"] == []
    restore(scheduler, state)
    scheduler.ets.append(torch.ones(1))
    assert state["ets"] == []
