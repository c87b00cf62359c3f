"""Philox4x32-10 against its published vectors and big integers; its normal numbers and integers against their distributions."""

import math
import random

import pytest
import torch
from fake_cuda import CUDA, FakeCuda

from eval import philox

CPU = torch.device("cpu")
FULL = 0xFFFFFFFF
PUBLISHED = [  # kat_vectors of Random123: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (  # digits of pi
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def in_big_integers(counter, key):
    """Philox as its paper writes it, in Python's integers."""
    (l0, r0, l1, r1), (k0, k1) = counter, key
    for turn in range(10):
        left, right = divmod(l0 * 0xD2511F53, 2**32), divmod(l1 * 0xCD9E8D57, 2**32)
        a, b = (k0 + turn * 0x9E3779B9) % 2**32, (k1 + turn * 0xBB67AE85) % 2**32
        l0, r0, l1, r1 = right[0] ^ r0 ^ a, right[1], left[0] ^ r1 ^ b, left[1]
    return l0, r0, l1, r1


def words(counter, key):
    return tuple(int(w) for w in philox.words(*map(torch.tensor, counter), key[0] | key[1] << 32))


@pytest.mark.parametrize("counter, key, published", PUBLISHED)
def test_the_words_are_those_published(counter, key, published):
    assert words(counter, key) == published


def test_the_words_are_those_of_big_integers_for_any_counter_and_key():
    draw = random.Random(0)
    for _ in range(50):
        counter, key = ([draw.getrandbits(32) for _ in range(n)] for n in (4, 2))
        assert words(counter, key) == in_big_integers(counter, key)


@pytest.mark.parametrize("size", [1, 4, 6, 64])
def test_a_normal_number_is_box_muller_of_the_words_of_its_index_draw_and_position(size):
    index, key, quarter = [0, 5, 2**32 + 5], 2**62 + 7, -(-size // 4)
    found = philox.normal(torch.tensor(index), size, 3, key)
    for row, i in enumerate(index):
        for element in range(size):
            part, position = divmod(element, quarter)
            w = in_big_integers((position, 3, i % 2**32, i // 2**32), (key % 2**32, key // 2**32))
            radius, angle = w[part // 2 * 2], 2 * math.pi * w[part // 2 * 2 + 1] / 2**32
            expected = math.sqrt(-2 * math.log((radius + 0.5) / 2**32)) * (math.sin if part % 2 else math.cos)(angle)
            assert found[row, element].item() == pytest.approx(expected, rel=2**-24, abs=1e-14)


def test_the_extreme_words_give_finite_numbers_of_at_most_6_8(monkeypatch):
    for radius, expected in ((0, math.sqrt(66 * math.log(2))), (FULL, 2**-16)):  # log(1 - h) = -h, with h = 2^-33
        monkeypatch.setattr(philox, "words", lambda *_, r=radius: (torch.tensor([[r]]), torch.tensor([[0]])) * 2)
        assert philox.normal(torch.tensor([0]), 1, 0, 0).item() == pytest.approx(expected, rel=1e-6)


def test_an_integer_is_the_upper_part_of_64_bits_times_the_number_of_values():
    index, key = [*range(9), 2**33 + 1], 2**61 + 3
    for high in (1, 10, 2**31 - 1, 2**31):  # the lower word carries into every second value of the third
        found = philox.integers(torch.tensor(index), high, 2, key)
        for value, i in zip(found.tolist(), index, strict=True):
            a, b, _, _ = in_big_integers((0, 2, i % 2**32, i // 2**32), (key % 2**32, key // 2**32))
            assert value == high * (a << 32 | b) >> 64


def kolmogorov(values, cdf):
    """The largest distance of the empirical distribution from ``cdf``, times sqrt(n). It exceeds 1.95 with a probability of 0.1 %."""
    at, n = cdf(values.double().sort().values), len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return max((steps[1:] - at).abs().max(), (at - steps[:-1]).abs().max()).item() * math.sqrt(n)


def test_normal_numbers_have_the_moments_and_the_distribution_of_the_normal_one():
    x = philox.normal(torch.arange(1000), 1000, 1, 12345).flatten().double()
    n = len(x)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
        assert abs(x.pow(power).mean() - moment) < 4 * math.sqrt(variance / n)
    assert kolmogorov(x, torch.special.ndtr) < 1.95
    for beyond in (4.0, 4.5):  # the tails too
        expected = n * math.erfc(beyond / math.sqrt(2))
        assert abs((x.abs() > beyond).sum() - expected) < 4 * math.sqrt(expected)


def test_the_angle_of_a_pair_is_uniform_and_independent_of_its_radius():
    x = philox.normal(torch.arange(500), 400, 0, 1).view(500, 4, 100)
    angle, radius = torch.atan2(x[:, 1], x[:, 0]).flatten().double(), (x[:, 0].square() + x[:, 1].square()).flatten().double()
    assert kolmogorov(angle, lambda v: v / (2 * math.pi) + 0.5) < 1.95
    assert kolmogorov(radius, lambda r: 1 - torch.exp(-r / 2)) < 1.95
    assert abs(torch.corrcoef(torch.stack([angle.cos(), radius]))[0, 1]) < 4 / math.sqrt(len(angle))


NEIGHBOURS = {
    "index": ((0, 1, 7), (1, 1, 7)),
    "upper half of the index": ((0, 1, 7), (2**32, 1, 7)),
    "draw": ((0, 1, 7), (0, 2, 7)),
    "key": ((0, 1, 7), (0, 1, 8)),
    "upper half of the key": ((0, 1, 7), (0, 1, 7 + 2**32)),
    "index and draw exchanged": ((1, 2, 7), (2, 1, 7)),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbouring_indices_draws_and_keys_are_independent(name):
    one, other = (philox.normal(torch.tensor([i]), 40_000, draw, key)[0] for i, draw, key in NEIGHBOURS[name])
    for a, b in ((one, other), (one.square(), other.square()), (one[1:], other[:-1]), (one[1:], one[:-1])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / math.sqrt(len(a))


def test_integers_are_uniform():
    counts = torch.bincount(philox.integers(torch.arange(100_000), 10, 0, 3), minlength=10)
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum()
    assert chi_square < 27.9  # 9 degrees of freedom exceed it with a probability of 0.1 %


@pytest.mark.parametrize("size", [64, 3 * 32 * 32, 40_003])
def test_any_cut_of_the_indices_gives_the_same_bits(size):
    index = torch.arange(24)
    whole = philox.normal(index, size, 1, 0)
    for cut in ([1] * 24, [7, 17], [23, 1]):
        assert torch.equal(torch.cat([philox.normal(part, size, 1, 0) for part in index.split(cut)]), whole)


def test_the_device_draws_the_same_bits_as_the_cpu_without_a_copy_and_without_waiting():
    index = torch.arange(300)
    here = philox.normal(index, 3072, 1, 5), philox.integers(index, 10, 0, 5)
    with FakeCuda() as gpu:
        there = torch.arange(300, device=CUDA)
        gpu.reset()
        made = philox.normal(there, 3072, 1, 5), philox.integers(there, 10, 0, 5)
        assert all(x.is_cuda for x in made) and not gpu.syncs and not gpu.pageable
        assert not any(operator == "copy" for _, operator, _ in gpu.launches)
        assert all(torch.equal(x, y.cpu()) for x, y in zip(here, made, strict=True))
