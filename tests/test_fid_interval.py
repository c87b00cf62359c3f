"""How often the 95 % interval of FID covers, as its docstring says, and FID arithmetic at the size of Inception's features."""

import math

import numpy as np
import pytest
import torch

from eval import fidelity, metrics
from eval.metrics import Moments, Reference, fid_of

N, D, REPEATS = 500, 8, 300


def gaussian(generator):
    return torch.randn(N, D, generator=generator)


def student_t(generator):
    """Student's t with 5 degrees of freedom, of variance 1."""
    squares = torch.randn(N, 5, generator=generator).square().mean(1, keepdim=True)
    return gaussian(generator) * (3 / 5 / squares).sqrt()


def log_normal(generator):
    """Log-normal with a log of standard deviation 0.8, of mean 0 and variance 1."""
    s2 = 0.8**2
    return ((0.8 * gaussian(generator)).exp() - math.exp(s2 / 2)) / math.sqrt((math.exp(s2) - 1) * math.exp(s2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw, of_fid, of_infinity", [(gaussian, 0.95, 0.95), (student_t, 0.93, 0.98), (log_normal, 0.92, 0.98)]
)
def test_the_intervals_cover_as_often_as_their_docstring_says(draw, of_fid, of_infinity):
    """The interval of FID is to cover its mean over samples of this size, that of FID at infinite n the true distance."""
    reference = Reference(None, {"mu": np.zeros(D), "sigma": np.eye(D)})
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in range(REPEATS)]
    rows = [fid_of(Moments.of(draw(generator) + 0.1, reference), reference) for generator in generators]
    truths = {"fid_interval": float(np.mean([row["fid"] for row in rows])), "fid_infinity_interval": D * 0.1**2}
    covered = {key: np.mean([row[key][0] <= truth <= row[key][1] for row in rows]) for key, truth in truths.items()}
    assert list(covered.values()) == pytest.approx([of_fid, of_infinity], abs=0.035)
    assert f"{of_fid:.2f}" in metrics.__doc__ and f"{of_infinity:.2f}" in metrics.__doc__


@pytest.mark.slow
def test_fid_arithmetic_at_2048_features_is_torch_fidelitys_to_1e_6():
    generator, scale = torch.Generator().manual_seed(0), torch.exp(-torch.linspace(0, 4, 2048))
    real, made = (
        torch.randn(3000, 2048, generator=generator) * scale,
        torch.randn(2500, 2048, generator=generator) * scale * 1.05,
    )
    theirs = fidelity.frechet(fidelity.statistics(made), fidelity.statistics(real))
    reference = Reference(real)
    assert Moments.of(made, reference, groups=1).distance(reference) == pytest.approx(theirs, rel=1e-6)
