"""Corrections on `scheduler.step`: hand-computed cases, the identity without noise, state, schedulers, guidance, checkpoints."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from torch import nn

import diffquant as dq
import pipelines
from diffquant.calibration import fit
from diffquant.core.correction import Coefficients, NoiseEstimate, Proportional
from diffquant.core.model import enable
from diffquant.core.spec import LayerRule
from diffquant.errors import SpecError
from diffquant.host.denoiser import give_correction, prepare
from diffquant.host.scheduler import as_noise, from_noise
from diffquant.host.structure import plan
from diffquant.methods.noise_correction import FitCoefficients, FitProportional, RuntimeNoiseEstimate, checked, predictions
from diffquant.methods.ranges import CalibrateRanges
from diffquant.sampling.correction import Attachment, _StepCall, attach, attachment_of, detach
from diffquant.sampling.sample import sample, sample_unconditional

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 10
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "pndm": lambda: PNDMScheduler(skip_prk_steps=True),
    "dpm-solver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


class Biased(nn.Module):
    """Predicts sqrt(1 - level) x + c: right for a standard normal distribution, but for the constant."""

    def __init__(self, scheduler: Any, constant: float) -> None:
        super().__init__()
        self.levels, self.constant, self.calls, self.begins = scheduler.alphas_cumprod, constant, 0, torch.inf
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, sample: torch.Tensor, timestep: Any) -> Any:
        self.calls += 1
        constant = self.constant if float(timestep) <= self.begins else 0.0
        return SimpleNamespace(sample=(1 - self.levels[int(timestep)]) ** 0.5 * sample + constant)


def drawn(denoiser: nn.Module, scheduler: Any, noise: torch.Tensor, seed: int = 1, steps: int = STEPS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    *_, last = sample_unconditional(denoiser, scheduler, noise, steps, generator=generator)
    return last.sample_after


def noise(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [50, 51])
def test_when_the_noise_is_estimated(steps):
    assert list(NoiseEstimate(interval=10).refreshes(steps)) == [7, 17, 27, 37, 47]
    assert list(NoiseEstimate().refreshes(steps)) == [7, 17, 27, 37, 47]
    assert list(NoiseEstimate(interval=200).refreshes(steps)) == []


def test_a_constant_error_as_computed_by_hand():
    """For eps = sqrt(1 - a_t) x + c the estimate is c (a_t + sqrt(r (1 - a_t) (1 - a_prev))); 0.691762 c from 0.25 to 0.49."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(2)
    scheduler.alphas_cumprod[scheduler.timesteps[0]], scheduler.alphas_cumprod[scheduler.timesteps[1]] = 0.25, 0.49
    denoiser = Biased(scheduler, 0.3).double()
    attached = Attachment(denoiser, scheduler, NoiseEstimate())
    x = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    output = denoiser(x, scheduler.timesteps[0]).sample
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    denoiser.levels = scheduler.alphas_cumprod
    attached._number = 1
    call = _StepCall(output, scheduler.timesteps[0], x, (), {"use_clipped_model_output": False})
    estimate = attached._estimate(NoiseEstimate(), call)
    # the step's result from x = 0 is B c with B = sqrt(1 - a_prev) - sqrt(a_prev (1 - a_t) / a_t)
    after = (0.51**0.5 - (0.49 * 0.75 / 0.25) ** 0.5) * 0.3
    clipped = scheduler.config.clip_sample
    assert clipped  # the predicted sample, -sqrt(3) * 0.3, lies inside the clip
    ratio = 0.25 / 0.49
    assert float(estimate) == pytest.approx(0.75**0.5 * ratio**0.5 * after + 0.3, abs=1e-6)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_an_estimator_without_refreshes_changes_nothing(kind):
    scheduler = SCHEDULERS[kind]()
    denoiser = Biased(scheduler, 0.1)
    plain = drawn(denoiser, scheduler, noise())
    attached = Attachment(denoiser, scheduler, NoiseEstimate(interval=100))
    assert torch.equal(drawn(denoiser, scheduler, noise()), plain) and attached.extra_calls == 0
    attached.detach()
    assert "step" not in vars(scheduler) and "set_timesteps" not in vars(scheduler) and not denoiser._forward_hooks


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_an_error_that_begins_where_it_is_estimated_is_found(kind):
    """Latents have no mean until then, so the estimate is the constant error, times a number near 1 that depends on the levels."""
    scheduler = SCHEDULERS[kind]()
    scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(50)
    (refresh,) = NoiseEstimate(interval=40).refreshes(len(scheduler.timesteps))
    denoiser = Biased(scheduler, 1.0)
    denoiser.begins = float(scheduler.timesteps[refresh])
    attached = Attachment(denoiser, scheduler, NoiseEstimate(interval=40))
    start = noise(8)
    drawn(denoiser, scheduler, start - start.mean(dim=(1, 2, 3), keepdim=True), steps=50)
    assert 0.75 < float(attached._held.mean()) < 1.05
    assert attached._held.shape == (8, 1, 1, 1) and attached.extra_calls == 1
    assert denoiser.calls == len(scheduler.timesteps) + 1


