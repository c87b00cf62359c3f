"""Masked diffusion on a Markov chain of three tokens, of which all sequences are enumerated: every expectation is a table."""

import itertools
import math

import pytest
import torch
from torch import nn

from distill.masked import (
    Masked,
    MaskedRegression,
    add_noise,
    ancestral,
    ancestral_steps,
    bound,
    confidence,
    cosine_times,
    drawn,
    linear_times,
)
from distill.rng import Rng
from distill.sdtt import SelfDistillation, divergence, target

K, LENGTH = 3, 3
START = torch.tensor([0.5, 0.3, 0.2])
MOVES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6]])
SEQUENCES = torch.tensor(list(itertools.product(range(K), repeat=LENGTH)))
CHAIN = START[SEQUENCES[:, 0]] * MOVES[SEQUENCES[:, 0], SEQUENCES[:, 1]] * MOVES[SEQUENCES[:, 1], SEQUENCES[:, 2]]
ALL_MASKED = torch.full((LENGTH,), K)


class Exact:
    """E[onehot(x0) | x_t] as a table over all masked sequences; it does not depend on t."""

    values = K

    def __init__(self, weights):
        states = torch.tensor(list(itertools.product(range(K + 1), repeat=LENGTH)))
        agree = ((states[:, None] == SEQUENCES) | (states[:, None] == K)).all(-1) * weights
        expected = torch.einsum("bn,nlk->blk", agree, nn.functional.one_hot(SEQUENCES, K).float())
        self.table = expected / agree.sum(1).clamp(min=1e-30)[:, None, None]

    def __call__(self, tokens, t, **cond):
        return self.table[(tokens * torch.tensor([(K + 1) ** 2, K + 1, 1])).sum(1)]


EXACT = Exact(CHAIN)


def rng(n, seed=0):
    return Rng(torch.Generator().manual_seed(seed), n)


def frequencies(tokens):
    index = (tokens * torch.tensor([K * K, K, 1])).sum(1)
    return torch.bincount(index, minlength=len(SEQUENCES)) / len(tokens)


def total_variation(one, two):
    return float((one - two).abs().sum()) / 2


def sample(n, weights=CHAIN, seed=0):
    return SEQUENCES[torch.multinomial(weights, n, True, generator=torch.Generator().manual_seed(seed))]


def test_the_continuous_time_loss_of_the_exact_denoiser_is_the_negative_log_likelihood_of_each_sequence():
    """With k of L tokens masked, the integral of t^k (1 - t)^(L - k) / t is (k - 1)! (L - k)! / L!."""
    for x0, p in zip(SEQUENCES, CHAIN, strict=True):
        total = 0.0
        for hidden in itertools.product([False, True], repeat=LENGTH):
            k = sum(hidden)
            if k:
                x_t = torch.where(torch.tensor(hidden), K, x0)
                logs = EXACT(x_t[None], torch.tensor(0.5))[0].gather(1, x0[:, None])[:, 0].log()
                weight = math.factorial(k - 1) * math.factorial(LENGTH - k) / math.factorial(LENGTH)
                total -= weight * float(logs[torch.tensor(hidden)].sum())
        assert total == pytest.approx(-math.log(p), rel=1e-5)


def test_the_bound_of_the_exact_denoiser_falls_to_the_entropy_as_the_grid_refines():
    n, entropy = 20_000, -float((CHAIN * CHAIN.log()).sum())
    found = [float(bound(EXACT, sample(n), linear_times(steps), rng(n).uniform).mean()) for steps in (1, 4, 64)]
    marginals = [torch.bincount(SEQUENCES[:, i], CHAIN, minlength=K) for i in range(LENGTH)]
    assert found[0] == pytest.approx(-sum(float((m * m.log()).sum()) for m in marginals), abs=0.03)  # one step factorises
    assert found[0] > found[1] + 0.05 > found[2] + 0.1 and found[2] == pytest.approx(entropy, abs=0.03)


