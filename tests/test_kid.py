"""KID from whole kernels is torch-fidelity's over its subsets, to rounding."""

import pytest
import torch
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from eval import fidelity, kid


@pytest.mark.parametrize(
    "n, m, dimension, size, rows", [(300, 250, 8, 100, 64), (120, 120, 64, 120, 1024), (2000, 1797, 64, 1000, 1024)]
)
def test_every_subset_is_that_of_torch_fidelity(n, m, dimension, size, rows, monkeypatch):
    monkeypatch.setattr(kid, "ROWS", rows)
    torch.manual_seed(0)
    x, y = torch.randn(n, dimension).double(), 0.3 + 1.1 * torch.randn(m, dimension).double()
    subsets = 10
    theirs = kid_features_to_metric(x, y, kid_subset_size=size, kid_subsets=subsets, verbose=False)
    ours = kid.kid_of_subsets(x, y, subsets, size)
    assert ours.mean() == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-9)
    assert ours.std() == pytest.approx(theirs[KEY_METRIC_KID_STD], rel=1e-6, abs=1e-12)


def test_many_images_go_to_torch_fidelity_itself(monkeypatch):
    x, y = torch.randn(60, 4), torch.randn(50, 4)
    few = fidelity.kid(x, y, subsets=3)
    monkeypatch.setattr(fidelity, "MOST", 10)
    monkeypatch.setattr(fidelity, "kid_of_subsets", None)
    assert fidelity.kid(x, y, subsets=3) == pytest.approx(few, rel=1e-4)