@pytest.mark.parametrize("kind", ["pndm", "dpm-solver++", "euler"])
def test_repeated_estimates_can_enlarge_the_error(kind):
    """What docs/corrections.md warns of: the model's own answer to the drifted mean is subtracted too."""
    scheduler = SCHEDULERS[kind]()
    right, denoiser = drawn(Biased(scheduler, 0.0), scheduler, noise(8)), Biased(scheduler, 0.1)
    plain = (drawn(denoiser, scheduler, noise(8)) - right).mean().abs()
    Attachment(denoiser, scheduler, NoiseEstimate(interval=2))
    assert (drawn(denoiser, scheduler, noise(8)) - right).mean().abs() > plain


def test_two_runs_are_two_separate_runs_and_images_do_not_depend_on_their_batch():
    scheduler = DDIMScheduler()
    denoiser = Biased(scheduler, 0.1)
    Attachment(denoiser, scheduler, NoiseEstimate(interval=4))
    first = drawn(denoiser, scheduler, noise(3))
    assert torch.equal(drawn(denoiser, scheduler, noise(3)), first)
    assert torch.allclose(drawn(denoiser, scheduler, noise(3)[1:2]), first[1:2], atol=1e-6)
    detached = copy.deepcopy(scheduler)
    assert detached.step.method.__self__ is not scheduler.step.method.__self__


def test_injected_noise_is_what_it_would_have_been():
    """The trial step draws from the sampler's generator and gives the state back."""
    scheduler = DDPMScheduler()
    denoiser = Biased(scheduler, 0.0)
    plain = torch.Generator().manual_seed(1)
    *_, _ = sample_unconditional(denoiser, scheduler, noise(), STEPS, generator=plain)
    Attachment(denoiser, scheduler, NoiseEstimate(interval=3))
    corrected = torch.Generator().manual_seed(1)
    *_, _ = sample_unconditional(denoiser, scheduler, noise(), STEPS, generator=corrected)
    assert torch.equal(plain.get_state(), corrected.get_state())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_predictions_mean_noise(prediction):
    scheduler = DDIMScheduler(prediction_type=prediction)
    clean, eps, timestep = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), 400
    x = scheduler.add_noise(clean, eps, torch.tensor(timestep))
    level = float(scheduler.alphas_cumprod[timestep])
    output = {"epsilon": eps, "sample": clean, "v_prediction": level**0.5 * eps - (1 - level) ** 0.5 * clean}[prediction]
    assert torch.allclose(as_noise(scheduler, output, x, timestep), eps, atol=1e-5)
    assert torch.allclose(from_noise(scheduler, eps, x, timestep), output, atol=1e-5)


def test_refused_by_name():
    with pytest.raises(SpecError, match="LMSDiscreteScheduler is not supported; sample with one of DDIMScheduler, "):
        Attachment(nn.Identity(), LMSDiscreteScheduler(), NoiseEstimate())
    with pytest.raises(SpecError, match="UNet2DModel: has no correction; a pass such as RuntimeNoiseEstimate gives it one"):
        attach(pipelines.micro())


