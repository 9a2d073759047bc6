"""The reference models: what they are made of, how they are trained, and where their weights lie.

Everything that comparisons rest on is fixed here, with the hashes of the weights in ``hashes.json``: the denoiser, the classifier
whose features stand behind FID and KID, and the features of the real letters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, final

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffquant.calibration.fit import run
from diffquant.errors import ZooError
from diffquant.evaluation.features import DataStatistics
from diffquant.evaluation.metrics import accuracy, confidence
from diffquant.zoo.data import LARGE_SIZE, SIZE, Letters, to_samples
from diffquant.zoo.prompts import LETTERS, labels_of
from diffquant.zoo.train import classification_loss, denoising_loss, train, two_rounds

PIPELINES = ("glyph-ddim", "glyph-sd", "glyph-dit")
NAMES = (*PIPELINES, "glyph-classifier")
TRAINABLE = (*NAMES, "glyph-vae")  # the autoencoder comes inside of the pipelines
FEATURES = 64  # width of the classifier's penultimate layer, the feature space of FID and KID
STATISTICS = "letters.safetensors"
DEFAULT_STEPS = {"glyph-ddim": 10000, "glyph-classifier": 2000, "glyph-vae": 2500, "glyph-sd": 6500, "glyph-dit": 7500}
DATA_SAMPLES = 8192  # real letters whose features are shipped


def glyph_unet() -> UNet2DModel:
    """The architecture of ``glyph-ddim``: 1.8 M parameters, three resolutions with skips, attention at 8x8."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )


@final
class GlyphClassifier(nn.Module):
    """Names the letter of a 32x32 picture; 26 logits, and 64 features before them."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU(), nn.MaxPool2d(2))

        self.stages = nn.Sequential(stage(1, 32), stage(32, 64), stage(64, 96))  # 32 -> 16 -> 8 -> 4 pixels
        self.project = nn.Linear(96 * 16, FEATURES)
        self.head = nn.Linear(FEATURES, len(LETTERS))

    def penultimate(self, samples: Float[Tensor, "n 1 32 32"]) -> Float[Tensor, "n features"]:
        """Features of samples in [-1, 1]."""
        features: Tensor = nn.functional.silu(self.project(self.stages(samples).flatten(1)))
        return features

    def forward(self, samples: Float[Tensor, "n 1 32 32"]) -> Float[Tensor, "n letters"]:
        """Logits of samples in [-1, 1]."""
        logits: Tensor = self.head(self.penultimate(samples))
        return logits


@final
class GlyphFeatures:
    """The classifier as a feature extractor for the evaluation; its confidence is the legibility score."""

    name = "glyph-classifier"

    def __init__(self, classifier: GlyphClassifier, sha256: str) -> None:
        self.classifier, self.sha256 = classifier.eval(), sha256

    @torch.no_grad()
    def features(self, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Penultimate features of pictures, grey or RGB, 32x32 or a multiple of it."""
        return self.classifier.penultimate(_samples(pictures))

    @torch.no_grad()
    def confidence(self, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " n"] | None:
        """Probability of the letter that the classifier finds most likely."""
        return confidence(self.classifier(_samples(pictures)))

    @torch.no_grad()
    def agreement(self, pictures: UInt8[Tensor, "n c h w"], conditions: Sequence[str | int]) -> Float[Tensor, " n"]:
        """1 for a picture of the letter that its prompt names or its class label is, else 0."""
        prompts = [condition for condition in conditions if isinstance(condition, str)]
        labels = labels_of(prompts) if prompts else torch.tensor(conditions)
        right: Tensor = self.classifier(_samples(pictures)).argmax(dim=1) == labels
        return right.float()


