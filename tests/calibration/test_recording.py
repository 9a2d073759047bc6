"""Recording of stock pipelines, reading back, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import itertools
import json
import types
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, EulerDiscreteScheduler, PNDMScheduler
from safetensors.torch import load_file
from torch import nn

from diffquant.calibration import record as store
from diffquant.calibration import recorded_batch
from diffquant.calibration.manifest import model_hash
from diffquant.calibration.record import record
from diffquant.calibration.recording import Trajectory
from diffquant.errors import CalibrationError
from diffquant.files import content_name
from diffquant.host.conditions import PROMPTS, Calibration
from diffquant.host.pipeline import Host
from tests import pipelines

# diffusers 0.42.1 hands a torch tensor to numpy.array in set_timesteps of Euler and DPM-Solver++
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SMALL = Calibration(samples=3, batch_size=2, steps=3, seed=1)
PIPELINES = ("ddim", "ddpm", "ldm", "dit", "stable_diffusion")
GUIDED = ("dit", "stable_diffusion")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Every pipeline with its recording."""
    both = {}
    for name in PIPELINES:
        arguments = (tmp_path_factory.mktemp("tokenizer"),) if name == "stable_diffusion" else ()
        pipe = getattr(pipelines, name)(*arguments)
        both[name] = pipe, record(pipe, SMALL, folder=tmp_path_factory.mktemp(name), progress=False)
    return both


@pytest.fixture
def ddim():
    return pipelines.ddim()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is recorded


@pytest.mark.parametrize("name", PIPELINES)
def test_replaying_a_recorded_call_gives_the_recorded_output(recorded, name):
    pipe, trajectory = recorded[name]
    denoiser = Host(pipe).denoiser
    count = 0
    with torch.no_grad():
        for arguments, output in pipelines.recorded_calls(trajectory):
            # the timestep is one number in the pipeline and a row here: its embedding is one product of another shape
            torch.testing.assert_close(denoiser(**arguments).sample, output, rtol=1e-5, atol=1e-6)
            count += len(output)
    assert count == len(trajectory) == SMALL.samples * SMALL.steps * (2 if name in GUIDED else 1)


@pytest.mark.parametrize("name", PIPELINES)
def test_recording_leaves_the_pipeline_as_it_was(recorded, name):
    pipe, _ = recorded[name]
    denoiser = Host(pipe).denoiser
    assert not denoiser._forward_hooks and "step" not in vars(pipe.scheduler)
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    assert not pipe._progress_bar_config