def test_a_scheduler_that_is_not_supported_is_refused_when_quantizing(quantized):
    pipe, data = quantized
    other = copy.copy(data)
    other.manifest = data.manifest | {"scheduler": {"class": "UniPCMultistepScheduler", "config": {}}}
    with fit.run(show=False) as run, pytest.raises(SpecError, match="UniPCMultistepScheduler is not supported"):
        RuntimeNoiseEstimate().apply(copy.deepcopy(pipe.unet), other, torch.Generator(), run)


# ---- fitted corrections


def rows(value: float) -> tuple[tuple[float, ...], ...]:
    return ((value,),) * 2


def test_a_proportional_error_is_divided_out():
    scheduler = DDIMScheduler()
    denoiser = Biased(scheduler, 0.0)
    right = drawn(denoiser, scheduler, noise())
    forward = denoiser.forward
    denoiser.forward = lambda sample, timestep: SimpleNamespace(sample=1.05 * forward(sample, timestep).sample + 0.02)
    fitted = Proportional(timesteps=(900.0, 100.0), slope=rows(0.05), mean=rows(0.02), deviation=rows(0.3))
    Attachment(denoiser, scheduler, fitted)
    assert torch.allclose(drawn(denoiser, scheduler, noise()), right, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_the_residual_takes_the_place_of_injected_noise(kind):
    """The mean of a step stays, its noise shrinks to what is left of the variance."""
    scheduler = SCHEDULERS[kind]()
    scheduler.set_timesteps(STEPS)
    at, x = scheduler.timesteps[4], noise()
    output, more = torch.zeros_like(x), {"eta": 1.0} if kind == "ddim" else {}
    results = {}
    for deviation in (0.0, 0.2, 1e3):
        fitted = Proportional(timesteps=(900.0, 100.0), slope=rows(0.0), mean=rows(0.0), deviation=rows(deviation))
        attached = Attachment(nn.Identity(), scheduler, fitted)
        results[deviation] = scheduler.step(output, at, x, generator=torch.Generator().manual_seed(3), **more).prev_sample
        attached.detach()
    plain = scheduler.step(output, at, x, generator=torch.Generator().manual_seed(3), **more).prev_sample
    assert torch.equal(results[0.0], plain)
    mean, injected = results[1e3], plain - results[1e3]
    share = (results[0.2] - mean).norm() / injected.norm()
    level = float(scheduler.alphas_cumprod[at])
    before = float(scheduler.alphas_cumprod[at - 1000 // STEPS])
    alpha = level / before
    variance = (1 - before) / (1 - level) * (1 - alpha)
    weight = (1 - alpha) / (alpha * (1 - level)) ** 0.5
    if kind == "ddim":
        weight = (1 - before - variance) ** 0.5 - (before * (1 - level) / level) ** 0.5
    assert float(share) == pytest.approx((1 - weight**2 * 0.04 / variance) ** 0.5, abs=1e-4)


def test_coefficients_by_hand(monkeypatch):
    noises, outputs = torch.tensor([[1.0, -2.0, 0.05]]), torch.tensor([[2.0, -4.0, 1.0]])
    step = FitCoefficients()
    over = 0.5 * (2 + 8 + 0.05) / 3 + 0.5 * (2 + 2 + 1) / 3 + 0.1  # 0.05 is below SMALLEST: its ratio counts as 1
    under = 0.5 * (4 + 16 + 1) / 3 + 0.5 * (4 + 4 + 1) / 3 + 0.1
    assert float(step.factor(noises, outputs)) == pytest.approx(over / under)
    without_other_terms(monkeypatch)
    assert float(step.factor(noises[:, :2], outputs[:, :2])) == pytest.approx(0.5)


def without_other_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors by least squares alone, which cannot be worse than none."""
    for name in ("RELATIVE", "RIDGE"):
        monkeypatch.setattr(f"diffquant.methods.noise_correction.{name}", 0.0)


@pytest.fixture(scope="module")
def quantized() -> tuple[Any, dq.Trajectory]:
    """A micro pipeline with 4-bit weights, and its recording; quantizers on, not frozen."""
    pipe = pipelines.micro()
    data = dq.record(pipe, dq.Calibration(samples=8, steps=4, batch_size=4), progress=False)
    model = pipe.unet
    prepare(model, plan(model, [LayerRule(match="@conv", weight_bits=4)]), data.timesteps)
    with fit.run(show=False) as run:
        CalibrateRanges(candidates=4).apply(model, data, torch.Generator().manual_seed(0), run)
    enable(model)
    return pipe, data


@pytest.mark.parametrize("step", [FitProportional(samples=8), FitCoefficients(samples=8)])
def test_fitted_corrections_lower_the_error_of_single_steps(step, quantized, monkeypatch):
    without_other_terms(monkeypatch)
    pipe, data = quantized
    model = copy.deepcopy(pipe.unet)
    with fit.run(show=False) as run:
        figures = step.apply(model, data, torch.Generator().manual_seed(0), run)
    correction = model.diffquant.correction
    assert figures["correction"] == correction.model_dump(mode="json")
    assert correction.timesteps == tuple(data.timesteps)
    rollout = checked(model, data)
    for k in range(rollout.steps):
        noises, outputs = predictions(rollout, k, 8, 4)
        if isinstance(correction, Proportional):
            mean, slope = torch.tensor(correction.mean[k])[:, None], torch.tensor(correction.slope[k])[:, None]
            fixed = (outputs - mean) / (1 + slope)
        else:
            fixed = outputs * torch.tensor(correction.factor[k])[:, None]
        assert (fixed - noises).square().mean() <= (outputs - noises).square().mean() * (1 + 1e-4)


def test_a_calibrated_baseline_is_what_full_precision_is_found_to_get_wrong():
    """On the recorded trajectories themselves nothing is left to subtract; without the baseline much is."""
    pipe = pipelines.micro()
    data = dq.record(pipe, dq.Calibration(samples=4, steps=STEPS, batch_size=4), progress=False)
    start = data.step(torch.arange(4), 0).sample
    plain = drawn(pipe.unet, pipe.scheduler, start)
    for baseline in ("calibrated", "none"):
        with fit.run(show=False) as run:
            RuntimeNoiseEstimate(baseline=baseline).apply(pipe.unet, data, torch.Generator(), run)
        of_batch = pipe.unet.diffquant.correction.model_copy(update={"scope": "batch"})  # as the baseline is
        give_correction(pipe.unet, of_batch)
        attachment = attach(pipe)
        change = float((drawn(pipe.unet, pipe.scheduler, start) - plain).norm() / plain.norm())
        assert attachment.extra_calls == len(pipe.unet.diffquant.correction.refreshes(STEPS)) > 1
        assert change < 1e-5 if baseline == "calibrated" else change > 0.01
        if baseline == "calibrated":
            with pytest.raises(SpecError, match="measured on DDIMScheduler, 10 steps, clipped; this is DDIMScheduler, 20 steps"):
                drawn(pipe.unet, pipe.scheduler, start, steps=20)
        detach(pipe)


def test_an_input_bias_holds_for_what_it_was_fitted_on(quantized):
    pipe, data = quantized
    model = copy.deepcopy(pipe.unet)
    with fit.run(show=False) as run:
        FitCoefficients(samples=8).apply(model, data, torch.Generator().manual_seed(0), run)
    assert model.diffquant.correction.scheduler == "DDIMScheduler, 4 steps, clipped" and model.diffquant.correction.bias[0] == (
        0.0,
        0.0,
        0.0,
    )
    for clips, steps, eta, here in (
        (True, 4, 0.0, None),
        (True, 6, 0.0, "DDIMScheduler, 6 steps, clipped"),
        (True, 4, 0.5, "DDIMScheduler, 4 steps, eta 0.5, clipped"),
        (False, 4, 0.0, "DDIMScheduler, 4 steps"),
    ):
        corrected = DDIMPipeline(model, DDIMScheduler(clip_sample=clips))
        corrected.set_progress_bar_config(disable=True)
        attach(corrected)
        refused = f"fitted on DDIMScheduler, 4 steps, clipped; this is {here}; fit it with input_bias: false"
        with pytest.raises(SpecError, match=refused) if here else nullcontext():
            corrected(num_inference_steps=steps, eta=eta, output_type="np")


@pytest.mark.parametrize(("kind", "eta"), [(PNDMScheduler, None), (DDIMScheduler, 1.0)])
@pytest.mark.parametrize("step", [RuntimeNoiseEstimate(baseline="calibrated", samples=2), FitCoefficients(samples=2)])
def test_what_was_fitted_on_a_recording_works_with_its_sampler(tmp_path, kind, eta, step):
    """PNDM steps once more than it is asked for; noise that DDIM injects belongs to a recording as its steps do."""
    pipe = pipelines.stable_diffusion(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, skip_prk_steps=True)
    data = dq.record(pipe, dq.Calibration(samples=2, steps=STEPS, batch_size=2, eta=eta), progress=False)
    with fit.run(show=False) as run:
        step.apply(pipe.unet, data, torch.Generator().manual_seed(0), run)
    attached = attach(pipe)
    pipe(["a"], num_inference_steps=STEPS, eta=eta or 0.0, output_type="np")
    assert (attached.extra_calls > 0) == isinstance(step, RuntimeNoiseEstimate)


# ---- pipelines and checkpoints


def test_guidance_is_combined_as_the_pipeline_does(tmp_path):
    pipe = pipelines.stable_diffusion(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"prompt": ["a", "b"], "num_inference_steps": 6, "output_type": "np"}
    plain = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    attached = attach(pipe, NoiseEstimate(interval=2))
    corrected = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert attached.extra_calls == 1 and not (plain == corrected).all()
    detach(pipe)
    assert (pipe(**arguments, generator=torch.Generator().manual_seed(0)).images == plain).all()
    attach(pipe, NoiseEstimate(interval=2))
    with pytest.raises(SpecError, match="no weighted sum of the halves"):
        pipe(**arguments, guidance_rescale=0.7)


def test_a_correction_is_saved_and_comes_back_attached(tmp_path):
    pipe = pipelines.micro()
    pipelines.freeze_by_hand(pipe.unet)
    give_correction(pipe.unet, NoiseEstimate(interval=3))
    dq.save(pipe, tmp_path / "packed")
    loaded = dq.load(tmp_path / "packed", engine="simulate")
    assert attachment_of(loaded).correction == NoiseEstimate(interval=3)
    with dq.engine("simulate"):
        stock = DDIMPipeline.from_pretrained(tmp_path / "packed")
    stock.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="sampling-time correction that nothing applies; call diffquant.attach"):
        stock(num_inference_steps=2, output_type="np")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stock(num_inference_steps=2, output_type="np")  # once
    dq.attach(stock)
    dq.save(stock, tmp_path / "again")
    assert dq.load(tmp_path / "again", engine="simulate").unet.diffquant.correction == NoiseEstimate(interval=3)


def test_it_follows_the_sampler_of_a_protocol(tmp_path):
    pipe = pipelines.micro()
    attached = attach(pipe, NoiseEstimate(interval=2))
    for sampler in ("pipeline", "euler"):
        before = attached.extra_calls
        sample(pipe, dq.SamplingProtocol(samples=2, steps=6, sampler=sampler))
        assert attached.extra_calls > before
    assert attached.scheduler is pipe.scheduler
    with pytest.raises(SpecError, match="UniPCMultistepScheduler is not supported"):
        sample(pipe, dq.SamplingProtocol(samples=2, steps=6, sampler="unipc"))


def test_coefficients_are_values():
    with pytest.raises(ValueError, match="finite"):
        Coefficients(timesteps=(1.0,), factor=((float("nan"),),))