def _samples(pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n 1 32 32"]:
    """What the classifier sees: the mean over channels and over the pixels that fall into one of 32x32."""
    return nn.functional.adaptive_avg_pool2d(to_samples(pictures).mean(dim=1, keepdim=True), SIZE)


def check_name(name: str, allowed: tuple[str, ...] = NAMES) -> None:
    """Raises `ZooError` unless `name` is one of `allowed`."""
    if name not in allowed:
        raise ZooError(f"zoo: {name!r} is unknown; allowed are {', '.join(allowed)}")


def folder() -> Path:
    """The folder of the package that holds the weights."""
    return Path(str(resources.files("diffquant") / "zoo" / "weights"))


def path(name: str) -> Path:
    """The pipeline directory of the reference model `name`. Raises `ZooError` for unknown names and missing weights."""
    check_name(name)
    found = folder() / name
    if not found.is_dir():
        raise ZooError(f"zoo: the weights of {name} are not installed; train them with: diffquant zoo train {name}")
    return found


def load(name: str) -> Any:
    """A reference model: ``glyph-classifier`` as `GlyphFeatures`, the others as stock pipelines in float32.

    Raises `ZooError` for an unknown name, and when the weights are not those that `hashes.json` fixes.
    """
    found = path(name)
    _check_hash(name, found)
    if name == "glyph-classifier":
        classifier = GlyphClassifier()
        classifier.load_state_dict(load_file(found / "model.safetensors"))
        return GlyphFeatures(classifier, file_hash(found / "model.safetensors"))
    pipe = DiffusionPipeline.from_pretrained(found, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_statistics() -> DataStatistics:
    """Features of real letters under the shipped classifier."""
    file = path("glyph-classifier") / STATISTICS
    return DataStatistics(features=load_file(file)["features"].float(), sha256=file_hash(file))


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _check_hash(name: str, found: Path) -> None:
    recorded = folder() / "hashes.json"
    fixed = json.loads(recorded.read_text()).get(name, {}) if recorded.exists() else {}
    for file, sha256 in fixed.items():
        if not (found / file).exists() or file_hash(found / file) != sha256:
            raise ZooError(f"zoo: {found / file} is not the file that comparisons rest on; install the package again")


def train_glyph_ddim(letters: Letters, out: Path, steps: int, seed: int, compiled: bool = False) -> None:
    """Train the denoiser on the letters and write it as a stock `DDIMPipeline` directory; resumes what `out` holds.

    `compiled` trains through `torch.compile`: 1.4 times as fast on 2 cores, and needs a C++ compiler.
    """
    torch.manual_seed(seed)
    unet = glyph_unet().to(memory_format=torch.channels_last)
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True)
    if compiled:
        unet.compile()
    loss = denoising_loss(letters.split()[0].samples(), scheduler.alphas_cumprod, batch=32)
    with run(out / "training") as where:
        train(unet, loss, steps=steps, peak_rate=1e-3, seed=seed, run=where, schedule=two_rounds)
    DDIMPipeline(unet=unet.to(memory_format=torch.contiguous_format), scheduler=scheduler).save_pretrained(out / "glyph-ddim")


def train_glyph_classifier(letters: Letters, out: Path, steps: int, seed: int) -> dict[str, float]:
    """Train the classifier, write it with the features of real letters, and return its accuracy on held-out fonts."""
    torch.manual_seed(seed)
    training, held_out = letters.split()
    classifier = GlyphClassifier()
    loss = classification_loss(training.samples(), training.labels, batch=64)
    with run(out / "training") as where:
        train(classifier, loss, steps=steps, peak_rate=2e-3, seed=seed, run=where)
    classifier.eval()
    target = out / "glyph-classifier"
    target.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), target / "model.safetensors")
    with torch.no_grad():
        picked = torch.randperm(len(training.labels), generator=torch.Generator().manual_seed(seed))[:DATA_SAMPLES]
        features = torch.cat([classifier.penultimate(part) for part in training.samples()[picked].split(512)])
        save_file({"features": features.half()}, target / STATISTICS)
        logits = torch.cat([classifier(part) for part in held_out.samples().split(512)])
    return {"held_out_accuracy": accuracy(logits, held_out.labels), "held_out_confidence": float(confidence(logits).mean())}


def picture_size(name: str) -> int:
    """Height and width of the letters that `name` is trained on. Raises `ZooError` for an unknown name."""
    check_name(name, TRAINABLE)
    return LARGE_SIZE if name in ("glyph-vae", "glyph-sd", "glyph-dit") else SIZE


def train_model(name: str, letters: Letters, out: Path, steps: int | None, seed: int, compiled: bool = False) -> dict[str, Any]:
    """Train the reference model `name` into `out`; return what is worth knowing of it.

    The autoencoder that ``glyph-sd`` and ``glyph-dit`` need is trained first where `out` has none.
    Raises `ZooError` for an unknown name.
    """
    check_name(name, TRAINABLE)
    steps = DEFAULT_STEPS[name] if steps is None else steps
    figures: dict[str, Any] = {"model": name, "steps": steps, "seed": seed, "letters_sha256": letters.digest()}
    if name in ("glyph-sd", "glyph-dit") and not (out / "glyph-vae").is_dir():
        figures["glyph-vae"] = train_model("glyph-vae", letters, out, None, seed)
    from diffquant.zoo import latent  # not needed otherwise; importing the pipelines takes seconds and prints complaints

    trainers: dict[str, Callable[[Letters, Path, int, int], dict[str, float] | None]] = {
        "glyph-ddim": partial(train_glyph_ddim, compiled=compiled),
        "glyph-classifier": train_glyph_classifier,
        "glyph-vae": latent.train_glyph_vae,
        "glyph-sd": latent.train_glyph_sd,
        "glyph-dit": latent.train_glyph_dit,
    }
    return figures | (trainers[name](letters, out, steps, seed) or {})
