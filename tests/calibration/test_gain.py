"""What the scheduler's step makes of an error, against formulas by hand and against steps taken."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

from diffquant.calibration.gain import StepGain
from diffquant.calibration.record import record
from diffquant.calibration.rollout import Rollout
from diffquant.host.conditions import Calibration
from diffquant.host.pipeline import Host
from tests import pipelines

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SMALL = Calibration(samples=3, batch_size=2, steps=4, seed=1)


def test_ddim_by_hand():
    """sqrt(1 - a') - sqrt(a' (1 - a) / a), where nothing is clipped."""
    pipe = pipelines.micro()
    pipe.scheduler.register_to_config(clip_sample=False)
    data = record(pipe, SMALL, progress=False)
    scheduler, steps = pipe.scheduler, data.timetable["num_inference_steps"]
    found = StepGain(pipe.unet, data).of(torch.arange(len(data)))
    spacing = scheduler.config.num_train_timesteps // steps
    wanted = []
    for timestep in data.timestep_of.long().tolist():
        now = scheduler.alphas_cumprod[timestep]
        then = scheduler.alphas_cumprod[timestep - spacing] if timestep >= spacing else scheduler.final_alpha_cumprod
        wanted.append((1 - then).sqrt() - (then * (1 - now) / now).sqrt())
    unit = torch.stack(wanted)[data.trajectory_of == 0].square().mean().sqrt()
    torch.testing.assert_close(found, (torch.stack(wanted) / unit).view(-1, 1, 1, 1).expand_as(found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clipped", [False, True])
def test_a_step_taken_with_a_small_error(clipped):
    pipe = pipelines.micro()
    pipe.scheduler.register_to_config(clip_sample=clipped, clip_sample_range=0.5)
    data = record(pipe, SMALL, progress=False)
    agree_with_steps(pipe, data, 1e-3 if clipped else 1.0)


def agree_with_steps(pipe, data, size: float) -> None:
    """The gains times an error are what the error makes of the latent: up to one unit for all."""
    model = Host(pipe).denoiser
    gain, rollout = StepGain(model, data), Rollout(model, data)
    found, wanted = [], []
    for k in range(rollout.steps):
        chain = rollout.chain(torch.arange(2), range(k, k + 1))
        output = data.step(torch.arange(2), k).model_output
        error = size * torch.randn(output.shape, generator=torch.Generator().manual_seed(k))
        moved = chain.step(output + error, chain.recorded(0), 0, chain.state)[0]
        moved = moved - chain.step(output, chain.recorded(0), 0, chain.state)[0]
        w = rollout.guidance[k]
        for half, share in ((0, 1 - w), (1, w)) if int(data.half_of.max()) == 1 else ((-1, 1.0),):
            at = (data.call_of == k) & (data.half_of == half)
            rows = torch.stack([(at & (data.trajectory_of == j)).nonzero()[0, 0] for j in range(2)])
            found.append(gain.of(rows) * error)
            wanted.append(moved * share)
    predicted, moved = torch.stack(found), torch.stack(wanted)
    rounding = 4 * float(data.step(torch.arange(2), 0).sample.abs().max()) * torch.finfo(torch.float32).eps
    rounding *= max(1.0, *(abs(w) for w in rollout.guidance))
    clear = predicted.abs() > 300 * rounding
    assert int(clear.sum()) > 100
    predicted *= (moved / predicted)[clear].median()
    right = (moved - predicted).abs() < 0.01 * predicted.abs() + rounding
    assert float(right.float().mean()) > 0.98  # a value whose error takes it to where clipping begins, or ends, moves otherwise


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_other_schedulers(scheduler):
    pipe = pipelines.micro()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    agree_with_steps(pipe, record(pipe, SMALL, run=pipelines.own_loop, progress=False), 1.0)


@pytest.mark.parametrize("name", ["ldm", "dit", "stable_diffusion", "pixart", "stable_diffusion_3", "flux", "cogvideox"])
def test_stock_pipelines(name, tmp_path):
    """Where calls are guided, each of their halves. Schedulers that clip are linear for small errors only."""
    pipe = pipelines.build(name, tmp_path)
    agree_with_steps(pipe, record(pipe, SMALL, progress=False), 1e-3 if name in ("ldm", "dit") else 1.0)