def test_the_training_loss_estimates_that_entropy_per_token_and_is_least_at_the_exact_denoiser():
    n, entropy = 100_000, -float((CHAIN * CHAIN.log()).sum())
    loss = lambda student: float(MaskedRegression()(student, sample(n), rng=rng(n), progress=0).mean())  # noqa: E731
    assert LENGTH * loss(EXACT) == pytest.approx(entropy, abs=0.05)
    for other in (CHAIN.sqrt(), CHAIN.square(), torch.ones_like(CHAIN), CHAIN * (1 + 0.3 * (SEQUENCES[:, 1] == 0))):
        assert loss(Exact(other)) > loss(EXACT) + 1e-4


def test_a_token_is_masked_with_probability_t_and_reveals_only_the_rest():
    n = 40_000
    x0 = sample(n)
    x_t = add_noise(x0, rng(n).uniform(x0.float()), torch.full((n,), 0.3), K)
    assert float((x_t == K).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(x_t[x_t != K], x0[x_t != K])


def test_sampling_one_token_at_a_time_has_the_exact_distribution_and_one_step_that_of_the_marginals():
    n = 20_000
    times = linear_times(100)  # 3 % of the sequences reveal two tokens in one step
    found = frequencies(ancestral(EXACT, ALL_MASKED.expand(n, -1), times, rng(n).uniform))
    assert total_variation(found, CHAIN) < 0.02
    marginals = torch.stack([torch.bincount(SEQUENCES[:, i], CHAIN, minlength=K) for i in range(LENGTH)])
    product = math.prod(marginals[i][SEQUENCES[:, i]] for i in range(LENGTH))
    once = frequencies(ancestral(EXACT, ALL_MASKED.expand(n, -1), linear_times(1), rng(n).uniform))
    assert total_variation(once, product) < 0.02 < 0.2 < total_variation(once, CHAIN)
    one_by_one = torch.tensor([1.0, 2 / 3 + 1e-6, 1 / 3 + 1e-6, 0.0])  # floor(s L) tokens stay masked
    ordered = frequencies(confidence(EXACT, ALL_MASKED.expand(n, -1), one_by_one, rng(n).uniform, temperature=1e6))
    assert total_variation(ordered, CHAIN) < 0.02


def test_one_step_of_a_product_distribution_is_exact():
    n, product = 40_000, math.prod(START[SEQUENCES[:, i]] for i in range(LENGTH))
    found = frequencies(ancestral(Exact(product), ALL_MASKED.expand(n, -1), linear_times(1), rng(n).uniform))
    assert total_variation(found, product) < 0.02


@pytest.mark.parametrize("sampler, times", [(ancestral, linear_times(5)), (confidence, cosine_times(5))])
def test_known_tokens_never_change_and_no_token_stays_masked(sampler, times):
    n = 500
    x_t = torch.where(torch.rand(n, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5, sample(n), K)
    found = sampler(EXACT, x_t, times, rng(n).uniform)
    assert torch.equal(found[x_t != K], x_t[x_t != K]) and int(found.max()) < K
    before = x_t
    for after, _ in ancestral_steps(EXACT, x_t, linear_times(5), rng(n).uniform):
        assert torch.equal(after[before != K], before[before != K])
        before = after


def test_maskgit_leaves_the_floor_of_s_times_the_length_masked_and_opens_the_likeliest_first():
    x = ALL_MASKED.expand(200, -1)
    for s, left in ((0.7, 2), (0.4, 1), (0.0, 0)):
        assert ((confidence(EXACT, x, torch.tensor([1.0, s]), rng(200).uniform) == K).sum(1) == left).all()
    sure = Exact(CHAIN * (SEQUENCES[:, 1] == 2))
    first = confidence(sure, x, torch.tensor([1.0, 0.7]), rng(200).uniform, temperature=0)
    assert (first[:, 1] == 2).all() and (first[:, [0, 2]] == K).all()


def test_categories_are_drawn_by_the_inverse_of_the_cumulative_sum():
    p = torch.tensor([0.2, 0.0, 0.5, 0.3])
    u = torch.tensor([0.0, 0.19, 0.2, 0.69, 0.71, 1 - 2**-24])
    assert drawn(p.expand(6, -1), u).tolist() == [0, 0, 2, 2, 3, 3]


def test_the_target_of_one_substep_is_the_teachers_own_prediction():
    x_t = torch.where(torch.rand(50, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5, sample(50), K)
    t = torch.full((50,), 0.5)
    assert torch.equal(target(EXACT, x_t, torch.stack([t, t / 2]), rng(50).uniform), EXACT(x_t, t))


def test_the_target_holds_the_prediction_of_the_step_that_reveals_a_token_and_the_last_one_for_the_rest():
    n, times = 300, torch.tensor([1.0, 0.6, 0.3, 0.1])
    found = target(EXACT, ALL_MASKED.expand(n, -1), times, rng(n).uniform)
    path = [ALL_MASKED.expand(n, -1), *(x for x, _ in ancestral_steps(EXACT, ALL_MASKED.expand(n, -1), times, rng(n).uniform))]
    for row in range(n):
        for place in range(LENGTH):
            step = next((i for i in range(3) if path[i + 1][row, place] != K), 2)
            assert torch.allclose(found[row, place], EXACT(path[step][row : row + 1], times[step])[0, place])
    assert all((path[-1] == K).sum(1).eq(left).any() for left in (0, 1))


def test_the_mean_target_of_an_exact_teacher_is_its_own_prediction():
    """So no student of the forward divergence can beat an exact teacher: E[E[x0 | x_s] | x_t] = E[x0 | x_t]."""
    n = 40_000
    found = target(EXACT, ALL_MASKED.expand(n, -1), linear_times(4), rng(n).uniform)
    assert torch.allclose(found.mean(0), EXACT(ALL_MASKED[None], torch.tensor(1.0))[0], atol=0.01)
    assert float(found.var(0).max()) > 0.02


def test_distillation_is_zero_at_its_target_and_each_divergence_is_least_at_its_own_mean():
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    assert torch.equal(divergence(p, p), torch.zeros(2)) and (divergence(p, p.flip(0)) > 0.1).all()
    grid = torch.linspace(0.01, 0.99, 99)
    students = torch.stack([grid, 1 - grid], -1)
    forward = sum(divergence(row.expand_as(students), students) for row in p)
    backward = sum(divergence(students, row.expand_as(students)) for row in p)
    geometric = p.log().mean(0).softmax(-1)
    assert float(grid[forward.argmin()]) == pytest.approx(0.7) and abs(float(grid[backward.argmin()] - geometric[0])) < 0.006
    method = SelfDistillation(EXACT, steps=4, substeps=1)
    same = {"rng": rng(2000), "progress": 0}
    assert float(method(EXACT, sample(2000), **same).abs().max()) < 1e-6
    assert float(method(Exact(torch.ones(27)), sample(2000), rng=rng(2000), progress=0).mean()) > 0.01


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2 * (K + 1), 2 * (K + 1), 3, padding=1)
        self.times = []

    def forward(self, x, t, **cond):
        self.times.append(t)
        return self.layer(x)


def test_the_denoiser_of_a_network_gives_probabilities_and_keeps_known_tokens():
    torch.manual_seed(0)
    masked, tokens = Masked(Net(), K), torch.randint(K + 1, (5, 2, 4, 4))
    p = masked(tokens, torch.tensor(0.25))
    assert p.shape == (5, 2, 4, 4, K) and torch.allclose(p.sum(-1), torch.ones(5, 2, 4, 4), atol=1e-6)
    assert torch.equal(p[tokens != K].argmax(-1), tokens[tokens != K]) and (p[tokens != K].max(-1).values == 1).all()
    assert float(p[tokens == K].detach().max()) < 1 and masked.net.times[0].tolist() == [250.0] * 5
    hidden = torch.where(torch.arange(4) == 0, K, tokens)
    assert not torch.equal(
        masked(hidden, torch.tensor(0.25))[..., 0, :], masked(hidden.roll(1, 0), torch.tensor(0.25))[..., 0, :]
    )


def test_uniform_numbers_do_not_depend_on_how_a_batch_is_cut():
    like = torch.empty(600, 2, 3)
    whole = Rng.seeded(7, torch.device("cpu"), 600).uniform(like)
    part = Rng.seeded(7, torch.device("cpu"), 600, slice(250, 530)).uniform(like[250:530])
    assert torch.equal(whole[250:530], part) and whole.shape == like.shape and whole.min() >= 0 and whole.max() < 1
