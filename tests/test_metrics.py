import numpy as np
import pytest
import torch

from eval import fidelity, metrics
from eval.memorisation import memorisation, nearest
from eval.metrics import GROUPS, Features, Moments, Reference, fid_of, fid_with_interval, jackknife, measure, paired_difference


def gaussian_features(n, d=8, seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) * torch.linspace(0.5, 2, d) + shift


def test_the_symmetric_root_gives_torch_fidelitys_number():
    reference, generated = Reference(gaussian_features(500)), gaussian_features(400, seed=1, shift=0.2)
    theirs = fidelity.frechet(fidelity.statistics(generated), reference.statistics)
    assert fid_of(Moments.of(generated, reference), reference)["fid"] == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(
    "images, of_real", [(203, 500), (203, 6), (7, 500)], ids=["full", "singular-reference", "fewer-images"]
)
def test_leaving_a_group_out_is_torch_fidelitys_number_without_its_samples(images, of_real):
    features, reference = gaussian_features(images, shift=0.2), Reference(gaussian_features(of_real, seed=1))
    left_out = Moments.of(features, reference).left_out(reference)
    kept = [features[torch.arange(images) % GROUPS != group] for group in range(GROUPS)]
    theirs = [fidelity.frechet(fidelity.statistics(part), reference.statistics) for part in kept]
    assert left_out == pytest.approx(theirs, rel=1e-6)


def test_the_jackknife_has_the_textbook_error_of_a_mean_and_removes_the_bias_of_a_variance():
    x = np.random.default_rng(0).normal(size=20)
    error, corrected = jackknife(float(x.mean()), [float(np.delete(x, i).mean()) for i in range(20)])
    assert error == pytest.approx(x.std(ddof=1) / np.sqrt(20)) and corrected == pytest.approx(x.mean())
    left_out = [float(np.delete(x, i).var()) for i in range(20)]  # the variance over n is too small by 1/n of itself
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


@pytest.mark.slow
def test_the_intervals_of_a_distance_and_of_a_difference_cover_the_truth_as_often_as_they_promise():
    """Of 200 intervals at 95 %, between 180 and 198 cover the truth with a probability of 0.998."""
    reference = Reference(gaussian_features(400_000, seed=11))
    truth = [
        fidelity.frechet(
            {"mu": np.full(8, shift, np.float32), "sigma": np.diag(np.linspace(0.5, 2, 8) ** 2)}, reference.statistics
        )
        for shift in (0.1, 0.2)
    ]
    alone = paired = 0
    for s in range(200):
        noise = gaussian_features(1000, seed=1000 + s)
        one, two = (fid_with_interval(noise + shift, reference) for shift in (0.1, 0.2))
        low, high = one["fid_infinity_interval"]
        difference, error = paired_difference(two, one)
        alone += low <= truth[0] <= high
        paired += abs(difference - (truth[1] - truth[0])) <= 2.093 * error
    assert 180 <= alone <= 198 and 180 <= paired <= 198


def test_sums_of_chunks_in_any_order_give_the_fid_of_the_whole():
    features, reference = gaussian_features(700, seed=4), Reference(gaussian_features(500))
    sums = Moments.of(features[:0], reference, torch.zeros(0, dtype=torch.long))
    for chunk in (range(300, 700), range(0, 300)):
        sums += Moments.of(features[chunk.start : chunk.stop], reference, torch.tensor(chunk))
    streamed, whole = fid_of(sums, reference), fid_with_interval(features, reference)
    assert streamed["fid"] == pytest.approx(whole["fid"], rel=1e-6)
    assert streamed["fid_interval"] == pytest.approx(whole["fid_interval"], rel=1e-5)


def test_the_nearest_neighbour_is_the_nearest_and_not_oneself():
    keys = torch.randn(600, 5)
    distance, which = nearest(keys[300:] + 1e-3, keys)
    assert torch.equal(which, torch.arange(300, 600)) and distance.max() < 1e-2
    distance, which = nearest(keys, keys, own=True)
    full = torch.cdist(keys, keys).fill_diagonal_(torch.inf)
    assert torch.allclose(distance, full.min(1).values, atol=1e-5) and not (which == torch.arange(600)).any()


def test_copies_are_seen_and_fresh_images_are_not():
    real = gaussian_features(3000, d=16, seed=1)
    fresh, copied = gaussian_features(1000, d=16, seed=2), real[:1000] + 1e-3
    out = memorisation(fresh, real)
    assert out["copies"] < 0.03 and out["nearest_real"] == pytest.approx(1, abs=0.05)
    out = memorisation(copied, real)
    assert out["copies"] == 1 and out["nearest_real"] < 0.01
    half = memorisation(torch.cat([fresh[:500], copied[:500]]), real)
    assert half["copies"] == pytest.approx(0.5, abs=0.03)


def test_precision_and_recall_of_many_real_images_take_evenly_spaced_ones_and_those_of_few_take_all(monkeypatch):
    real, found = gaussian_features(64), Features(gaussian_features(50, seed=1))
    whole, half = measure(found, Reference(real)), measure(found, Reference(real[::2]))
    monkeypatch.setattr(metrics, "PAIRED", 63)
    few = measure(found, Reference(real))
    assert (few["precision"], few["recall"]) == (half["precision"], half["recall"]) != (whole["precision"], whole["recall"])
    assert {k: v for k, v in few.items() if k not in ("precision", "recall")} == {
        k: v for k, v in whole.items() if k not in ("precision", "recall")
    }
