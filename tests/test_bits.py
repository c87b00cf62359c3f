"""Analog bits are data of the ordinary contract: exact to and fro, with a posterior mean in closed form."""

import math

import pytest
import torch

from distill.bits import from_bits, pixels_to_bits, pixels_to_tokens, posterior_mean, to_bits, to_pixels
from distill.images import from_uint8, to_uint8


def test_all_256_values_come_back_from_their_bits():
    tokens = torch.arange(256)
    bits = to_bits(tokens, 8)
    assert bits.shape == (256, 8) and set(bits.flatten().tolist()) == {-1.0, 1.0} and len(bits.unique(dim=0)) == 256
    assert torch.equal(from_bits(bits), tokens)
    assert to_bits(torch.tensor([6]), 3).tolist() == [[1, 1, -1]]


def test_all_256_values_of_a_pixel_come_back_as_bits_and_fewer_bits_give_the_nearest_level():
    images = torch.arange(256, dtype=torch.uint8).view(2, 2, 8, 8)
    bits = pixels_to_bits(from_uint8(images), 8)
    assert bits.shape == (2, 16, 8, 8)
    assert torch.equal(to_uint8(to_pixels(pixels_to_tokens(bits, 8), 256)), images)
    nearest = (images.double() / 85).round() * 85
    assert torch.equal(to_uint8(to_pixels(pixels_to_tokens(pixels_to_bits(from_uint8(images), 2), 2), 4)).double(), nearest)


def test_noise_below_one_changes_no_token():
    tokens = torch.arange(256)
    noise = 2 * torch.rand(256, 8, generator=torch.Generator().manual_seed(0)) - 1
    assert torch.equal(from_bits(to_bits(tokens, 8) + 0.999 * noise), tokens)
    assert from_bits(-to_bits(tokens, 8)).tolist() == [255 - n for n in range(256)]


@pytest.mark.parametrize("alpha, sigma", [(0.9, 0.4), (0.3, 0.95), (1.0, 3.0)])
def test_the_posterior_mean_of_bits_is_that_of_bayes_over_all_tokens(alpha, sigma):
    """The oracle weighs each of the 2^3 tokens by its likelihood."""
    x_t = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    every = to_bits(torch.arange(8), 3).double()
    weights = (-(x_t[:, None] - alpha * every).square().sum(-1) / (2 * sigma**2)).softmax(-1)
    found = posterior_mean(x_t, torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))
    assert torch.allclose(found, weights @ every, atol=1e-12)
    assert math.isclose(float(found[0, 0]), math.tanh(alpha * float(x_t[0, 0]) / sigma**2), abs_tol=1e-12)
