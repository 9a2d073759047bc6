"""Local, accumulated and predicted errors of a tiny model and disturbed copies."""

from __future__ import annotations

import copy

import pytest
import torch

from diffquant.evaluation.accumulation import accumulation, parts, trace
from diffquant.evaluation.pairs import relative_l2
from diffquant.host.pipeline import Host
from diffquant.sampling.protocol import SamplingProtocol
from tests import pipelines
from tests.evaluation.test_compare import disturbed

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PROTOCOL = SamplingProtocol(samples=6, steps=4, seed=3, accumulation_samples=3)


@pytest.fixture(scope="module")
def pipe():
    return pipelines.ddim()


@pytest.fixture(scope="module")
def traced(pipe):
    return trace(pipe, PROTOCOL)


def test_full_precision_itself_makes_no_error(pipe, traced):
    errors = accumulation(traced, copy.deepcopy(pipe.unet))
    assert errors.samples == 3 and len(errors.timesteps) == 4
    assert (
        max(*errors.local, *errors.accumulated, *errors.predicted, *(stretch.final_error.value for stretch in errors.stretches))
        < 1e-4
    )


def test_local_and_accumulated_errors_are_those_of_the_chain(pipe, traced):
    other = disturbed(pipe, 0.1).unet
    errors = accumulation(traced, other)
    chain = traced.through(other).chain(torch.arange(3), range(4))
    latents, _ = chain.run()
    for k in range(4):
        assert errors.accumulated[k] == pytest.approx(float(relative_l2(chain.recorded(k + 1), latents[k + 1]).mean()))
    assert errors.local[0] == pytest.approx(errors.accumulated[0])
    assert errors.predicted[0] == pytest.approx(errors.accumulated[0], rel=1e-4)
    assert errors.local[3] != pytest.approx(errors.accumulated[3], rel=1e-2)


def test_small_errors_add_up_as_predicted(pipe, traced):
    errors = accumulation(traced, disturbed(pipe, 1e-3).unet)
    assert errors.predicted == pytest.approx(errors.accumulated, rel=0.05)
    assert errors.local[-1] < 0.9 * errors.accumulated[-1]


def test_the_last_stretch_errs_by_the_last_local_error(pipe, traced):
    errors = accumulation(traced, disturbed(pipe, 0.1).unet)
    assert [(stretch.first, stretch.last) for stretch in errors.stretches] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert errors.stretches[-1].final_error.value == pytest.approx(errors.local[-1])


@pytest.mark.parametrize("name", ["ldm", "dit", "stable_diffusion"])
def test_pipelines_with_calls_of_their_own_are_traced(name, tmp_path):
    pipe = getattr(pipelines, name)(*((tmp_path,) if name == "stable_diffusion" else ()))
    errors = accumulation(trace(pipe, PROTOCOL), copy.deepcopy(Host(pipe).denoiser))
    assert max(errors.accumulated) < 1e-3


def test_other_samplers_are_traced_under_their_own_name(pipe):
    rollout = trace(pipe, SamplingProtocol(samples=2, steps=4, sampler="dpm-solver++"))
    assert rollout.where == "DDIMPipeline with DPMSolverMultistepScheduler"
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


def test_parts_cover_all_steps():
    assert parts(3) == [range(0, 1), range(1, 2), range(2, 3)]
    assert [len(part) for part in parts(25)] == [2, 3] * 5 and parts(25)[-1].stop == 25
