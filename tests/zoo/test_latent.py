"""The latent reference models: losses and dropout as derived, stock directories, resumed training."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, StableDiffusionPipeline
from torch import nn
from torch.distributions import Normal, kl_divergence

from diffquant import zoo
from diffquant.calibration import fit
from diffquant.errors import ZooError
from diffquant.host.conditions import default_prompts
from diffquant.zoo import latent, models, train
from diffquant.zoo.data import Letters
from diffquant.zoo.prompts import DEFAULT_PROMPTS, LETTERS, labels_of, prompt_of, tokenize, tokenizer


@pytest.fixture(scope="module")
def letters() -> Letters:
    """Twenty fonts of noise, every other one bold."""
    count = 20 * len(LETTERS)
    pictures = torch.randint(256, (count, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fonts = torch.arange(20).repeat_interleave(len(LETTERS))
    return Letters(pictures, torch.arange(26).repeat(20), fonts, ("x",) * 20, ("bold", "") * 10)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Both pipelines, untrained, as training writes them."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    for name, build in (("glyph-sd", latent.glyph_sd), ("glyph-dit", latent.glyph_dit)):
        latent.save(build(latent.glyph_vae()), folder / name)
    return folder


@pytest.mark.parametrize("timestep", [1, 500, 999])
@pytest.mark.parametrize("variance", [-1.0, 0.3, 1.0])
def test_variance_term_is_the_divergence_of_two_normals(timestep, variance):
    """Eq. 10 to 15 of arXiv 2102.09672, with the means computed from the clean sample rather than from the noise."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    signal = torch.cumprod(1 - beta, 0)
    clean, noise, predicted = torch.randn(3, 1, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noisy = signal[timestep].sqrt() * clean + (1 - signal[timestep]).sqrt() * noise

    def posterior_mean(clean):
        of_clean = signal[timestep - 1].sqrt() * beta[timestep] / (1 - signal[timestep])
        of_noisy = (1 - beta[timestep]).sqrt() * (1 - signal[timestep - 1]) / (1 - signal[timestep])
        return of_clean * clean + of_noisy * noisy

    guess = (noisy - (1 - signal[timestep]).sqrt() * predicted) / signal[timestep].sqrt()
    true_variance = beta[timestep] * (1 - signal[timestep - 1]) / (1 - signal[timestep])
    share = (variance + 1) / 2
    model_variance = (share * beta[timestep].log() + (1 - share) * true_variance.log()).exp()
    expected = kl_divergence(
        Normal(posterior_mean(clean), true_variance.sqrt()), Normal(posterior_mean(guess), model_variance.sqrt())
    )
    found = train.variance_term(noise, predicted, torch.full_like(noise, variance), torch.tensor([timestep]), signal)
    # error of the means: 1 / signal enlarges rounding in the expected value at the last timestep
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_variance_term_is_zero_for_the_true_step_and_at_timestep_0():
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    noise, other = torch.randn(2, 3, 4, 2, 2)
    posterior = torch.full_like(noise, -1.0)
    assert train.variance_term(noise, noise, posterior, torch.tensor([1, 500, 999]), signal).abs().max() < 1e-6
    assert (train.variance_term(noise, other, posterior, torch.tensor([0, 0, 0]), signal) == 0).all()


def test_the_bound_moves_only_the_variance(letters):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.output = nn.Parameter(torch.zeros(1, 8, 1, 1))

        def forward(self, noisy, timestep, labels):
            return type("Output", (), {"sample": self.output.expand(len(noisy), 8, *noisy.shape[2:])})

    latents, alphas = torch.randn(8, 4, 4, 4), torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    def gradient(weight):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "VARIANCE_WEIGHT", weight)
            model = Constant()
            loss = train.hybrid_loss(latents, alphas, 16, latent.label_condition(letters))
            loss(model, torch.Generator().manual_seed(0)).backward()
            return model.output.grad.flatten()

    with_bound, without = gradient(1e-3), gradient(0.0)
    assert torch.equal(with_bound[:4], without[:4]) and (without[4:] == 0).all() and (with_bound[4:] != 0).all()


