"""The same noise whatever the batch size, every sampler, and agreement with the stock pipelines."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LDMPipeline

from diffquant.errors import EvaluationError, SpecError
from diffquant.host.scheduler import SCHEDULERS
from diffquant.sampling.pictures import to_uint8
from diffquant.sampling.protocol import SamplingProtocol, scheduler_of
from diffquant.sampling.sample import initial_noise, sample, sample_generators, sample_unconditional
from tests import pipelines

# diffusers 0.42.1 hands a torch tensor to numpy.array in set_timesteps of Euler, DPM-Solver++ and UniPC
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TINY = SamplingProtocol(samples=3, steps=3, batch_size=2, seed=5)


@pytest.fixture(scope="module")
def ddim():
    return pipelines.ddim()


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    whole = initial_noise((1, 4, 4), 7, range(5))
    parts = torch.cat([initial_noise((1, 4, 4), 7, part) for part in (range(2), range(2, 3), range(3, 5))])
    assert torch.equal(whole, parts)
    assert len({tuple(noise.flatten().tolist()) for noise in whole}) == 5
    assert not torch.equal(whole, initial_noise((1, 4, 4), 8, range(5)))


def test_noise_is_standard_normal():
    noise = initial_noise((4, 32, 32), 0, range(8)).double()
    assert abs(float(noise.mean())) < 4 / noise.numel() ** 0.5
    assert float(noise.var()) == pytest.approx(1, abs=4 * (2 / noise.numel()) ** 0.5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_loop_is_that_of_the_stock_pipeline(ddim, eta):
    ddim.set_progress_bar_config(disable=True)
    protocol = SamplingProtocol(samples=2, steps=3, batch_size=2, seed=5, eta=eta)
    stock = ddim(batch_size=2, generator=sample_generators(5, range(2)), eta=eta, num_inference_steps=3, output_type="np").images
    drawn = sample(ddim, protocol)
    assert np.array_equal(stock, (drawn.last_samples / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
    assert torch.equal(drawn.pictures, to_uint8(drawn.last_samples))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_do_not_depend_on_the_batch_size(ddim, eta):
    drawn = [sample(ddim, SamplingProtocol(samples=3, steps=3, batch_size=size, eta=eta)).last_samples for size in (1, 3)]
    assert torch.allclose(*drawn, atol=1e-4)  # convolutions round differently at another batch size; noise would differ by 1


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_every_sampler_runs(ddim, sampler):
    steps = []
    protocol = SamplingProtocol(samples=3, steps=4, batch_size=2, sampler=sampler)
    drawn = sample(ddim, protocol, on_step=lambda indices, result: steps.append((indices, result)))
    assert drawn.pictures.shape == drawn.last_samples.shape == (3, 3, 8, 8)
    assert torch.isfinite(drawn.last_samples).all() and drawn.pictures.dtype == torch.uint8 and drawn.seconds > 0
    assert type(ddim.scheduler) is DDIMScheduler  # the pipeline has its own again
    first = [result for indices, result in steps if indices == range(2)]
    assert [result.step for result in first] == list(range(len(first))) and len(first) >= 4
    for before, after in itertools.pairwise(first):
        assert torch.equal(before.sample_after, after.sample_before)
    assert torch.equal(first[-1].sample_after, drawn.last_samples[:2])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_injected_noise_is_the_same_for_two_models(sampler):
    """A denoiser that predicts nothing and one that predicts ones: their difference is deterministic where noise is shared."""

    def samples_after(prediction, seed):
        class Constant(torch.nn.Module):
            def forward(self, sample, timestep):
                return type("Output", (), {"sample": torch.full_like(sample, prediction)})

        scheduler = SCHEDULERS[sampler](num_train_timesteps=50, clip_sample=False)
        generators = sample_generators(seed, range(2))
        noise = torch.stack([torch.randn(1, 4, 4, generator=generator) for generator in generators]).double()
        eta = 1.0 if sampler == "ddim" else 0.0
        return [result.sample_after for result in sample_unconditional(Constant(), scheduler, noise, 5, eta, generators)]

    shared = [a - b for a, b in zip(samples_after(0.0, 3), samples_after(1.0, 3), strict=True)]
    other = [a - b for a, b in zip(samples_after(0.0, 3), samples_after(1.0, 4), strict=True)]
    assert all(float(difference.std()) < 1e-5 for difference in shared)  # the same in every pixel
    assert all(float(difference.std()) > 0.1 for difference in other)


def test_noise_is_scaled_to_the_scheduler(ddim):
    protocol = SamplingProtocol(samples=1, steps=3, sampler="euler", seed=2)
    steps = []
    sample(ddim, protocol, on_step=lambda indices, result: steps.append(result))
    with scheduler_of(ddim, protocol) as scheduler:
        scheduler.set_timesteps(3)
        sigma = scheduler.init_noise_sigma
    assert float(sigma) > 1.5
    assert torch.equal(steps[0].sample_before, initial_noise((3, 8, 8), 2, range(1)) * sigma)


@pytest.mark.parametrize("name", ["ldm", "dit", "stable_diffusion"])
def test_other_pipelines_run_their_own_call(name, tmp_path):
    pipe = getattr(pipelines, name)(tmp_path) if name == "stable_diffusion" else getattr(pipelines, name)()
    steps = []
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn = sample(pipe, TINY, on_step=lambda indices, result: steps.append((indices, result)))
    assert torch.equal(torch.get_rng_state(), before)
    assert "step" not in vars(pipe.scheduler)
    assert drawn.pictures.shape[:2] == (3, 3) and drawn.pictures.dtype == torch.uint8
    channels = 4 if name != "ldm" else 3
    assert [len(indices) for indices, _ in steps] == [2, 2, 2, 1, 1, 1]
    assert torch.equal(steps[0][1].sample_before, initial_noise((channels, 8, 8), 5, range(2)))
    assert torch.equal(steps[3][1].sample_before, initial_noise((channels, 8, 8), 5, range(2, 3)))
    assert torch.equal(steps[-1][1].sample_after, drawn.last_samples[2:])


def test_other_sizes_are_asked_for(ddim, tmp_path):
    protocol = SamplingProtocol(samples=1, steps=2, height=16, width=8)
    assert sample(ddim, protocol).last_samples.shape == (1, 3, 16, 8)
    latent = pipelines.stable_diffusion(tmp_path)
    own = sample(latent, SamplingProtocol(samples=1, steps=2))
    height, width = (2 * side for side in own.pictures.shape[2:])
    drawn = sample(latent, SamplingProtocol(samples=1, steps=2, height=height, width=width // 2))
    assert drawn.pictures.shape[2:] == (height, width // 2)
    assert drawn.last_samples.shape[2:] == (2 * own.last_samples.shape[2], own.last_samples.shape[3])
    with pytest.raises(EvaluationError, match="protocol.width: is 15; UNet2DModel takes multiples of 2"):
        sample(ddim, SamplingProtocol(samples=1, steps=2, height=8, width=15))
    with pytest.raises(EvaluationError, match="StableDiffusionPipeline: `height` and `width` have to be divisible by 8"):
        sample(latent, SamplingProtocol(samples=1, steps=2, height=15, width=16))
    with pytest.raises(EvaluationError, match="DiTPipeline: does not take height"):
        sample(pipelines.dit(), SamplingProtocol(samples=1, steps=2, height=16, width=16))
    with pytest.raises(EvaluationError, match=r"protocol.width: is 0; at least 1 is allowed"):
        SamplingProtocol(height=8, width=0)
    with pytest.raises(EvaluationError, match=r"protocol.height, width: are 8 and None; give both, or neither"):
        SamplingProtocol(height=8)


@pytest.mark.parametrize(("raised", "error"), [(SpecError("x: no"), SpecError), (RuntimeError("no"), EvaluationError)])
def test_what_a_call_refuses_is_one_line(raised, error, tmp_path):
    pipe = pipelines.stable_diffusion(tmp_path)

    def refuse(*arguments):
        raise raised

    pipe.unet.register_forward_pre_hook(refuse)
    with pytest.raises(error, match="^x: no$" if error is SpecError else "^StableDiffusionPipeline: no$"):
        sample(pipe, SamplingProtocol(samples=1, steps=2))


def test_injected_noise_of_a_pipeline_without_generator_repeats():
    pipe = pipelines.ldm()
    protocol = SamplingProtocol(samples=2, steps=3, batch_size=2, eta=1.0)
    torch.manual_seed(1)
    first = sample(pipe, protocol).last_samples
    torch.manual_seed(2)
    assert torch.equal(first, sample(copy.deepcopy(pipe), protocol).last_samples)
    assert not torch.equal(first, sample(pipe, SamplingProtocol(samples=2, steps=3, batch_size=2)).last_samples)


def test_a_pipelines_other_scheduler_is_used_and_given_back():
    pipe = pipelines.ldm()
    with scheduler_of(pipe, SamplingProtocol(sampler="dpm-solver++")) as scheduler:
        assert type(scheduler) is type(pipe.scheduler) is DPMSolverMultistepScheduler
    assert isinstance(pipe, LDMPipeline) and type(pipe.scheduler) is DDIMScheduler


@pytest.mark.parametrize("sampler", ["pipeline", "ddpm"])
def test_clipping_as_asked(ddim, sampler):
    for clip, expected in [(None, True), (True, True), (False, False)]:
        with scheduler_of(ddim, replace(TINY, sampler=sampler, clip_sample=clip)) as scheduler:
            assert scheduler.config.clip_sample is expected


def test_clipping_with_a_scheduler_that_cannot(ddim):
    own = ddim.scheduler
    with scheduler_of(ddim, replace(TINY, sampler="euler", clip_sample=False)) as scheduler:
        assert type(scheduler) is SCHEDULERS["euler"]
    with (
        pytest.raises(EvaluationError, match="protocol.clip_sample: is true; EulerDiscreteScheduler"),
        scheduler_of(ddim, replace(TINY, sampler="euler", clip_sample=True)),
    ):
        pass
    assert ddim.scheduler is own


def test_progress_is_told():
    told = []
    sample(pipelines.ddpm(), TINY, progress=lambda *news: told.append(news), name="ddpm")
    assert told == [("ddpm", 2, 3), ("ddpm", 3, 3)]


@pytest.mark.parametrize("name", ["stable_diffusion_2", "stable_diffusion_xl", "pixart", "stable_diffusion_3", "flux"])
def test_text_to_image_pipelines_give_pictures(name, tmp_path):
    pipe = pipelines.build(name, tmp_path)
    steps = []
    drawn = sample(pipe, SamplingProtocol(samples=2, steps=2), on_step=lambda indices, result: steps.append(result.timestep))
    assert drawn.pictures.shape[:2] == (2, 3) and drawn.pictures.dtype == torch.uint8
    assert len(steps) == 2 and steps[0] > steps[1] > 0


def test_another_sampler_for_a_flow_matching_model_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match='sampler: is "ddim"; StableDiffusion3Pipeline is a flow-matching model; use sampler'):
        sample(pipelines.stable_diffusion_3(tmp_path), SamplingProtocol(samples=1, sampler="ddim"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, r"protocol.samples: is 0; at least 1 is allowed"),
        ({"sampler": "heun"}, r'protocol.sampler: is "heun"; allowed: pipeline, ddim'),
        ({"eta": 1.5}, r"protocol.eta: is 1.5; it must lie in \[0, 1\]"),
        ({"prompts": ()}, r"protocol.prompts: is empty"),
    ],
)
def test_impossible_protocols_are_refused(arguments, message):
    with pytest.raises(EvaluationError, match=message):
        SamplingProtocol(**arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ddim", {"sampler": "euler", "eta": 0.5}, r"protocol.eta: is 0.5; EulerDiscreteScheduler takes none"),
        ("ddim", {"class_labels": (1,)}, r"protocol.class_labels: is given, but DDIMPipeline is unconditional"),
        ("ddim", {"steps": 2000}, r"protocol.steps: is 2000; DDIMScheduler has 1000 timesteps"),
        ("dit", {"prompts": ("a",)}, r"DiTPipeline: does not take prompt"),
        (
            "dit",
            {"class_labels": (1,), "sampler": "euler"},
            r"noise of deviation .*, where EulerDiscreteScheduler expects 157",
        ),
        ("ldm", {"sampler": "unipc", "eta": 0.5}, r"protocol.eta: is 0.5; UniPCMultistepScheduler takes none"),
    ],
)
def test_protocols_that_a_pipeline_cannot_follow_are_refused(name, arguments, message):
    with pytest.raises(EvaluationError, match=message):
        sample(getattr(pipelines, name)(), SamplingProtocol(samples=1, **arguments))