def test_recorded_is_what_an_unobserved_pipeline_computes(recorded):
    pipe, trajectory = recorded["ddim"]
    seen = []
    pipe.set_progress_bar_config(disable=True)
    digest = hashlib.sha256(f"{SMALL.seed}/1".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    with Host(pipe).observed(on_step=lambda *step: seen.append(step)):
        image = pipe(batch_size=1, generator=generator, num_inference_steps=SMALL.steps, output_type="np").images
    pipe.set_progress_bar_config()
    last = trajectory.step(torch.tensor([2]), SMALL.steps - 1).prev_sample
    assert torch.equal(last, seen[-1][3])
    assert torch.equal((last / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), torch.from_numpy(image))


@pytest.mark.parametrize("name", PIPELINES)
def test_steps_can_be_replayed_by_the_scheduler(recorded, name):
    pipe, trajectory = recorded[name]
    steps = [trajectory.step(torch.arange(SMALL.batch_size), k) for k in range(trajectory.step_count)]
    assert [float(step.timestep) for step in steps] == trajectory.timesteps
    for step, following in itertools.pairwise(steps):
        assert torch.equal(step.prev_sample, following.sample)
    if name != "ddpm":  # deterministic: no variance noise to replay
        pipe.scheduler.set_timesteps(SMALL.steps)
        again = pipe.scheduler.step(steps[0].model_output, steps[0].timestep, steps[0].sample)
        assert torch.equal(again.prev_sample, steps[0].prev_sample)


def test_text_conditions_come_from_the_prompts_in_order(recorded):
    pipe, trajectory = recorded["stable_diffusion"]
    conditional = (trajectory.half_of == 1) & (trajectory.trajectory_of < SMALL.batch_size)
    arguments, _ = trajectory.batch(conditional.nonzero().flatten()[:2])
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(list(PROMPTS[:2]), "cpu", 1, False)
    # recorded among four rows, encoded here as two
    torch.testing.assert_close(arguments["encoder_hidden_states"], expected, rtol=1e-5, atol=1e-6)
    assert arguments["added_cond_kwargs"] is None


def test_class_labels_are_spread_or_cycled(recorded, tmp_path):
    pipe, trajectory = recorded["dit"]
    labels = trajectory.batch(torch.arange(4))[0]["class_labels"]
    assert labels.tolist() == [0, 333, 1000, 1000]
    given = record(pipe, dataclasses.replace(SMALL, class_labels=(7,), guidance_scale=1.0, steps=1), progress=False)
    assert given.batch(torch.arange(3))[0]["class_labels"].tolist() == [7, 7, 7]


def test_pndm_makes_more_calls_than_steps():
    pipe = DDPMPipeline(pipelines.unet(), PNDMScheduler())

    def run(pipe, generator, batch):  # the stock pipeline passes a generator, which PNDM does not take
        sample = torch.randn((batch, 3, 8, 8), generator=generator)
        pipe.scheduler.set_timesteps(5)
        for timestep in pipe.scheduler.timesteps:
            sample = pipe.scheduler.step(pipe.unet(sample, timestep).sample, timestep, sample).prev_sample

    trajectory = record(pipe, Calibration(samples=2, steps=5), run=run, progress=False)
    calls = len(trajectory) // 2
    assert calls == trajectory.step_count == len(pipe.scheduler.timesteps) > 5
    assert len(trajectory.timesteps) < calls  # some timesteps are visited more than once
    assert trajectory.timesteps == sorted(set(trajectory.timesteps), reverse=True)
    drawn = trajectory.subset(len(trajectory.timesteps), torch.Generator().manual_seed(0))
    assert sorted(trajectory.timestep_of[drawn].tolist(), reverse=True) == trajectory.timesteps  # one each


def test_equal_tensors_are_stored_once(recorded):
    _, trajectory = recorded["ddim"]
    image = 4 * 2 * 3 * 8 * 8  # bytes, batch of 2
    stored = sum(trajectory._tensor(0, key).nbytes for key in trajectory._files[0].keys())  # noqa: SIM118 (not a dict)
    assert stored < image * (2 * SMALL.steps + 1) + 100  # outputs, and one sample more than steps


# Reading


def test_batch_gathers_rows_in_the_order_asked(recorded):
    for name in PIPELINES:
        _, trajectory = recorded[name]
        whole = list(pipelines.recorded_calls(trajectory))
        outputs = torch.cat([output for _, output in whole])
        samples = torch.cat([next(v for k, v in a.items() if k in ("sample", "hidden_states")) for a, _ in whole])
        indices = torch.randperm(len(trajectory), generator=torch.Generator().manual_seed(0))[:7]
        arguments, output = trajectory.batch(indices)
        assert torch.equal(output, outputs[indices])
        assert torch.equal(arguments.get("sample", arguments.get("hidden_states")), samples[indices])
        assert torch.equal(arguments["timestep"].double(), trajectory.timestep_of[indices])


def test_trajectory_of_counts_guidance_halves_as_one(recorded):
    assert recorded["ddim"][1].trajectory_of.tolist() == [0, 1] * 3 + [2] * 3
    assert recorded["dit"][1].trajectory_of.tolist() == [0, 1, 0, 1] * 3 + [2, 2] * 3
    assert recorded["dit"][1].call_of.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("count", [1, 3, 7, 9])
def test_subset_is_even_over_timesteps_and_distinct(recorded, count):
    _, trajectory = recorded["ddim"]
    drawn = trajectory.subset(count, torch.Generator().manual_seed(3))
    assert len(drawn.unique()) == count
    per_timestep = [int((trajectory.timestep_of[drawn] == t).sum()) for t in trajectory.timesteps]
    assert sum(per_timestep) == count and max(per_timestep) - min(per_timestep) <= 1
    assert torch.equal(drawn, trajectory.subset(count, torch.Generator().manual_seed(3)))


def test_dicts_constants_and_shared_tensors_come_back():
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, sample, timestep, positions=None, added=None, scale=1.0, return_dict=True, **kwargs):
            return (sample * self.weight * timestep.reshape(-1, 1, 1, 1) + added["text"]["embedding"].sum(),)

    def run(pipe, generator, batch):
        sample = torch.randn((batch, 3, 8, 8), generator=generator)
        text = {"embedding": torch.arange(2.0 * batch).reshape(batch, 2), "pooled": None}
        for timestep in (0.75, 0.25):
            noise = pipe.unet(
                sample,
                torch.tensor(timestep),
                positions=torch.arange(5),
                added={"text": text, "empty": {}},
                scale=0.5,
                return_dict=False,
                sizes={"height": 8},
                rotary=(torch.arange(6.0).view(3, 2), torch.ones(3, 2)),
                images=[None, torch.ones(batch, 2)],
                window=(1, (2.5, [3])),
            )[0]
            sample = pipe.scheduler.step(noise, 100, sample).prev_sample

    pipe = pipelines.ddpm()
    pipe.unet = Denoiser()
    pipe.scheduler.set_timesteps(10)
    trajectory = record(pipe, Calibration(samples=3, batch_size=2, steps=2), run=run, progress=False)
    assert trajectory.timesteps == [0.75, 0.25]
    arguments, _ = trajectory.batch(torch.tensor([1, 0, 4]))
    assert arguments["timestep"].tolist() == [0.75, 0.75, 0.75]
    assert arguments["positions"].tolist() == [0, 1, 2, 3, 4]
    assert arguments["added"]["text"]["embedding"].tolist() == [[2.0, 3.0], [0.0, 1.0], [0.0, 1.0]]
    assert arguments["added"]["text"]["pooled"] is None and arguments["added"]["empty"] == {}
    assert type(arguments["rotary"]) is tuple and torch.equal(arguments["rotary"][0], torch.arange(6.0).view(3, 2))
    assert arguments["images"][0] is None and arguments["images"][1].tolist() == [[1.0, 1.0]] * 3
    assert arguments["window"] == (1, (2.5, [3]))
    assert arguments["scale"] == 0.5 and arguments["sizes"] == {"height": 8} and "return_dict" not in arguments


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "pixart", "stable_diffusion_3", "flux", "cogvideox"])
def test_recorded_arguments_are_those_of_the_pipeline(name, tmp_path):
    pipe = pipelines.build(name, tmp_path)
    seen = []
    denoiser = Host(pipe).denoiser
    names = list(inspect.signature(denoiser.forward).parameters)

    def keep(module, positional, keywords, output):
        seen.append((dict(zip(names, positional, strict=False)) | keywords, output[0]))

    handle = denoiser.register_forward_hook(keep, with_kwargs=True)
    trajectory = record(pipe, dataclasses.replace(SMALL, samples=2, steps=2), progress=False)
    handle.remove()
    timestep = trajectory.manifest["denoiser"]["timestep"]
    for (arguments, output), (given, expected) in zip(
        pipelines.recorded_calls(trajectory), seen[1:], strict=True
    ):  # the first is of another size
        del given["return_dict"]
        given[timestep] = given[timestep].expand(len(output))  # recorded for every row
        assert same(arguments, given)
        assert torch.equal(output, expected)
    assert trajectory.timesteps == sorted({float(t) for t in trajectory.timestep_of}, reverse=True)


