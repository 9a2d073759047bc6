"""The losses of training are those of their papers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from tools.train_zoo import latent, losses


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
    term = losses.variance_term(noise, predicted, torch.full_like(noise, variance), torch.tensor([timestep]), signal)
    # error of the means: 1 / signal enlarges rounding in the expected value at the last timestep
    torch.testing.assert_close(term, expected, rtol=1e-6, atol=1e-12)


def test_variance_term_is_zero_for_the_true_step_and_at_timestep_0():
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    noise, other = torch.randn(2, 3, 4, 2, 2)
    posterior = torch.full_like(noise, -1.0)
    assert losses.variance_term(noise, noise, posterior, torch.tensor([1, 500, 999]), signal).abs().max() < 1e-6
    assert (losses.variance_term(noise, other, posterior, torch.tensor([0, 0, 0]), signal) == 0).all()


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
            patch.setattr(losses, "VARIANCE_WEIGHT", weight)
            model = Constant()
            loss = losses.hybrid_loss(latents, alphas, 16, latent.label_condition(letters))
            loss(model, torch.Generator().manual_seed(0)).backward()
            return model.output.grad.flatten()

    with_bound, without = gradient(1e-3), gradient(0.0)
    assert torch.equal(with_bound[:4], without[:4]) and (without[4:] == 0).all() and (with_bound[4:] != 0).all()


@pytest.mark.parametrize("kind", ["denoising_loss", "hybrid_loss"])
def test_errors_at_little_noise_count_less(kind, letters, monkeypatch):
    """Min-SNR weights by hand: 5 over the signal-to-noise ratio where that is larger."""
    monkeypatch.setattr(losses, "VARIANCE_WEIGHT", 0.0)
    alphas, condition = torch.tensor([0.99, 0.9, 0.5]), latent.label_condition(letters)  # ratios 99, 9, 1
    latents, outputs = torch.zeros(len(letters.labels), 4, 16, 16), 8 if kind == "hybrid_loss" else 4

    class Nothing(nn.Module):
        def forward(self, noisy, *_):
            return SimpleNamespace(sample=torch.zeros(len(noisy), outputs, 16, 16))

    drawn = losses.add_noise(latents, alphas, 16, torch.Generator().manual_seed(0), condition)
    assert set(drawn.timestep.tolist()) == {0, 1, 2}
    expected = (torch.tensor([5 / 99, 5 / 9, 1.0])[drawn.timestep] * drawn.noise.square().mean(dim=(1, 2, 3))).mean()
    loss = getattr(losses, kind)(latents, alphas, 16, condition)(Nothing(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)  # 1 - 0.99 in float32 has an error of 6e-6
