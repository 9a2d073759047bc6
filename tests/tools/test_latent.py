"""The latent reference models: dropout as stated, stock directories, resumed training, and the shipped weights fit in."""

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, StableDiffusionPipeline
from torch import nn

from diffquant import zoo
from diffquant.calibration import fit
from diffquant.host.conditions import default_prompts
from diffquant.zoo.prompts import LETTERS
from tools.train_zoo import latent, loop, losses, models
from tools.train_zoo.prompts import DEFAULT_PROMPTS, tokenize, tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Both pipelines, untrained, as training writes them."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    for name, build in (("glyph-sd", latent.glyph_sd), ("glyph-dit", latent.glyph_dit)):
        latent.save(build(latent.glyph_vae()), folder / name)
    return folder


def test_words_and_labels_are_dropped_as_often_as_stated(letters):
    words, count = tokenizer(), 20_000
    picked = torch.randint(len(letters.labels), (count,), generator=torch.Generator().manual_seed(1))
    tokens = latent.prompt_condition(letters, words)(picked, torch.Generator().manual_seed(0))
    bold = (tokens == words.convert_tokens_to_ids("bold</w>")).any(dim=1)
    empty = (tokens == tokenize(words, [""])).all(dim=1)
    of_bold_font = letters.fonts[picked] % 2 == 0
    assert not bold[~of_bold_font].any()
    # shares of 20,000 (10,000): a standard error of 0.002 (0.005), four of them allowed
    assert abs(empty.float().mean() - latent.PROMPT_DROP) < 0.009
    assert abs(bold[of_bold_font].float().mean() - (1 - latent.STYLE_DROP) * (1 - latent.PROMPT_DROP)) < 0.02
    letter = tokens.gather(1, (tokens == words.convert_tokens_to_ids("letter</w>")).int().argmax(dim=1, keepdim=True) + 1)[:, 0]
    expected = torch.tensor(words.convert_tokens_to_ids([f"{name.lower()}</w>" for name in LETTERS]))[letters.labels[picked]]
    assert torch.equal(letter[~empty], expected[~empty])

    labels = latent.label_condition(letters)(picked, torch.Generator().manual_seed(0))
    null = labels == latent.NULL_LABEL
    assert abs(null.float().mean() - latent.LABEL_DROP) < 0.009
    assert torch.equal(labels[~null], letters.labels[picked][~null])


def test_written_pipelines_are_stock_and_sample(written):
    for name, kind, asked in (
        ("glyph-sd", StableDiffusionPipeline, {"prompt": ["bold letter G", "letter A"]}),
        ("glyph-dit", DiTPipeline, {"class_labels": [6, 0]}),
    ):
        pipe = DiffusionPipeline.from_pretrained(written / name)
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe) is kind
        assert {module.dtype for module in pipe.components.values() if isinstance(module, nn.Module)} == {torch.float32}
        pictures = pipe(**asked, num_inference_steps=2, guidance_scale=2.0, output_type="np").images
        assert pictures.shape == (2, 64, 64, 3)
    assert pipe.get_label_ids(["A", "Z"]) == [0, 25]


def test_pipelines_are_within_the_package_budget(written):
    """Ten million bytes of float16, without the label rows of zeros, which a wheel compresses away."""
    total = sum(path.stat().st_size for path in written.rglob("*.safetensors"))
    tables = [
        block.norm1.emb.class_embedder.embedding_table.weight
        for block in latent.glyph_dit(latent.glyph_vae()).transformer.transformer_blocks
    ]
    assert all((table[len(LETTERS) : latent.NULL_LABEL] == 0).all() for table in tables)
    zeros = sum(table[len(LETTERS) : latent.NULL_LABEL].numel() for table in tables)
    assert total - 2 * zeros <= 10_000_000


def test_training_from_the_autoencoder_to_the_pipelines(letters, tmp_path):
    """Each of the three trainings, one step, through the entry point of the command line."""
    letters = letters._subset(letters.labels < 1)
    figures = {name: models.train_model(name, letters, tmp_path, 1, 0) for name in ("glyph-vae", "glyph-sd", "glyph-dit")}
    latents = latent.encode(latent.trained_vae(tmp_path), letters.split()[0].pictures)
    assert latents.dtype == torch.float16 and latents.shape[1:] == (4, 16, 16)
    assert abs(latents.float().std() - 1) < 1e-3  # float16 has 11 bits
    assert figures["glyph-vae"]["scaling_factor"] == latent.trained_vae(tmp_path).config.scaling_factor
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "glyph-dit")
    assert pipe.vae.config.scaling_factor == figures["glyph-vae"]["scaling_factor"]
    assert not [file for file in tmp_path.rglob("*.json") if str(tmp_path) in file.read_text()]  # says nothing of where it was made


@pytest.mark.parametrize("name", ["glyph-sd", "glyph-dit"])
def test_training_resumes_bit_equal(name, letters, tmp_path):
    """Text encoder and UNet together, and the transformer, whose own label dropout would draw from the global generator."""
    latents = torch.randn(len(letters.labels), 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()

    def train_steps(folder, stop_after=None):
        torch.manual_seed(0)
        pipe = getattr(latent, name.replace("-", "_"))(latent.glyph_vae())
        alphas = pipe.scheduler.alphas_cumprod
        if name == "glyph-sd":
            model = latent.TextDenoiser(pipe)
            loss = losses.denoising_loss(latents, alphas, 1, latent.prompt_condition(letters, pipe.tokenizer))
        else:
            model, loss = latent.LabelDenoiser(pipe), losses.hybrid_loss(latents, alphas, 1, latent.label_condition(letters))
        calls = []

        def stopping(module, generator):
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(1)
            return loss(module, generator)

        with fit.run(folder, show=False) as run:
            loop.train(model, stopping, steps=3, peak_lr=1e-2, seed=0, run=run)
        return nn.utils.parameters_to_vector(model.parameters())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "CURVE_STRIDE", 1)
        whole = train_steps(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            train_steps(tmp_path / "killed", stop_after=2)
        torch.rand(7)  # what else the process draws must not matter
        assert torch.equal(train_steps(tmp_path / "killed"), whole)


def test_default_prompts_go_with_the_pipeline_wherever_it_is_saved(tmp_path):
    zoo.load("glyph-sd").save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert default_prompts(pipe) == DEFAULT_PROMPTS == default_prompts(latent.glyph_sd(latent.glyph_vae()))
    pipe.default_prompts = ("letter Q",)
    assert default_prompts(pipe) == ("letter Q",)