def same(found, expected) -> bool:
    """Equal in structure, types, dtypes and values."""
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and all(map(same, found, expected)) and len(found) == len(expected)
    return type(found) is type(expected) and found == expected


# Hash and resumption


def test_model_hash_ignores_buffers_and_sees_one_weight():
    model, other = pipelines.unet(), pipelines.unet()
    assert model_hash(model) == model_hash(other) != model_hash(pipelines.unet(seed=1))
    model.conv_in.register_buffer("scale", torch.ones(3))
    assert model_hash(model) == model_hash(other)
    with torch.no_grad():
        other.conv_out.bias[0] += 1e-6
    assert model_hash(model) != model_hash(other)


def test_an_expanded_number_has_the_name_of_its_value():
    """Wan expands its timestep to the batch: with one sample a tensor of stride 0, which is contiguous."""
    assert content_name(torch.tensor(5.0).expand(1)) == content_name(torch.tensor([5.0]))


def exchanged(folder):
    one, two = folder / "batch-00000.safetensors", folder / "batch-00001.safetensors"
    contents = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(contents)


def flipped(folder):
    file = folder / "batch-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))


def another_seed(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["calibration"]["seed"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (exchanged, "batch-00000.safetensors: is another batch, or of another recording"),
        (flipped, "batch-00001.safetensors: damaged: tensor .* is not what was recorded"),
        (another_seed, "manifest.json: is not the manifest that was written"),
    ],
)
def test_a_recording_that_was_altered(damage, message, tmp_path):
    record(pipelines.micro(), Calibration(samples=4, steps=2, batch_size=2), folder=tmp_path, progress=False)
    damage(tmp_path)
    with pytest.raises(CalibrationError, match=message):
        trajectory = Trajectory.open(tmp_path)
        trajectory.batch(torch.arange(4, 8))
        for number in range(trajectory.step_count):  # tensors lie in the order of their digests: the last may be of a step
            trajectory.step(torch.arange(4), number)


