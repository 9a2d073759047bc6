"""CLIP scores by a small random CLIP in a local directory; pictures written to and read from folders."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

import diffquant as dq
from diffquant.errors import EvaluationError
from diffquant.evaluation import report as reports
from diffquant.evaluation.clip import ClipScore
from diffquant.evaluation.features import statistics_of
from diffquant.sampling.pictures import write_pictures
from tests import pipelines
from tests.test_cli import run

PROMPTS = ("a red cat", "two dogs", "x")


def small_clip(folder):
    tokenizer = pipelines._tokenizer(folder / "words")
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 12}
    config = CLIPConfig(text_config=shared | words, vision_config=shared | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_scores_are_those_of_one_picture_at_a_time(tmp_path, generator):
    scorer = ClipScore.from_directory(small_clip(tmp_path / "clip"))
    pictures = torch.randint(0, 256, (3, 3, 20, 24), generator=generator, dtype=torch.uint8)
    prompts = [*PROMPTS[:2], "a prompt that is longer than twelve tokens are, so it is cut"]
    expected = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        pixels = scorer.processor(images=image, return_tensors="pt")["pixel_values"]
        tokens = scorer.tokenizer(prompt, truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            embedding = scorer.model.visual_projection(scorer.model.vision_model(pixels).pooler_output)
            read = scorer.model.text_projection(scorer.model.text_model(**tokens).pooler_output)
        expected.append(100 * max(float(functional.cosine_similarity(embedding, read)), 0))
    result = scorer.score(pictures, prompts)
    assert len(set(expected)) > 1 and np.allclose(result.numpy(), expected, atol=1e-4)  # padding moves float32 sums
    grey = scorer.score(pictures[:, :1], prompts)
    assert torch.equal(grey, scorer.score(pictures[:, :1].repeat(1, 3, 1, 1), prompts))
    with pytest.raises(EvaluationError, match="3 pictures for 2 prompts"):
        scorer.score(pictures, prompts[:2])


def test_a_directory_without_a_clip_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="holds no model.safetensors"):
        ClipScore.from_directory(tmp_path)
    small_clip(tmp_path / "clip")
    (tmp_path / "clip" / "config.json").write_text("{}")
    with pytest.raises(EvaluationError, match="not a CLIP model with its tokenizer"):
        ClipScore.from_directory(tmp_path / "clip")


def test_unconditional_pipelines_have_no_prompts_to_score(tmp_path):
    scorer = ClipScore.from_directory(small_clip(tmp_path / "clip"))
    pipe = pipelines.ddim()
    with pytest.raises(EvaluationError, match="DDIMPipeline takes no prompts"):
        dq.evaluate(pipe, pipe, protocol=dq.SamplingProtocol(samples=2, steps=2), clip=scorer)


def test_prompts_of_a_file_reach_both_sides_and_the_clip_score(tmp_path):
    """From the command line: the same captions and noise through both; the score of the report is that of the pictures."""
    pipe = pipelines.stable_diffusion(tmp_path / "words")
    pipe.save_pretrained(tmp_path / "float")
    pipelines.freeze_by_hand(pipe.unet, 8)
    dq.save(pipe, tmp_path / "packed")
    (tmp_path / "captions.txt").write_text("\n".join(PROMPTS))
    clip = small_clip(tmp_path / "clip")
    common = ("--protocol", "guidance_scale=3", "--prompts", tmp_path / "captions.txt", "--steps", 2)
    code = run(
        "evaluate", tmp_path / "packed", "--reference", tmp_path / "float", "--out", tmp_path / "report", "--samples", 3,
        "--clip", clip, "--protocol", "accumulation_samples=0", *common,
    )  # fmt: skip
    assert code == 0
    report = reports.read(tmp_path / "report")
    assert report.protocol.sampling.prompts == PROMPTS and report.protocol.clip == "clip"
    scorer = ClipScore.from_directory(clip)
    for measurement, model in zip(report.measurements, ("float", "packed"), strict=True):
        assert run("sample", tmp_path / model, "--out", tmp_path / f"{model}.npz", "--count", 3, *common) == 0
        with np.load(tmp_path / f"{model}.npz") as stored:
            pictures = torch.from_numpy(stored["arr_0"]).permute(0, 3, 1, 2)
        assert measurement.figures["clip"].value == pytest.approx(float(scorer.score(pictures, PROMPTS).mean()), abs=1e-4)
    assert "| CLIP |" in (tmp_path / "report" / "report.md").read_text()
    assert isinstance(dq.load(tmp_path / "float"), StableDiffusionPipeline)


def test_the_command_line_records_a_protocol(tmp_path):
    pipelines.stable_diffusion(tmp_path / "words").save_pretrained(tmp_path / "float")
    (tmp_path / "captions.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "own.yaml").write_text("steps: 2\nguidance_scale: 3\nprompts: captions.txt\ncalibration: {samples: 3}\n")
    assert run("record", tmp_path / "float", "--out", tmp_path / "recording", "--protocol", tmp_path / "own.yaml") == 0
    recorded = json.loads((tmp_path / "recording" / "manifest.json").read_text())["calibration"]
    assert (recorded["samples"], recorded["steps"], recorded["guidance_scale"]) == (3, 2, 3)
    assert recorded["prompts"] == list(PROMPTS)


class Means:
    """An extractor whose features are the means of the channels."""

    name, sha256 = "means", "m0"

    def features(self, pictures):
        return pictures.double().mean(dim=(2, 3))

    def confidence(self, pictures):
        return None

    def agreement(self, pictures, conditions):
        return None


def test_pictures_written_are_the_pictures_read(tmp_path, generator):
    pictures = torch.randint(0, 256, (3, 3, 6, 5), generator=generator, dtype=torch.uint8)
    write_pictures(pictures, tmp_path / "drawn")
    result = statistics_of(tmp_path / "drawn", Means())
    assert torch.equal(result.features, Means().features(pictures)) and len(result.sha256) == 64
    Image.new("L", (4, 9)).save(tmp_path / "drawn" / "other.png")  # of another size, and grey
    assert len(statistics_of(tmp_path / "drawn", Means()).features) == 4
    (tmp_path / "drawn" / "broken.png").write_text("no picture")
    with pytest.raises(EvaluationError, match="broken.png: cannot be read"):
        statistics_of(tmp_path / "drawn", Means())
    with pytest.raises(EvaluationError, match="holds no pictures"):
        statistics_of(tmp_path / "empty", Means())


def test_pictures_never_mix_with_others_and_need_a_folder(tmp_path):
    pictures = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    write_pictures(pictures, tmp_path / "drawn")
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "drawn", "drawn: is a folder with files in it"),
        (tmp_path / "file", "file: is a file"),
        (tmp_path / "missing" / "x.npz", "missing is no folder"),
    ):
        with pytest.raises(EvaluationError, match=message):
            write_pictures(pictures[:1], path)
    write_pictures(pictures, tmp_path / "x.npz")
    write_pictures(pictures[:1], tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (1, 4, 4, 3)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["drawn", "file", "x.npz"]
