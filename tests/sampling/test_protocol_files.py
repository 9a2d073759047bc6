"""Protocol files: what is shipped, how values override each other, and what is recorded and sampled under them."""

import pytest
import torch
from diffusers import DDPMPipeline

from diffquant.calibration.record import record
from diffquant.errors import EvaluationError
from diffquant.files import shipped
from diffquant.host.conditions import Calibration
from diffquant.host.scheduler import SCHEDULERS
from diffquant.sampling.protocol import SamplingProtocol
from diffquant.sampling.protocol_files import RECORDED, load_protocol, recording_scheduler
from tests import pipelines


def record_under(pipe, protocol):
    with recording_scheduler(pipe, protocol):
        return record(pipe, protocol.calibration, progress=False)


def test_without_anything_given_they_are_the_defaults():
    protocol = load_protocol()
    assert protocol.sampling == SamplingProtocol() and protocol.calibration == Calibration(samples=RECORDED)


@pytest.mark.parametrize(
    ("name", "steps", "sampler", "eta", "guidance"),
    [
        ("cifar10-ddim", 100, "ddim", 0, None),
        ("bedrooms-ldm4", 200, "ddim", 1, None),
        ("churches-ldm8", 400, "ddim", 0, None),
        ("imagenet-ldm4", 20, "ddim", 0, 3.0),
        ("stable-diffusion-coco", 50, "pndm", 0, 7.5),
    ],
)
def test_shipped_protocols(name, steps, sampler, eta, guidance):
    protocol = load_protocol([name])
    sampling, recorded = protocol.sampling, protocol.calibration
    assert (sampling.steps, sampling.sampler, sampling.eta, sampling.guidance_scale) == (steps, sampler, eta, guidance)
    assert recorded.guidance_scale == guidance and (recorded.eta or 0) == eta
    assert name in shipped("protocols") and protocol.name == name and protocol.source


def test_later_values_win_and_options_win_over_all():
    protocol = load_protocol(["imagenet-ldm4", "eta=1", "steps=10", "steps=12", "calibration.samples=8"], guidance_scale=2.0)
    assert (protocol.sampling.eta, protocol.sampling.steps, protocol.sampling.guidance_scale) == (1, 12, 2.0)
    assert protocol.calibration == Calibration(samples=8, steps=12, batch_size=16, guidance_scale=2.0, eta=1, budget_gib=16.0)
    assert load_protocol(["imagenet-ldm4"], calibration__steps=3, steps=7).calibration.steps == 3


def test_clipping_of_recordings_and_samples():
    protocol = load_protocol(["clip_sample=false"])
    assert protocol.sampling.clip_sample is False and protocol.calibration.clip_sample is False
    protocol = load_protocol(["calibration.clip_sample=false"])
    assert protocol.sampling.clip_sample is None and protocol.calibration.clip_sample is False


def test_a_file_of_ones_own_finds_its_prompts_and_data_beside_it(tmp_path):
    (tmp_path / "captions.txt").write_text("a cat\n\n a dog \n")
    (tmp_path / "own.yaml").write_text("steps: 7\nprompts: captions.txt\ndata: real\n")
    protocol = load_protocol([str(tmp_path / "own.yaml")])
    assert protocol.sampling.prompts == protocol.calibration.prompts == ("a cat", "a dog")
    assert protocol.sampling.steps == 7 and protocol.data == tmp_path / "real"
    assert load_protocol([str(tmp_path / "own.yaml"), "prompts=builtin"]).sampling.prompts is None


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["imagenet-ldm"], 'did you mean "imagenet-ldm4"'),
        (["nowhere.yaml"], "no such file"),
        (["imagenet-ldm4", "cifar10-ddim"], "one name or file is allowed"),
        (["stepz=3"], "stepz: unknown key; allowed are samples, steps"),
        (["calibration.stepz=3"], "calibration: stepz: unknown key"),
        (["a.b=3"], "leads nowhere"),
        (["sampler=dim"], 'is "dim"; allowed: pipeline, ddim'),
        (["steps=many"], "sampling.steps: Input should be a valid integer"),
        (["prompts=nowhere.txt"], "nowhere.txt': no such file"),
    ],
)
def test_what_is_wrong_is_named(texts, message):
    with pytest.raises(EvaluationError, match=message):
        load_protocol(texts)


def test_an_empty_list_of_prompts_is_refused(tmp_path):
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(EvaluationError, match="holds no line"):
        load_protocol(prompts=tmp_path / "none.txt")


def test_a_recording_takes_the_sampler_and_the_prompts(tmp_path):
    pipe = pipelines.stable_diffusion(tmp_path)
    own = type(pipe.scheduler)
    protocol = load_protocol(["sampler=pndm", "steps=5", "guidance_scale=3"], calibration__samples=2)
    data = record_under(pipe, protocol)
    assert data.manifest["scheduler"]["class"] == SCHEDULERS["pndm"].__name__ and type(pipe.scheduler) is own
    assert data.manifest["calibration"]["guidance_scale"] == 3
    with pytest.raises(EvaluationError, match="DDIMPipeline itself, which is recorded, takes ddim only"):
        record_under(pipelines.ddim(), load_protocol(["sampler=euler"]))
    with pytest.raises(EvaluationError, match="DDPMPipeline takes none; record with eta=0"):
        record_under(pipelines.ddpm(), load_protocol(["sampler=ddim", "eta=0.5"]))


def test_a_ddpm_pipeline_is_recorded_with_ddim():
    """As converted CIFAR-10 checkpoints come."""
    pipe = pipelines.ddpm()
    assert isinstance(pipe, DDPMPipeline)
    data = record_under(pipe, load_protocol(["cifar10-ddim", "steps=3"], calibration__samples=2))
    assert data.manifest["scheduler"]["class"] == "DDIMScheduler" and data.step_count == 3
    assert torch.isfinite(data.step(torch.arange(2), 2).prev_sample).all()