def test_recorded_without_clipping(tmp_path, ddim):
    own = ddim.scheduler
    assert own.config.clip_sample
    settings = dataclasses.replace(SMALL, clip_sample=False)
    trajectory = record(ddim, settings, folder=tmp_path / "unclipped", progress=False)
    assert ddim.scheduler is own
    assert trajectory.manifest["scheduler"]["config"]["clip_sample"] is False
    ddim.scheduler = DDIMScheduler.from_config(own.config, clip_sample=False)
    by_hand = record(ddim, SMALL, folder=tmp_path / "by-hand", progress=False)
    batch = "batch-00000.safetensors"
    ours, theirs = load_file(tmp_path / "unclipped" / batch), load_file(tmp_path / "by-hand" / batch)
    assert ours.keys() == theirs.keys()  # names are digests of what is in them
    assert len(by_hand) == len(trajectory)


def test_a_scheduler_that_cannot_clip_is_refused(ddim):
    own = ddim.scheduler = EulerDiscreteScheduler()
    with pytest.raises(CalibrationError, match="clip_sample: is true; EulerDiscreteScheduler has no such option"):
        record(ddim, dataclasses.replace(SMALL, clip_sample=True), progress=False)
    assert ddim.scheduler is own


def test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    settings = Calibration(samples=5, batch_size=2, steps=2)
    pipe = pipelines.ddpm()  # its scheduler draws noise at every step
    record(pipe, settings, folder=tmp_path / "whole", progress=False)

    save, written = recorded_batch.save_file, []

    def interrupted(tensors, path, metadata):
        if len(written) == 1:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(path)
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(recorded_batch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record(pipe, settings, folder=tmp_path / "killed", progress=False)
    monkeypatch.undo()
    assert sorted(files(tmp_path / "killed")) == ["batch-00000.safetensors", "manifest.json"]
    with pytest.raises(CalibrationError, match="not complete; record again"):
        Trajectory.open(tmp_path / "killed")

    (tmp_path / "killed" / "batch-00001.safetensors.partial").write_bytes(b"of a process that was killed outright")
    record(pipe, settings, folder=tmp_path / "killed", progress=False)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_complete_recording_is_not_computed_again(ddim, tmp_path):
    record(ddim, SMALL, folder=tmp_path, progress=False)

    def run(pipe, generator, batch):
        raise AssertionError("computed again")

    run.__qualname__ = "pipeline"
    assert len(record(ddim, dataclasses.replace(SMALL, budget_gib=1.0), folder=tmp_path, run=run, progress=False)) == 9


def test_full_disk_leaves_no_file(ddim, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recorded_batch, "save_file", full)
    with pytest.raises(CalibrationError, match=r"batch-00000.*cannot be written.*No space left on device.*free some space"):
        record(ddim, SMALL, folder=tmp_path, progress=False)
    assert sorted(files(tmp_path)) == ["manifest.json"]


def test_a_temporary_recording_lives_as_long_as_its_object(ddim, monkeypatch, tmp_path):
    monkeypatch.setattr(store.tempfile, "tempdir", str(tmp_path))
    trajectory = record(ddim, SMALL, progress=False)
    assert trajectory.folder.parent == tmp_path and trajectory.folder.exists()
    del trajectory
    assert not list(tmp_path.iterdir())
    with pytest.raises(CalibrationError, match="budget"):
        record(ddim, dataclasses.replace(SMALL, budget_gib=1e-9), progress=False)
    assert not list(tmp_path.iterdir())


def test_modes_and_random_state_are_restored(ddim):
    ddim.unet.mid_block.train()
    before = torch.get_rng_state()
    record(ddim, SMALL, progress=False)
    assert ddim.unet.mid_block.training and not ddim.unet.training
    assert torch.equal(torch.get_rng_state(), before)


def test_an_observer_inside_another_restores_it(ddim):
    seen = []
    with Host(ddim).observed(on_step=lambda *step: seen.append("outer")):
        outer = ddim.scheduler.step
        with pytest.raises(RuntimeError), Host(ddim).observed(on_step=lambda *step: seen.append("inner")):
            ddim.scheduler.set_timesteps(2)
            ddim.scheduler.step(torch.zeros(1), 0, torch.zeros(1))
            raise RuntimeError
        assert ddim.scheduler.step is outer and seen == ["outer", "inner"]
    assert ddim.scheduler.step == types.MethodType(DDIMScheduler.step, ddim.scheduler)


# What is refused


def test_another_model_is_refused(recorded, tmp_path):
    pipe, trajectory = recorded["ddim"]
    trajectory.verify(pipe.unet)
    other = pipelines.ddim(seed=5)
    with pytest.raises(CalibrationError, match="calibration data of another model"):
        trajectory.verify(other.unet)
    with pytest.raises(CalibrationError, match="holds a recording whose model_hash is"):
        record(other, SMALL, folder=trajectory.folder, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": 4}, r"calibration\.steps is 3, not 4"), ({"seed": 2}, r"calibration\.seed is 1, not 2")],
)
def test_other_settings_are_refused(recorded, change, message):
    pipe, trajectory = recorded["ddim"]
    with pytest.raises(CalibrationError, match=message):
        record(pipe, dataclasses.replace(SMALL, **change), folder=trajectory.folder, progress=False)


def test_another_scheduler_is_refused(recorded):
    pipe, trajectory = recorded["ddpm"]
    other = copy.copy(pipe)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.03)
    with pytest.raises(CalibrationError, match=r"scheduler\.config\.beta_end is 0\.02, not 0\.03"):
        record(other, SMALL, folder=trajectory.folder, progress=False)


