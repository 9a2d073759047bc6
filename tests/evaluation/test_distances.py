"""Distances of sets against slow references, torchmetrics and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from diffquant.errors import EvaluationError
from diffquant.evaluation import distances


def gaussian(n: int, d: int, generator: torch.Generator, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return shift + scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def test_frechet_distance_of_moments_matches_the_matrix_root(generator):
    a, b = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    s1, s2, m1, m2 = a @ a.T, b @ b.T, a[0], b[0]
    root = scipy.linalg.sqrtm((s1 @ s2).numpy()).real
    expected = float((m1 - m2).square().sum() + s1.trace() + s2.trace()) - 2 * np.trace(root)
    assert distances.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)


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
    assert distances.fid(x, y, "independent", generator).value == pytest.approx(float(fid.compute()), rel=1e-9)
    assert distances.kid(x, y, "independent").value == pytest.approx(float(kid.compute()[0]), rel=1e-9)


def test_a_set_is_at_no_distance_from_itself(generator):
    x = gaussian(80, 4, generator)
    fid, kid = distances.fid(x, x, "paired", generator), distances.kid(x, x, "paired")
    assert abs(fid.value) < 1e-6 and abs(fid.extrapolated) < 1e-5 and fid.high - fid.low < 1e-4
    assert abs(kid.value) < 1e-12 and kid.standard_error < 1e-12
    assert distances.kid(x, x, "independent").value < 0  # why pairs need an estimate of their own


def test_equal_groups_extrapolate_along_the_line_in_one_over_n(generator):
    x, y = gaussian(100, 3, generator), gaussian(100, 3, generator, shift=0.5)
    distance = distances.fid(x, y, "paired", torch.Generator().manual_seed(5))
    group = torch.randperm(100, generator=torch.Generator().manual_seed(5)) % distances.GROUPS
    smaller = [
        distances.frechet_distance(*distances.moments(x[group != g]), *distances.moments(y[group != g]))
        for g in range(distances.GROUPS)
    ]
    slope = (np.mean(smaller) - distance.value) / (1 / 95 - 1 / 100)
    assert distance.extrapolated == pytest.approx(distance.value - slope / 100, rel=1e-9)


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
        distance = distances.fid(shift + scale * y, x, pairing, generator)
        assert distance.low <= distance.extrapolated <= distance.high
        hits += distance.low <= truth <= distance.high
        plain.append(distance.value)
        extrapolated.append(distance.extrapolated)
    assert hits >= 54  # 95 % of 60 is 57; 54 or more in 97 of 100 such tests
    error = np.std(extrapolated) / math.sqrt(60)
    assert abs(np.mean(extrapolated) - truth) < 3 * error
    assert np.mean(plain) - truth > 3 * error  # the bias that was taken out


def test_the_interval_of_fid_to_fixed_data_covers_the_truth(generator):
    data = gaussian(2000, 4, generator)
    mean, covariance = distances.moments(data)
    truth = distances.frechet_distance(torch.full((4,), 0.3), torch.eye(4), mean, covariance)
    distance = [distances.fid(gaussian(120, 4, generator, shift=0.3), data, "fixed", generator) for _ in range(60)]
    assert sum(f.low <= truth <= f.high for f in distance) >= 52  # of 60


def test_the_change_of_fid_is_that_of_both_and_its_interval_covers_the_truth(generator):
    """One set moved away from the data, the other not: the interval of the change is narrower than those of the distances."""
    data = gaussian(2000, 4, generator)
    mean, covariance = distances.moments(data)
    near, far = (distances.frechet_distance(torch.full((4,), at), torch.eye(4), mean, covariance) for at in (0.3, 0.35))
    hits = 0
    for _ in range(60):
        before = gaussian(120, 4, generator, shift=0.3)
        after = 0.05 + before + 0.02 * gaussian(120, 4, generator)
        change = distances.fid_change(after, before, data, torch.Generator().manual_seed(5))
        plain = [distances.fid(rows, data, "fixed", torch.Generator().manual_seed(5)) for rows in (after, before)]
        assert change.value == pytest.approx(plain[0].extrapolated - plain[1].extrapolated, abs=1e-9)
        assert change.high - change.low < 0.5 * (plain[0].high - plain[0].low)
        hits += change.low <= far - near <= change.high
    assert hits >= 52  # of 60


def test_too_few_samples_are_not_extrapolated(generator):
    few = [gaussian(30, 16, generator) for _ in range(3)]
    assert distances.fid_change(*few, generator) is None
    distance = distances.fid(gaussian(30, 16, generator), gaussian(30, 16, generator), "independent", generator)
    assert distance.value > 0 and distance.extrapolated is None and distance.low is None and distance.high is None


def slow_kid(x: torch.Tensor, y: torch.Tensor) -> float:
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kid_and_its_error_match_loops(generator):
    x, y = gaussian(7, 3, generator), gaussian(5, 3, generator, shift=0.5)
    distance, fixed = distances.kid(x, y, "independent"), distances.kid(x, y, "fixed")
    assert distance.value == pytest.approx(slow_kid(x, y), rel=1e-9)
    without_x = [slow_kid(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(7)]
    without_y = [slow_kid(x, torch.cat([y[:i], y[i + 1 :]])) for i in range(5)]
    variance_x, variance_y = (np.var(left) * (len(left) - 1) for left in (without_x, without_y))
    assert fixed.standard_error == pytest.approx(math.sqrt(variance_x), rel=1e-9)
    assert distance.standard_error == pytest.approx(math.sqrt(variance_x + variance_y), rel=1e-9)


def test_paired_kid_is_the_mean_over_pairs_of_pairs(generator):
    x = gaussian(6, 3, generator)
    y = x + 0.2 * gaussian(6, 3, generator)

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    def paired(rows):
        pairs = [(i, j) for i in rows for j in rows if i != j]
        return np.mean([k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs])

    distance = distances.kid(x, y, "paired")
    left_out = [paired([i for i in range(6) if i != without]) for without in range(6)]
    assert distance.value == pytest.approx(paired(range(6)), rel=1e-9)
    assert distance.standard_error == pytest.approx(math.sqrt(np.var(left_out) * 5), rel=1e-9)


@pytest.mark.parametrize("pairing", ["independent", "fixed"])
def test_kid_with_what_is_known_of_the_reference_is_kid(pairing, generator):
    x, y = gaussian(9, 3, generator), gaussian(8, 3, generator)
    assert distances.kid(x, y, pairing, distances.within_sums(y)) == distances.kid(x, y, pairing)
    assert distances.kid(x, y, pairing, 2 * distances.within_sums(y)) != distances.kid(x, y, pairing)


def test_kid_in_blocks_is_kid(generator, monkeypatch):
    x, y = gaussian(9, 3, generator), gaussian(8, 3, generator)
    whole = distances.kid(x, y, "independent")
    monkeypatch.setattr(distances, "BLOCK", 4)
    assert distances.kid(x, y, "independent").value == pytest.approx(whole.value, rel=1e-9)


@pytest.mark.parametrize(
    ("rows", "pairing", "message"),
    [
        (1, "independent", "samples: 1 rows of features; at least 2 are needed"),
        (4, "paired", "paired features: 4 and 5 rows"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(generator, rows, pairing, message):
    with pytest.raises(EvaluationError, match=message):
        distances.fid(gaussian(rows, 2, generator), gaussian(5, 2, generator), pairing, generator)


def test_non_finite_features_are_refused(generator):
    with pytest.raises(EvaluationError, match="reference: features hold non-finite values"):
        distances.kid(torch.zeros(4, 2), torch.full((4, 2), math.inf), "independent")
