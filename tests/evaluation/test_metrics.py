"""Metrics against slow references, torchmetrics and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from diffquant.core.spec import EvaluationError
from diffquant.evaluation import metrics
from diffquant.evaluation.metrics import Interval


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussian(n: int, d: int, generator: torch.Generator, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return shift + scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def pictures(n: int, channels: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, 8, 8), generator=generator, dtype=torch.uint8)


def test_to_uint8_rounds_half_to_even_and_clamps():
    # 0.5, 1.5, 2.5 grey values exactly, then the ends and beyond
    samples = torch.tensor([0.5 / 127.5 - 1, 1.5 / 127.5 - 1, 2.5 / 127.5 - 1, -1.0, 0.0, 1.0, -3.0, 7.0], dtype=torch.float64)
    expected = [int(np.clip(np.round(127.5 * (np.float32(x) + np.float32(1))), 0, 255)) for x in samples.tolist()]
    assert metrics.to_uint8(samples.float()).tolist() == expected
    assert metrics.to_uint8(torch.tensor([0.0, -1.0, 1.0, 9.0])).tolist() == [128, 0, 255, 255]  # 127.5 to even is 128


def test_to_uint8_returns_every_grey_value_unchanged():
    grey = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(metrics.to_uint8(grey.float() / 127.5 - 1), grey)


def test_to_uint8_refuses_non_finite_values():
    with pytest.raises(EvaluationError, match="pictures: hold non-finite values"):
        metrics.to_uint8(torch.tensor([0.0, math.nan]))


def test_relative_l2_and_sqnr_match_a_loop(generator):
    reference, other = torch.randn(3, 2, 4, generator=generator), torch.randn(3, 2, 4, generator=generator)
    for i in range(3):
        signal = sum(float(x) ** 2 for x in reference[i].flatten())
        error = sum((float(a) - float(b)) ** 2 for a, b in zip(other[i].flatten(), reference[i].flatten(), strict=True))
        assert float(metrics.relative_l2(reference, other)[i]) == pytest.approx(math.sqrt(error / signal), rel=1e-12)
        assert float(metrics.sqnr_db(reference, other)[i]) == pytest.approx(10 * math.log10(signal / error), rel=1e-9)


def test_equal_samples_have_no_error_and_infinite_ratios(generator):
    samples, grey = torch.zeros(2, 3), pictures(2, 1, generator)
    assert metrics.relative_l2(samples, samples).tolist() == [0.0, 0.0]
    assert metrics.sqnr_db(samples, samples).tolist() == [math.inf, math.inf]
    assert metrics.psnr(grey, grey).tolist() == [math.inf, math.inf]
    assert metrics.ssim(grey, grey).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_is_that_of_the_mean_squared_error(generator, channels):
    a, b = pictures(3, channels, generator), pictures(3, channels, generator)
    errors = metrics.mean_squared_error(a, b)
    for i in range(3):
        error = float(np.mean((a[i].numpy().astype(float) - b[i].numpy().astype(float)) ** 2))
        assert float(errors[i]) == pytest.approx(error, rel=1e-12)
        assert float(metrics.psnr(a, b)[i]) == pytest.approx(10 * math.log10(255**2 / error), rel=1e-12)


def test_pooled_psnr_turns_the_interval_around():
    pooled = metrics.pooled_psnr(Interval(100.0, 25.0, 400.0))
    assert pooled.low < pooled.value < pooled.high
    assert pooled.value == pytest.approx(28.1308, abs=1e-4)
    assert metrics.pooled_psnr(Interval(0.0, 0.0, 0.0)).value == math.inf


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
    assert float(metrics.ssim(a, b)) == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(EvaluationError, match="ssim: pictures are 4x8; at least 7x7 are needed"):
        metrics.ssim(torch.zeros(1, 1, 4, 8, dtype=torch.uint8), torch.zeros(1, 1, 4, 8, dtype=torch.uint8))


def test_confidence_is_the_largest_probability():
    assert metrics.confidence(torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])).tolist() == pytest.approx([0.5, 0.75])


def test_bootstrap_covers_the_mean_at_its_rate_and_repeats(generator):
    hits = 0
    for _ in range(200):
        interval = metrics.bootstrap_mean(gaussian(40, 1, generator, shift=2.0)[:, 0].exp(), generator, resamples=300)
        assert interval.low <= interval.value <= interval.high
        hits += interval.low <= math.exp(2.5) <= interval.high
    assert 160 <= hits <= 200  # measured 176: the lognormal's tail costs some of the 95 %
    values = gaussian(50, 1, generator)[:, 0]
    runs = [metrics.bootstrap_median(values, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert runs[0] == runs[1] and runs[0].value == float(np.median(values.numpy()))


def test_ratio_of_means_is_paired(generator):
    noise = gaussian(200, 1, generator)[:, 0].exp()
    paired = metrics.bootstrap_ratio_of_means(0.8 * noise, noise, generator)
    assert paired.low == pytest.approx(0.8) and paired.high == pytest.approx(0.8)
    unpaired = metrics.bootstrap_ratio_of_means(0.8 * noise.flip(0), noise, generator)
    assert unpaired.value == pytest.approx(0.8) and unpaired.high - unpaired.low > 0.1


def test_frechet_distance_of_moments_matches_the_matrix_root(generator):
    a, b = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    s1, s2, m1, m2 = a @ a.T, b @ b.T, a[0], b[0]
    root = scipy.linalg.sqrtm((s1 @ s2).numpy()).real
    expected = float((m1 - m2).square().sum() + s1.trace() + s2.trace()) - 2 * np.trace(root)
    assert metrics.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)


def test_distances_agree_with_torchmetrics(generator):
    with pytest.warns(UserWarning, match="save all extracted features"):  # of its kernel distance, always
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        kid = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=60)
    features = torch.nn.Identity()
    features.num_features = 4
    fid = FrechetInceptionDistance(feature=features)
    x, y = gaussian(60, 4, generator), gaussian(60, 4, generator, shift=0.3, scale=1.2)
    for metric in (fid, kid):
        metric.update(x, real=True)
        metric.update(y, real=False)
    assert metrics.fid(x, y, "independent", generator).value == pytest.approx(float(fid.compute()), rel=1e-9)
    assert metrics.kid(x, y, "independent").value == pytest.approx(float(kid.compute()[0]), rel=1e-9)


def test_a_set_is_at_no_distance_from_itself(generator):
    x = gaussian(80, 4, generator)
    fid, kid = metrics.fid(x, x, "paired", generator), metrics.kid(x, x, "paired")
    assert abs(fid.value) < 1e-6 and abs(fid.extrapolated) < 1e-5 and fid.high - fid.low < 1e-4
    assert abs(kid.value) < 1e-12 and kid.standard_error < 1e-12
    assert metrics.kid(x, x, "independent").value < 0  # why pairs need an estimate of their own


def test_equal_groups_extrapolate_along_the_line_in_one_over_n(generator):
    x, y = gaussian(100, 3, generator), gaussian(100, 3, generator, shift=0.5)
    found = metrics.fid(x, y, "paired", torch.Generator().manual_seed(5))
    group = torch.randperm(100, generator=torch.Generator().manual_seed(5)) % metrics.GROUPS
    smaller = [
        metrics.frechet_distance(*metrics.moments(x[group != g]), *metrics.moments(y[group != g])) for g in range(metrics.GROUPS)
    ]
    slope = (np.mean(smaller) - found.value) / (1 / 95 - 1 / 100)
    assert found.extrapolated == pytest.approx(found.value - slope / 100, rel=1e-9)


@pytest.mark.parametrize(
    ("pairing", "shift", "scale"),
    [  # covered of 60 runs, measured: 59, 59, 57
        ("independent", 0.3, 1.2),
        ("independent", 0.0, 1.0),  # at zero the interval is too wide
        ("paired", 0.1, 1.1),
    ],
)
def test_the_interval_of_fid_covers_the_truth_and_its_own_estimate(pairing, shift, scale):
    """Gaussians N(0, 1) and N(shift, scale^2) in 4 dimensions: the distance is 4 shift^2 + 4 (scale - 1)^2."""
    generator = torch.Generator().manual_seed(1)
    truth, hits, plain, extrapolated = 4 * shift**2 + 4 * (scale - 1) ** 2, 0, [], []
    for _ in range(60):
        x, y = gaussian(120, 4, generator), gaussian(120, 4, generator)
        if pairing == "paired":
            y = 0.95 * x + math.sqrt(1 - 0.95**2) * y
        found = metrics.fid(shift + scale * y, x, pairing, generator)
        assert found.low <= found.extrapolated <= found.high
        hits += found.low <= truth <= found.high
        plain.append(found.value)
        extrapolated.append(found.extrapolated)
    assert hits >= 54  # 95 % of 60 is 57; 54 or more in 97 of 100 such tests
    error = np.std(extrapolated) / math.sqrt(60)
    assert abs(np.mean(extrapolated) - truth) < 3 * error
    assert np.mean(plain) - truth > 3 * error  # the bias that was taken out


def test_the_interval_of_fid_to_fixed_data_covers_the_truth(generator):
    data = gaussian(2000, 4, generator)
    mean, covariance = metrics.moments(data)
    truth = metrics.frechet_distance(torch.full((4,), 0.3), torch.eye(4), mean, covariance)
    found = [metrics.fid(gaussian(120, 4, generator, shift=0.3), data, "fixed", generator) for _ in range(60)]
    assert sum(f.low <= truth <= f.high for f in found) >= 52  # of 60


def test_too_few_samples_are_not_extrapolated(generator):
    found = metrics.fid(gaussian(30, 16, generator), gaussian(30, 16, generator), "independent", generator)
    assert found.value > 0 and found.extrapolated is None and found.low is None and found.high is None


def slow_kid(x: torch.Tensor, y: torch.Tensor) -> float:
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kid_and_its_error_match_loops(generator):
    x, y = gaussian(7, 3, generator), gaussian(5, 3, generator, shift=0.5)
    found, fixed = metrics.kid(x, y, "independent"), metrics.kid(x, y, "fixed")
    assert found.value == pytest.approx(slow_kid(x, y), rel=1e-9)
    without_x = [slow_kid(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(7)]
    without_y = [slow_kid(x, torch.cat([y[:i], y[i + 1 :]])) for i in range(5)]
    variance_x, variance_y = (np.var(left) * (len(left) - 1) for left in (without_x, without_y))
    assert fixed.standard_error == pytest.approx(math.sqrt(variance_x), rel=1e-9)
    assert found.standard_error == pytest.approx(math.sqrt(variance_x + variance_y), rel=1e-9)


def test_paired_kid_is_the_mean_over_pairs_of_pairs(generator):
    x = gaussian(6, 3, generator)
    y = x + 0.2 * gaussian(6, 3, generator)

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    def paired(rows):
        pairs = [(i, j) for i in rows for j in rows if i != j]
        return np.mean([k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs])

    found = metrics.kid(x, y, "paired")
    left_out = [paired([i for i in range(6) if i != without]) for without in range(6)]
    assert found.value == pytest.approx(paired(range(6)), rel=1e-9)
    assert found.standard_error == pytest.approx(math.sqrt(np.var(left_out) * 5), rel=1e-9)


@pytest.mark.parametrize("pairing", ["independent", "fixed"])
def test_kid_with_what_is_known_of_the_reference_is_kid(pairing, generator):
    x, y = gaussian(9, 3, generator), gaussian(8, 3, generator)
    assert metrics.kid(x, y, pairing, metrics.within_sums(y)) == metrics.kid(x, y, pairing)
    assert metrics.kid(x, y, pairing, 2 * metrics.within_sums(y)) != metrics.kid(x, y, pairing)


def test_kid_in_blocks_is_kid(generator, monkeypatch):
    x, y = gaussian(9, 3, generator), gaussian(8, 3, generator)
    whole = metrics.kid(x, y, "independent")
    monkeypatch.setattr(metrics, "BLOCK", 4)
    assert metrics.kid(x, y, "independent").value == pytest.approx(whole.value, rel=1e-9)


@pytest.mark.parametrize(
    ("rows", "pairing", "message"),
    [
        (1, "independent", "samples: 1 rows of features; at least 2 are needed"),
        (4, "paired", "paired features: 4 and 5 rows"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(generator, rows, pairing, message):
    with pytest.raises(EvaluationError, match=message):
        metrics.fid(gaussian(rows, 2, generator), gaussian(5, 2, generator), pairing, generator)


def test_non_finite_features_are_refused(generator):
    with pytest.raises(EvaluationError, match="reference: features hold non-finite values"):
        metrics.kid(torch.zeros(4, 2), torch.full((4, 2), math.inf), "independent")