def test_truncated_missing_and_wrong_files_are_refused(ddim, tmp_path):
    record(ddim, SMALL, folder=tmp_path, progress=False)
    path = tmp_path / "batch-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(CalibrationError, match=r"batch-00001\.safetensors: missing, truncated or damaged"):
        Trajectory.open(tmp_path)
    path.unlink()
    with pytest.raises(CalibrationError, match=r"batch-00001\.safetensors: missing"):
        Trajectory.open(tmp_path)
    record(ddim, SMALL, folder=tmp_path, progress=False)
    assert path.read_bytes() == whole

    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(CalibrationError, match="format_version is 99; 3 is supported"):
        Trajectory.open(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CalibrationError, match="not a recording's manifest"):
        Trajectory.open(tmp_path)
    with pytest.raises(CalibrationError, match=r"has batches but no manifest\.json"):
        record(ddim, SMALL, folder=tmp_path, progress=False)


def test_a_recording_over_budget_is_refused_early(ddim, tmp_path):
    calls = []
    handle = ddim.unet.register_forward_hook(lambda *_: calls.append(1))
    settings = Calibration(samples=2000, batch_size=2, steps=20, budget_gib=0.01)
    # 1000 batches of a first sample (1536 bytes) and 20 steps of two (1536 bytes each) and their timesteps (24 bytes)
    with pytest.raises(CalibrationError, match=r"2000 trajectories of 20 steps need about 0\.0591 GiB; the budget is 0\.01 GiB"):
        record(ddim, settings, folder=tmp_path / "new", progress=False)
    handle.remove()
    assert len(calls) == 3 and not (tmp_path / "new").exists()  # one of another size, and two


