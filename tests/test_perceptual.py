import sys

import pytest
import torch
from conftest import refuses

from eval.perceptual import Lpips


@pytest.mark.slow
def test_lpips_is_zero_on_equal_images_alone_and_passes_gradients():
    torch.manual_seed(0)
    distance = Lpips(3, weights=False)
    x, y = torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 3, 16, 16) * 2 - 1
    x.requires_grad_(True)
    apart = distance(x, y)
    assert apart.shape == (2,) and (apart > 0).all() and torch.equal(distance(y, y), torch.zeros(2))
    apart.mean().backward()
    assert x.grad.abs().sum() > 0 and not any(p.requires_grad for p in distance.parameters())


def test_lpips_without_its_package_or_on_one_channel_is_refused(monkeypatch):
    refuses("defined for 3 channels, these images have 1: accepted are l2, pseudo_huber", Lpips, 1)
    monkeypatch.setitem(sys.modules, "lpips", None)
    refuses("needs the lpips package", Lpips, 3)
