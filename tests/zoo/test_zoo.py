"""The shipped reference models are what they say, and others are refused in one line."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from diffquant import zoo
from diffquant.errors import ZooError
from diffquant.sampling.protocol import SamplingProtocol
from diffquant.sampling.sample import sample
from diffquant.zoo import models
from diffquant.zoo.prompts import LETTERS, labels_of


def test_weights_are_the_ones_that_comparisons_rest_on():
    fixed = json.loads((models.folder() / "hashes.json").read_text())
    assert set(fixed) == {path.name for path in models.folder().iterdir() if path.is_dir()} <= set(models.NAMES)
    for name, files in fixed.items():
        weights = {str(path.relative_to(models.folder() / name)) for path in (models.folder() / name).rglob("*.safetensors")}
        assert weights <= set(files)
        for file, sha256 in files.items():
            assert models.file_hash(models.folder() / name / file) == sha256


def test_sizes_are_within_the_package_budget():
    def size(name: str) -> int:
        return sum(path.stat().st_size for path in (models.folder() / name).rglob("*") if path.is_file())

    assert (models.folder() / "glyph-classifier" / "model.safetensors").stat().st_size <= 1_000_000
    assert size("glyph-ddim") + size("glyph-classifier") <= 10_000_000


def test_samples_are_legible():
    """A few steps suffice for letters that the classifier names with confidence."""
    pipe, features = zoo.load("glyph-ddim"), zoo.load("glyph-classifier")
    pictures = sample(pipe, SamplingProtocol(samples=8, steps=10, seed=0)).pictures
    confidence = features.confidence(pictures)
    assert confidence.median() > 0.5  # 1/26 is chance


def test_prompts_are_obeyed():
    """Letters and style words: of 8 pictures the letter asked for, and bold ones are blacker than light ones."""
    pipe, features = zoo.load("glyph-sd"), zoo.load("glyph-classifier")
    prompts = tuple(f"{style} sans letter {letter}" for style in ("bold", "light") for letter in "EHNZ")
    protocol = SamplingProtocol(samples=8, steps=10, batch_size=8, seed=0, prompts=prompts, guidance_scale=3.0)
    pictures = sample(pipe, protocol).pictures
    assert features.agreement(pictures, prompts).mean() >= 0.75  # 1/26 is chance
    ink = (255 - pictures.float()).mean(dim=(1, 2, 3))
    assert ink[:4].mean() > 1.5 * ink[4:].mean()


def test_labels_are_obeyed():
    """Of 8 pictures the letter asked for; and a label is not a prompt: the pipeline knows the letters' names."""
    pipe, features = zoo.load("glyph-dit"), zoo.load("glyph-classifier")
    labels = tuple(pipe.get_label_ids(list("EHNZAKSX")))
    assert labels == (4, 7, 13, 25, 0, 10, 18, 23)
    protocol = SamplingProtocol(samples=8, steps=10, batch_size=8, seed=0, class_labels=labels, guidance_scale=3.0)
    assert features.agreement(sample(pipe, protocol).pictures, labels).mean() >= 0.75  # 1/26 is chance


def test_statistics_fit_the_classifier():
    statistics = zoo.load_statistics()
    assert statistics.features.shape == (8192, models.FEATURES)
    assert torch.isfinite(statistics.features).all()


def test_unknown_and_altered_models_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ZooError, match="zoo: 'glyph' is unknown; allowed are glyph-ddim, glyph-sd, glyph-dit, glyph-classifier"):
        zoo.load("glyph")
    (tmp_path / "glyph-classifier").mkdir()
    (tmp_path / "glyph-classifier" / "model.safetensors").write_bytes(b"other")
    (tmp_path / "hashes.json").write_text(json.dumps({"glyph-classifier": {"model.safetensors": "0" * 64}}))
    monkeypatch.setattr(models, "folder", lambda: tmp_path)
    with pytest.raises(ZooError, match="is not the file that comparisons rest on"):
        zoo.load("glyph-classifier")


def test_load_checks_hashes_and_computes_in_float32(tmp_path, monkeypatch):
    file = "unet/diffusion_pytorch_model.safetensors"
    shutil.copytree(models.folder() / "glyph-sd", tmp_path / "glyph-sd")
    monkeypatch.setattr(models, "folder", lambda: tmp_path)
    hashes = {"glyph-sd": {file: models.file_hash(tmp_path / "glyph-sd" / file)}}
    (tmp_path / "hashes.json").write_text(json.dumps(hashes))
    pipe = zoo.load("glyph-sd")
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    hashes["glyph-sd"][file] = "0" * 64
    (tmp_path / "hashes.json").write_text(json.dumps(hashes))
    with pytest.raises(ZooError, match="is not the file that comparisons rest on"):
        zoo.load("glyph-sd")


def test_missing_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "folder", lambda: tmp_path)
    with pytest.raises(ZooError, match="glyph-sd is missing; it comes with the package; install the package again"):
        zoo.load("glyph-sd")


def test_classifier_reads_both_sizes():
    """A picture of 64x64 whose pixels are those of 32x32, each four times, is the same picture."""
    features = zoo.load("glyph-classifier")
    small = torch.randint(256, (4, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).expand(-1, 3, -1, -1)
    expected = features.classifier.penultimate(models.to_samples(small))
    torch.testing.assert_close(features.features(small), expected)
    torch.testing.assert_close(features.features(large), expected)
    labels = features.classifier.head(expected).argmax(dim=1)
    assert features.agreement(large, labels.tolist()).tolist() == [1.0] * len(labels)
    assert features.agreement(large, [f"bold letter {LETTERS[label]}" for label in labels]).mean() == 1.0
    wrong = torch.cat([labels[:3], (labels[3:] + 1) % 26])
    assert features.agreement(large, wrong.tolist()).mean() == 0.75


def test_a_prompt_asks_for_its_last_word():
    assert labels_of(["bold letter G", "letter g", "a"]).tolist() == [6, 6, 0]
    for prompt in ("", "letter", "letter AB"):
        with pytest.raises(ZooError, match=f"prompt '{prompt}': names no letter; allowed are prompts that end in one"):
            labels_of([prompt])


def test_the_command_line_starts_without_pipelines_that_were_not_asked_for():
    """diffusers imports a pipeline's parts when it is named, and some of them complain of packages that are not there."""
    code = "import sys, diffquant.cli; print([name for name in sys.modules if 'pipeline_stable_diffusion' in name])"
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert started.stdout.strip() == "[]" and "torchvision" not in started.stderr