def test_non_finite_outputs_are_refused(ddim, tmp_path):
    with torch.no_grad():
        ddim.unet.conv_out.bias[0] = float("nan")
    message = r"call 0 of batch 0 of UNet2DModel \(timestep 666\): 128 of 384 values of the output are not finite"
    with pytest.raises(CalibrationError, match=message):
        record(ddim, SMALL, folder=tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists() and not ddim.unet._forward_hooks


def test_a_scheduler_with_another_step_is_refused_by_name(ddim):
    class OtherScheduler(DDIMScheduler):
        def step(self, sample, noise):
            return noise

    ddim.scheduler = OtherScheduler()
    with (
        pytest.raises(CalibrationError, match=r"OtherScheduler\.step: takes \(sample, noise\)"),
        Host(ddim).observed(on_step=lambda *_: None),
    ):
        pass


def test_a_pipeline_that_builds_its_own_scheduler_is_refused(ddim):
    def run(pipe, generator, batch):
        pipe.scheduler = DDIMScheduler()
        pipe(batch_size=batch, generator=generator, num_inference_steps=2, output_type="np")

    with pytest.raises(CalibrationError, match="no scheduler made a step while it ran"):
        record(ddim, SMALL, run=run, progress=False)


def test_a_pipeline_without_a_denoiser_is_refused_with_its_components():
    pipe = pipelines.ldm()
    pipe.unet = None
    with pytest.raises(
        CalibrationError, match=r"LDMPipeline: has no denoiser named unet or transformer; .* vqvae, unet, scheduler"
    ):
        Host(pipe)


def test_several_denoisers_are_refused(ddim):
    ddim.transformer_2 = nn.Linear(1, 1)
    with pytest.raises(CalibrationError, match=r"^DDIMPipeline: has several denoisers, unet and transformer_2; pipelines with one"):
        Host(ddim)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"hint": object()}, r"call 0 of batch 0 of Denoiser: argument hint is a object; only tensors, plain values, and dicts"),
        ({"hint": [torch.ones(2), {1}]}, r"argument hint\.\[1\] is a set; only tensors"),
        ({"hint": {"a.b": torch.ones(2)}}, r"argument hint has the key 'a\.b'; strings without dots or brackets"),
        ({"hint": {"(0)": torch.ones(2)}}, r"argument hint has the key '\(0\)'"),
    ],
)
def test_arguments_that_cannot_be_recorded_are_refused_by_name(ddim, extra, message):
    class Denoiser(nn.Module):
        def forward(self, sample, timestep, **kwargs):
            return (sample,)

    def run(pipe, generator, batch):
        pipe.unet(torch.ones(batch, 3, 8, 8), 1, **extra)

    ddim.unet = Denoiser()
    with pytest.raises(CalibrationError, match=message):
        record(ddim, SMALL, run=run, progress=False)