@pytest.mark.parametrize("kind", ["denoising_loss", "hybrid_loss"])
def test_errors_at_little_noise_count_less(kind, letters, monkeypatch):
    """Min-SNR weights by hand: 5 over the signal-to-noise ratio where that is larger."""
    monkeypatch.setattr(train, "VARIANCE_WEIGHT", 0.0)
    alphas, condition = torch.tensor([0.99, 0.9, 0.5]), latent.label_condition(letters)  # ratios 99, 9, 1
    latents, outputs = torch.zeros(len(letters.labels), 4, 16, 16), 8 if kind == "hybrid_loss" else 4

    class Nothing(nn.Module):
        def forward(self, noisy, *_):
            return SimpleNamespace(sample=torch.zeros(len(noisy), outputs, 16, 16))

    drawn = train.add_noise(latents, alphas, 16, torch.Generator().manual_seed(0), condition)
    assert set(drawn.timestep.tolist()) == {0, 1, 2}
    wanted = (torch.tensor([5 / 99, 5 / 9, 1.0])[drawn.timestep] * drawn.noise.square().mean(dim=(1, 2, 3))).mean()
    found = getattr(train, kind)(latents, alphas, 16, condition)(Nothing(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)  # 1 - 0.99 in float32 has an error of 6e-6


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


def test_load_checks_hashes_and_computes_in_float32(written, monkeypatch):
    file = "unet/diffusion_pytorch_model.safetensors"
    monkeypatch.setattr(models, "folder", lambda: written)
    hashes = {"glyph-sd": {file: models.file_hash(written / "glyph-sd" / file)}}
    (written / "hashes.json").write_text(json.dumps(hashes))
    pipe = zoo.load("glyph-sd")
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    hashes["glyph-sd"][file] = "0" * 64
    (written / "hashes.json").write_text(json.dumps(hashes))
    with pytest.raises(ZooError, match="is not the file that comparisons rest on"):
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
    assert features.agreement(large, [prompt_of("bold", int(label)) for label in labels]).mean() == 1.0
    wrong = torch.cat([labels[:3], (labels[3:] + 1) % 26])
    assert features.agreement(large, wrong.tolist()).mean() == 0.75


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
            loss = train.denoising_loss(latents, alphas, 1, latent.prompt_condition(letters, pipe.tokenizer))
        else:
            model, loss = latent.LabelDenoiser(pipe), train.hybrid_loss(latents, alphas, 1, latent.label_condition(letters))
        calls = []

        def stopping(module, generator):
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(1)
            return loss(module, generator)

        with fit.run(folder, show=False) as run:
            train.train(model, stopping, steps=3, peak_rate=1e-2, seed=0, run=run)
        return nn.utils.parameters_to_vector(model.parameters())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CURVE_STRIDE", 1)
        whole = train_steps(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            train_steps(tmp_path / "killed", stop_after=2)
        torch.rand(7)  # what else the process draws must not matter
        assert torch.equal(train_steps(tmp_path / "killed"), whole)


def test_default_prompts_go_through_the_letters():
    assert len(set(DEFAULT_PROMPTS)) == 6 * 26 and DEFAULT_PROMPTS[:2] == ("letter A", "bold sans letter B")
    assert labels_of(DEFAULT_PROMPTS).tolist() == list(range(26)) * 6


def test_default_prompts_go_with_the_pipeline_wherever_it_is_saved(tmp_path):
    zoo.load("glyph-sd").save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert default_prompts(pipe) == DEFAULT_PROMPTS == default_prompts(latent.glyph_sd(latent.glyph_vae()))
    pipe.default_prompts = ("letter Q",)
    assert default_prompts(pipe) == ("letter Q",)
