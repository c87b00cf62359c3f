import numpy as np
import pytest
import torch

from eval import fidelity
from eval.metrics import GROUPS, Features, Moments, Reference, fid_with_interval, jackknife, measure, paired_difference


def gaussian_features(n, d=8, seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) * torch.linspace(0.5, 2, d) + shift


def test_the_symmetric_root_gives_torch_fidelitys_number():
    reference, generated = Reference(gaussian_features(500)), gaussian_features(400, seed=1, shift=0.2)
    theirs = fidelity.frechet(fidelity.statistics(generated), reference.statistics)
    ours = reference.frechet(*Moments.of(generated).statistics())
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_leaving_a_group_out_is_dropping_its_samples():
    features = gaussian_features(203)
    kept = torch.cat([features[i : i + 1] for i in range(203) if i % GROUPS != 7])
    mean, covariance = Moments.of(features).statistics(without=7)
    assert np.allclose(mean, kept.double().mean(0)) and np.allclose(covariance, torch.cov(kept.double().T))


def test_the_jackknife_of_a_mean_is_the_textbook_standard_error():
    x = np.random.default_rng(0).normal(size=20)
    left_out = [float(np.delete(x, i).mean()) for i in range(20)]
    error, corrected = jackknife(float(x.mean()), left_out)
    assert error == pytest.approx(x.std(ddof=1) / np.sqrt(20)) and corrected == pytest.approx(x.mean())


def test_the_correction_removes_a_bias_in_one_over_n():
    """The variance divided by n falls short by exactly 1/n of itself."""
    x = np.random.default_rng(1).normal(size=20)
    left_out = [float(np.delete(x, i).var()) for i in range(20)]
    assert jackknife(float(x.var()), left_out)[1] == pytest.approx(x.var(ddof=1))


def test_the_interval_of_a_difference_is_narrower_than_its_parts_when_noise_is_shared():
    reference = Reference(gaussian_features(2000))
    noise = gaussian_features(1000, seed=3)
    one, two = (fid_with_interval(noise + shift, reference) for shift in (0.3, 0.32))
    difference, error = paired_difference(one, two)
    alone = (one["fid_interval"][1] - one["fid_interval"][0]) / 4
    assert difference < 0 and error < alone / 3


def test_the_floor_predicts_what_fresh_real_images_get():
    reference = Reference(gaussian_features(3000, d=48, seed=5))
    fresh = [fid_with_interval(gaussian_features(1000, d=48, seed=100 + s), reference)["fid"] for s in range(10)]
    assert reference.floor(1000) == pytest.approx(np.mean(fresh), rel=0.1)


def test_fid_infinity_is_nearer_to_the_truth_than_fid():
    reference = Reference(gaussian_features(200_000, seed=7))
    rows = [fid_with_interval(gaussian_features(500, seed=s, shift=0.1), reference) for s in range(10)]
    truth = 8 * 0.1**2
    assert abs(np.mean([r["fid_infinity"] for r in rows]) - truth) < abs(np.mean([r["fid"] for r in rows]) - truth) / 4


def test_measure_returns_every_metric_of_the_report():
    reference = Reference(gaussian_features(300))
    row = measure(Features(gaussian_features(200, seed=2), torch.randn(200, 10)), reference)
    assert {"fid", "fid_interval", "fid_infinity", "kid", "isc", "precision", "recall"} <= row.keys()
    assert all(np.isfinite(np.asarray(v)).all() for v in row.values())