def test_what_belongs_to_samples_is_told_by_two_batch_sizes():
    """Not by its length: positions and a list of layers are as long as the batch here, and the last batch is as small as the first
    look was.
    """

    class Denoiser(nn.Module):
        def forward(self, sample, timestep, tokens=None, positions=None, layers=None):
            return (sample + tokens.mean() + positions.mean(),)

    def run(pipe, generator, batch, layers=None):
        sample = torch.randn((batch, 3, 8, 8), generator=generator)
        tokens = sample.mean((2, 3))[:, None].expand(-1, batch + 1, -1)  # as long as the longest prompt, say
        given = {"tokens": tokens, "positions": torch.arange(6.0).view(2, 3)} | (
            {} if layers is None else {"layers": layers(batch)}
        )
        noise = pipe.unet(sample, torch.tensor(0.5), **given)[0]
        pipe.scheduler.step(noise, 100, sample)

    pipe = pipelines.ddpm()
    pipe.unet = Denoiser()
    pipe.scheduler.set_timesteps(10)
    settings = Calibration(samples=5, batch_size=2, steps=1)
    trajectory = record(pipe, settings, run=run, progress=False)
    arguments, _ = trajectory.batch(torch.tensor([1, 0]))
    straight, _ = trajectory.batch(torch.tensor([0, 1]))
    assert torch.equal(arguments["positions"], torch.arange(6.0).view(2, 3))
    assert torch.equal(arguments["tokens"], straight["tokens"].flip(0)) and not torch.equal(arguments["tokens"], straight["tokens"])
    assert [call["by_row"] for call in (layout["calls"][0] for layout in trajectory._layouts)] == [
        ["sample", "timestep", "tokens"]
    ] * 3
    message = r"argument layers of shape \(2, 2, 5\) has its samples on axis 1; on axis 0 they can be recorded"
    with pytest.raises(CalibrationError, match=message):
        record(pipe, settings, run=lambda *given: run(*given, layers=lambda batch: torch.ones(2, batch, 5)), progress=False)


def test_a_sequentially_offloaded_model_is_refused(ddim):
    accelerate.cpu_offload(ddim.unet, torch.device("cpu"))
    with pytest.raises(CalibrationError, match=r"^UNet2DModel: parameter \S+ is on the meta device.* remove_all_hooks"):
        record(ddim, SMALL, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ("a cat",)}, "DDIMPipeline: does not take prompt"),
        ({"class_labels": (1,)}, "DDIMPipeline: does not take class_labels"),
        ({"guidance_scale": 3.0}, "DDIMPipeline: does not take guidance_scale"),
    ],
)
def test_conditions_a_pipeline_does_not_take_are_refused(ddim, change, message):
    with pytest.raises(CalibrationError, match=message):
        record(ddim, dataclasses.replace(SMALL, **change), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, r"calibration\.samples: is 0; at least 1"),
        ({"seed": -1}, r"calibration\.seed: is -1"),
        ({"prompts": ()}, r"calibration\.prompts: is empty"),
        ({"budget_gib": 0.0}, r"calibration\.budget_gib: is 0\.0"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(CalibrationError, match=message):
        Calibration(**change)


def test_indices_out_of_range_are_refused(recorded):
    _, trajectory = recorded["ddim"]
    with pytest.raises(CalibrationError, match="between 0 and 8"):
        trajectory.batch(torch.tensor([0, 9]))
    with pytest.raises(CalibrationError, match="1 to 9 are recorded"):
        trajectory.subset(10, torch.Generator())
