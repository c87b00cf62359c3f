"""Coverage and the spread within classes, on features whose answers are known."""

import math

import pytest
import torch

from eval.variety import coverage, spread


def features(n, seed, mean=0.0):
    return mean + torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def test_fresh_images_cover_nearly_all_real_ones_and_half_of_the_modes_cover_half():
    two = torch.cat([features(500, 0, -20), features(500, 1, 20)])
    assert coverage(torch.cat([features(500, 2, -20), features(500, 3, 20)]), two) > 0.9
    assert coverage(features(1000, 4, 20), two) == pytest.approx(0.5, abs=0.03)
    assert coverage(features(1000, 5, 200), two) == 0
    assert coverage(two, two) == 1


def test_the_spread_is_the_mean_distance_within_a_class_and_not_between_classes():
    labels = torch.arange(400) % 2
    x = features(400, 0) + 100 * labels[:, None]
    expected = 4 / math.sqrt(math.pi)  # of two samples of a standard normal in 3 dimensions: sqrt(2) E|N(0, I)|
    assert spread(x, labels) == pytest.approx(expected, rel=0.03)
    assert spread(x, None) > 20
    assert spread(torch.cat([x, 50 + torch.zeros(1, 3)]), torch.cat([labels, torch.tensor([7])])) == pytest.approx(
        spread(x, labels)
    )


def test_images_that_share_no_class_have_no_spread():
    assert spread(features(3, 0), torch.arange(3)) is None
