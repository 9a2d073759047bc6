"""Training of ``glyph-classifier``, whose features stand behind FID and KID, and the features of real letters."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from diffquant.calibration.fit import run
from diffquant.evaluation.features import confidence
from diffquant.zoo.models import STATISTICS, GlyphClassifier
from tools.train_zoo.letters import Letters
from tools.train_zoo.loop import train
from tools.train_zoo.losses import classification_loss

DATA_SAMPLES = 8192  # real letters whose features are shipped


def train_glyph_classifier(letters: Letters, out: Path, steps: int, seed: int) -> dict[str, float]:
    """Train the classifier, write it with the features of real letters, and return its accuracy on held-out fonts."""
    torch.manual_seed(seed)
    training, held_out = letters.split()
    classifier = GlyphClassifier()
    loss = classification_loss(training.samples(), training.labels, batch=64)
    with run(out / "training") as where:
        train(classifier, loss, steps=steps, peak_lr=2e-3, seed=seed, run=where)
    classifier.eval()
    target = out / "glyph-classifier"
    target.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), target / "model.safetensors")
    with torch.no_grad():
        picked = torch.randperm(len(training.labels), generator=torch.Generator().manual_seed(seed))[:DATA_SAMPLES]
        features = torch.cat([classifier.penultimate(part) for part in training.samples()[picked].split(512)])
        save_file({"features": features.half()}, target / STATISTICS)
        logits = torch.cat([classifier(part) for part in held_out.samples().split(512)])
    accuracy = float((logits.argmax(dim=1) == held_out.labels).double().mean())
    return {"held_out_accuracy": accuracy, "held_out_confidence": float(confidence(logits).mean())}
