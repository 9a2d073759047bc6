"""A training run that was killed and resumed is the same run, and its learning rate follows the schedule."""

import pytest
import torch
from torch import nn

from diffquant.calibration import fit
from tools.train_zoo import loop
from tools.train_zoo.loop import train, warm_constant_decay
from tools.train_zoo.losses import denoising_loss


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
            train(model, loss, steps=steps, peak_lr=0.1, seed=0, run=run)
        return model.layer.weight.detach()

    whole = run_training(40, tmp_path / "whole")
    folder = tmp_path / "killed"

    def stop_at_30(model, generator, calls=[0]):  # noqa: B006
        calls[0] += 1
        if calls[0] == 31:
            raise KeyboardInterrupt
        return loss(model, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "CURVE_STRIDE", 10)
        with fit.run(folder, show=False) as run, pytest.raises(KeyboardInterrupt):
            train(Denoiser(), stop_at_30, steps=40, peak_lr=0.1, seed=0, run=run)
        assert (folder / "fit.safetensors").exists()
        assert torch.equal(run_training(40, folder), whole)


def test_the_rate_warms_up_stays_and_falls():
    rates = [warm_constant_decay(step, 1000) for step in range(1000)]
    assert rates[0] == 1 / 200 and rates[500] == 1.0 and rates[799] == 1.0 and rates[999] == 1 / 200
