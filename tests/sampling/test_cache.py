"""Full precision's samples on disk: the same as drawn ones, and never those of something else."""

import dataclasses

import pytest
import torch
from torch import nn

from diffquant.errors import CalibrationError, EvaluationError
from diffquant.evaluation.compare import compare_to, run_reference
from diffquant.sampling import cache as draws
from diffquant.sampling.cache import draw
from diffquant.sampling.protocol import SamplingProtocol
from tests import pipelines

PROTOCOL = SamplingProtocol(samples=3, steps=4, seed=1, batch_size=2, trajectory_samples=2, accumulation_samples=0)


@pytest.fixture
def counted(monkeypatch):
    """How often anything was sampled."""
    times = []

    def sample(*arguments, **keywords):
        times.append(keywords["seed"])
        return real(*arguments, **keywords)

    real = draws.sample
    monkeypatch.setattr(draws, "sample", sample)
    return times


def test_what_is_taken_from_disk_is_what_was_drawn(tmp_path, counted):
    pipe = pipelines.micro()
    drawn, again = (draw(pipe, PROTOCOL, seed=1, name="full", trajectory=True, snapshots=[1, 3], folder=tmp_path) for _ in range(2))
    assert counted == [1] and drawn.seconds is not None and again.seconds is None
    assert torch.equal(drawn.pictures, again.pictures) and torch.equal(drawn.last_samples, again.last_samples)
    assert drawn.trajectory.timesteps == again.trajectory.timesteps
    assert torch.equal(drawn.trajectory.latents, again.trajectory.latents)
    assert torch.equal(drawn.trajectory.noise, again.trajectory.noise)
    assert list(again.noisy) == [1, 3] and all(torch.equal(drawn.noisy[steps], again.noisy[steps]) for steps in (1, 3))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_another_model_protocol_or_noise_is_drawn_anew(tmp_path, counted):
    pipe, other = pipelines.micro(), pipelines.micro()
    with torch.no_grad():
        next(other.unet.parameters()).flatten()[0] += 1e-3
    other_scheduler = pipelines.micro()
    other_scheduler.scheduler.register_to_config(clip_sample=False)
    for each, protocol, seed, trajectory in (
        (pipe, PROTOCOL, 1, False),
        (pipe, PROTOCOL, 2, False),
        (pipe, PROTOCOL, 1, True),
        (pipe, dataclasses.replace(PROTOCOL, steps=5), 1, False),
        (pipe, dataclasses.replace(PROTOCOL, sampler="ddpm"), 1, False),
        (other, PROTOCOL, 1, False),
        (other_scheduler, PROTOCOL, 1, False),
    ):
        draw(each, protocol, seed=seed, name="full", trajectory=trajectory, folder=tmp_path)
    assert len(counted) == len(list(tmp_path.iterdir())) == 7


def test_parts_beside_the_denoiser_count(tmp_path, counted):
    pipe = pipelines.stable_diffusion(tmp_path / "made")
    drawing = {"seed": 1, "name": "full", "folder": tmp_path / "work"}
    protocol = dataclasses.replace(PROTOCOL, samples=1, steps=1, prompts=("a",))
    draw(pipe, protocol, **drawing)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(0.1)
    draw(pipe, protocol, **drawing)
    pipe.vae.register_to_config(scaling_factor=0.5)  # no weight, but other pictures
    draw(pipe, protocol, **drawing)
    assert len(counted) == 3


def test_integer_codes_and_the_engine_count(tmp_path, counted, monkeypatch):
    """Two quantized models of the same weights have equal parameters: what differs is in their buffers."""
    for bits in (4, 8):
        pipe = pipelines.micro()
        pipelines.freeze_by_hand(pipe.unet, weight_bits=bits)
        draw(pipe, PROTOCOL, seed=1, name="quantized", folder=tmp_path)
    monkeypatch.setattr(draws, "engine_of", lambda model: "another")
    draw(pipe, PROTOCOL, seed=1, name="quantized", folder=tmp_path)
    assert len(counted) == 3


def test_a_damaged_or_renamed_file_is_refused(tmp_path):
    pipe = pipelines.micro()
    for seed in (1, 2):
        draw(pipe, PROTOCOL, seed=seed, name="full", folder=tmp_path)
    earlier, later = tmp_path.iterdir()
    whole = earlier.read_bytes()
    earlier.write_bytes(later.read_bytes())
    with pytest.raises(EvaluationError, match="holds another draw than its name says; delete it"):
        [draw(pipe, PROTOCOL, seed=seed, name="full", folder=tmp_path) for seed in (1, 2)]
    earlier.write_bytes(whole[:100])
    with pytest.raises(CalibrationError, match=r"damaged \(.*\); delete it"):
        [draw(pipe, PROTOCOL, seed=seed, name="full", folder=tmp_path) for seed in (1, 2)]


def test_comparisons_with_a_kept_reference_are_equal(tmp_path, counted):
    class Corners(nn.Module):
        name, sha256 = "corners", "0"

        def features(self, pictures):
            return pictures[:, :, 0, :2].flatten(1).float()

        def confidence(self, pictures):
            return None

        def agreement(self, pictures, conditions):
            return None

    pipe = pipelines.micro()
    protocol = dataclasses.replace(PROTOCOL, samples=14)
    first, second = (run_reference(pipe, protocol, features=Corners(), folder=tmp_path) for _ in range(2))
    assert counted == [1, 2] and second.seconds is None
    worse = pipelines.micro(seed=1)
    earlier, later = (compare_to(reference, worse) for reference in (first, second))
    assert earlier.figures == later.figures and {"final_error", "fid_to_reference", "fid_by_step"} <= earlier.figures.keys()
