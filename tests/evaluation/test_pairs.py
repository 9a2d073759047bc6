"""Distances of pairs, and intervals, against slow references and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffquant.errors import EvaluationError
from diffquant.evaluation import features, intervals, pairs
from diffquant.evaluation.intervals import Interval
from diffquant.sampling.pictures import to_uint8


def pictures(n: int, channels: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, 8, 8), generator=generator, dtype=torch.uint8)


def test_to_uint8_rounds_half_to_even_and_clamps():
    # 0.5, 1.5, 2.5 grey values exactly, then the ends and beyond
    samples = torch.tensor([0.5 / 127.5 - 1, 1.5 / 127.5 - 1, 2.5 / 127.5 - 1, -1.0, 0.0, 1.0, -3.0, 7.0], dtype=torch.float64)
    expected = [int(np.clip(np.round(127.5 * (np.float32(x) + np.float32(1))), 0, 255)) for x in samples.tolist()]
    assert to_uint8(samples.float()).tolist() == expected
    assert to_uint8(torch.tensor([0.0, -1.0, 1.0, 9.0])).tolist() == [128, 0, 255, 255]  # 127.5 to even is 128


def test_to_uint8_returns_every_grey_value_unchanged():
    grey = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(grey.float() / 127.5 - 1), grey)


def test_to_uint8_refuses_non_finite_values():
    with pytest.raises(EvaluationError, match="pictures: hold non-finite values"):
        to_uint8(torch.tensor([0.0, math.nan]))


def test_relative_l2_and_sqnr_match_a_loop(generator):
    reference, other = torch.randn(3, 2, 4, generator=generator), torch.randn(3, 2, 4, generator=generator)
    for i in range(3):
        signal = sum(float(x) ** 2 for x in reference[i].flatten())
        error = sum((float(a) - float(b)) ** 2 for a, b in zip(other[i].flatten(), reference[i].flatten(), strict=True))
        assert float(pairs.relative_l2(reference, other)[i]) == pytest.approx(math.sqrt(error / signal), rel=1e-12)
        assert float(pairs.sqnr_db(reference, other)[i]) == pytest.approx(10 * math.log10(signal / error), rel=1e-9)


def test_equal_samples_have_no_error_and_infinite_ratios(generator):
    samples, grey = torch.zeros(2, 3), pictures(2, 1, generator)
    assert pairs.relative_l2(samples, samples).tolist() == [0.0, 0.0]
    assert pairs.sqnr_db(samples, samples).tolist() == [math.inf, math.inf]
    assert pairs.psnr(grey, grey).tolist() == [math.inf, math.inf]
    assert pairs.ssim(grey, grey).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_is_that_of_the_mean_squared_error(generator, channels):
    a, b = pictures(3, channels, generator), pictures(3, channels, generator)
    errors = pairs.mean_squared_error(a, b)
    for i in range(3):
        error = float(np.mean((a[i].numpy().astype(float) - b[i].numpy().astype(float)) ** 2))
        assert float(errors[i]) == pytest.approx(error, rel=1e-12)
        assert float(pairs.psnr(a, b)[i]) == pytest.approx(10 * math.log10(255**2 / error), rel=1e-12)


def test_pooled_psnr_turns_the_interval_around():
    pooled = pairs.pooled_psnr(Interval(100.0, 25.0, 400.0))
    assert pooled.low < pooled.value < pooled.high
    assert pooled.value == pytest.approx(28.1308, abs=1e-4)
    assert pairs.pooled_psnr(Interval(0.0, 0.0, 0.0)).value == math.inf


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_matches_a_loop_over_windows(generator, channels):
    a, b = pictures(1, channels, generator), pictures(1, channels, generator)
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for x, y in zip(a[0].double().numpy(), b[0].double().numpy(), strict=True):
        for top in range(2):  # 7x7 windows in 8x8 pixels
            for left in range(2):
                u, v = (p[top : top + 7, left : left + 7].ravel() for p in (x, y))
                ((uu, uv), (_, vv)), mu, mv = np.cov(u, v), u.mean(), v.mean()
                values.append((2 * mu * mv + c1) * (2 * uv + c2) / ((mu**2 + mv**2 + c1) * (uu + vv + c2)))
    assert float(pairs.ssim(a, b)) == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(EvaluationError, match="ssim: pictures are 4x8; at least 7x7 are needed"):
        pairs.ssim(torch.zeros(1, 1, 4, 8, dtype=torch.uint8), torch.zeros(1, 1, 4, 8, dtype=torch.uint8))


def test_confidence_is_the_largest_probability():
    assert features.confidence(torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])).tolist() == pytest.approx([0.5, 0.75])


def test_bootstrap_covers_the_mean_at_its_rate_and_repeats(generator):
    hits = 0
    for _ in range(200):
        interval = intervals.bootstrap_mean((2 + torch.randn(40, generator=generator, dtype=torch.float64)).exp(), generator)
        assert interval.low <= interval.value <= interval.high
        hits += interval.low <= math.exp(2.5) <= interval.high
    assert 160 <= hits <= 200  # measured 176: the lognormal's tail costs some of the 95 %
    values = torch.randn(50, generator=generator, dtype=torch.float64)
    runs = [intervals.bootstrap_median(values, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert runs[0] == runs[1] and runs[0].value == float(np.median(values.numpy()))


def test_ratio_of_means_is_paired(generator):
    noise = torch.randn(200, generator=generator, dtype=torch.float64).exp()
    paired = intervals.bootstrap_ratio_of_means(0.8 * noise, noise, generator)
    assert paired.low == pytest.approx(0.8) and paired.high == pytest.approx(0.8)
    unpaired = intervals.bootstrap_ratio_of_means(0.8 * noise.flip(0), noise, generator)
    assert unpaired.value == pytest.approx(0.8) and unpaired.high - unpaired.low > 0.1


def test_bootstrap_is_a_loop_over_draws():
    """Rows are drawn by numpy's generator, a pair at a time, and the seed of that by the generator that is passed."""
    above, below = torch.rand(2, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    interval = intervals.bootstrap_ratio_of_means(above, below, torch.Generator().manual_seed(3))
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(3)))
    rows = np.random.default_rng(seed).integers(0, 30, (intervals.RESAMPLES, 30))
    ratios = [float(above[row].mean() / below[row].mean()) for row in torch.from_numpy(rows)]
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])), rel=1e-9)


def test_one_sample_has_an_interval_of_no_width():
    single = torch.tensor([0.25])
    for bootstrap in (intervals.bootstrap_mean, intervals.bootstrap_median):
        assert bootstrap(single, intervals.interval_generator()) == Interval(0.25, 0.25, 0.25)
    zeros = torch.zeros(4)
    assert math.isnan(intervals.bootstrap_ratio_of_means(zeros, zeros, intervals.interval_generator()).value)
