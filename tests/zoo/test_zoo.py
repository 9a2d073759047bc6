"""The shipped reference model is what it says; training resumes bit-equal; bad input is one line."""

import json
import subprocess
import sys

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from torch import nn

from diffquant import zoo
from diffquant.calibration import fit
from diffquant.errors import ZooError
from diffquant.evaluation.sampling import sample
from diffquant.evaluation.sampling_protocol import SamplingProtocol
from diffquant.zoo import models
from diffquant.zoo.data import Letters, draw_letters, render_font, render_letters
from diffquant.zoo.prompts import LETTERS
from diffquant.zoo.train import denoising_loss, train, warm_constant_decay


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
    assert statistics.features.shape == (models.DATA_SAMPLES, models.FEATURES)
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


def test_fonts_that_cannot_be_used_are_passed_over(tmp_path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"not a font")
    assert render_font(broken) is None
    with pytest.raises(ZooError, match="0 usable fonts below .*; at least 50 are needed; install the font packages"):
        render_letters((tmp_path,))


def box_font(path):
    """A font whose letters are boxes, 700 units high and of 26 widths."""
    builder = FontBuilder(unitsPerEm=1000)
    builder.setupGlyphOrder([".notdef", *LETTERS])
    builder.setupCharacterMap({ord(letter): letter for letter in LETTERS})
    glyphs = {".notdef": TTGlyphPen(None).glyph()}
    for index, letter in enumerate(LETTERS):
        pen = TTGlyphPen(None)
        right = 100 + 20 * index
        pen.moveTo((0, 0))
        for corner in ((0, 700), (right, 700), (right, 0)):
            pen.lineTo(corner)
        pen.closePath()
        glyphs[letter] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (1000, 0) for name in glyphs})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Box", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_letters_are_drawn_at_any_size(tmp_path):
    box_font(tmp_path / "box.ttf")
    assert render_font(tmp_path / "box.ttf") is None  # some boxes are equal at 32x32
    for size in (32, 64):
        ink = draw_letters(tmp_path / "box.ttf", size) < 128
        assert ink.shape == (26, size, size)
        assert (ink.any(axis=2).sum(axis=1) == 0.75 * size).all()  # the longer side, the height


def test_split_keeps_fonts_apart():
    fonts = torch.arange(20).repeat_interleave(len(LETTERS))
    letters = Letters(torch.zeros(len(fonts), 32, 32, dtype=torch.uint8), torch.arange(26).repeat(20), fonts, ("x",) * 20)
    training, held_out = letters.split()
    assert set(held_out.fonts.tolist()) == {0, 10} and not set(training.fonts.tolist()) & {0, 10}
    assert training.samples().max() == -1.0


def test_training_resumes_bit_equal(tmp_path):
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x, timestep):
            return type("Output", (), {"sample": self.layer(x)})

    loss = denoising_loss(torch.randn(16, 1, 8, 8), torch.linspace(0.99, 0.01, 10), batch=4)

    def run_training(steps: int, folder) -> torch.Tensor:
        model = Denoiser()
        with fit.run(folder, show=False) as run:
            train(model, loss, steps=steps, peak_rate=0.1, seed=0, run=run)
        return model.layer.weight.detach()

    whole = run_training(40, tmp_path / "whole")
    folder = tmp_path / "killed"

    def stop_at_30(model, generator, calls=[0]):  # noqa: B006
        calls[0] += 1
        if calls[0] == 31:
            raise KeyboardInterrupt
        return loss(model, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffquant.zoo.train.CURVE_STRIDE", 10)
        with fit.run(folder, show=False) as run, pytest.raises(KeyboardInterrupt):
            train(Denoiser(), stop_at_30, steps=40, peak_rate=0.1, seed=0, run=run)
        assert (folder / "fit.safetensors").exists()
        assert torch.equal(run_training(40, folder), whole)


def test_the_rate_warms_up_stays_and_falls():
    rates = [warm_constant_decay(step, 1000) for step in range(1000)]
    assert rates[0] == 1 / 200 and rates[500] == 1.0 and rates[799] == 1.0 and rates[999] == 1 / 200


def test_the_command_line_starts_without_what_only_training_needs():
    """diffusers imports a pipeline's parts when it is named, and some of them complain of packages that are not there."""
    code = "import sys, diffquant.cli; print([name for name in sys.modules if 'pipeline_stable_diffusion' in name])"
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert started.stdout.strip() == "[]" and "torchvision" not in started.stderr
