"""Masked diffusion of categories (D3PM 2107.03006, MaskGIT 2202.04200, MDLM 2406.07524). The contract is that of all denoisers:

    denoiser(tokens [B, ...], t [] or [B], **cond) -> E[onehot(x0) | x_t] [B, ..., K]       the probabilities of each token

Tokens are integers: 0..K-1, or K for the mask. A token is masked with probability 1 - alpha(t) and never changes again:

    alpha(t) = 1 - t            the probability that a token is kept at time t, from 1 at t = 0 to 0 at t = 1

The prediction of a token that is not masked is the token itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from distill.device import send
from distill.rng import Rng
from distill.schedule import expand

T_MIN = 1e-3  # the loss has the weight 1 / t, as in 2406.07524
TINY = 1e-30  # probabilities count as this at least, in logarithms
Uniform = Callable[[Tensor], Tensor]  # like -> numbers in [0, 1) of its shape, such as `Rng.uniform`


class MaskedLike(Protocol):
    """A call that returns E[onehot(x0) | x_t]. ``values``: K, the number of categories, and the mask token."""

    @property
    def values(self) -> int: ...

    def __call__(self, tokens: Tensor, t: Tensor, **cond: Any) -> Tensor: ...


@dataclass(frozen=True)
class Masked:
    """Turn a network of images into E[onehot(x0) | x_t] of tokens [B, C, H, W].

    ``net``: a module called as (x [B, C (K + 1), H, W], time [B], **cond) -> logits of the same shape, where x is onehot(tokens) and
    time is 1000 t. The logit of the mask is ignored. ``values``: K.
    """

    net: nn.Module
    values: int

    def __call__(self, tokens: Tensor, t: Tensor, **cond: Any) -> Tensor:
        seen = one_hot(tokens, self.values + 1).float()
        time = send((1000 * t).float().flatten().expand(len(tokens)), tokens.device)
        logits = self.net(seen.movedim(-1, 2).flatten(1, 2), time, **cond)
        logits = logits.unflatten(1, (-1, self.values + 1)).movedim(2, -1)[..., : self.values]
        return torch.where((tokens == self.values).unsqueeze(-1), logits.float().softmax(-1), seen[..., : self.values])


def alpha(t: Tensor) -> Tensor:
    """Return the probability that a token is kept at time t: 1 - t."""
    return 1 - t


def revealed(t: Tensor, s: Tensor) -> Tensor:
    """Return the probability that a token masked at t is not masked at s < t: (alpha(s) - alpha(t)) / (1 - alpha(t))."""
    return (alpha(s) - alpha(t)) / (1 - alpha(t))


def add_noise(x0: Tensor, u: Tensor, t: Tensor, mask: int) -> Tensor:
    """Return x_t: tokens x0 [B, ...], each replaced by ``mask`` where the uniform number u [B, ...] is not below alpha(t), t [B]."""
    return torch.where(u < expand(alpha(t), u), x0, mask)


def masked_entropy(probabilities: Tensor, x0: Tensor, x_t: Tensor) -> Tensor:
    """Return -sum log p(x0) over the masked tokens of x_t [B, ...], in nats, [B]."""
    logs = probabilities.gather(-1, x0.unsqueeze(-1)).squeeze(-1).clamp(min=TINY).log()
    return -torch.where(x_t == probabilities.shape[-1], logs, 0).flatten(1).sum(1)


@dataclass(frozen=True)
class MaskedRegression:
    """Return the continuous-time bound of MDLM (2406.07524, eq. 10), in nats per token, [B], at one t per sample:

        -alpha'(t) / (1 - alpha(t)) * -sum over masked tokens of log p(x0 | x_t) = 1 / t * ...,     t uniform in [T_MIN, 1]

    Its minimiser is E[onehot(x0) | x_t]. It is a `distill.train.Method` whose data are tokens.
    """

    def __call__(self, student: MaskedLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        t = T_MIN + (1 - T_MIN) * rng.uniform()
        x_t = add_noise(x0, rng.uniform(torch.empty(x0.shape)), t, student.values)
        loss = masked_entropy(student(x_t, t, **cond), x0, x_t)
        return loss / (send(t, loss.device) * x0[0].numel())


def bound(denoiser: MaskedLike, x0: Tensor, times: Tensor, uniform: Uniform, **cond: Any) -> Tensor:
    """Return one sample of the bound on -log p(x0), in nats, [B], of tokens x0 [B, ...] on a grid of times from 1 to 0 (2107.03006):

        sum over steps t -> s of (alpha(s) - alpha(t)) / (1 - alpha(t)) * E[-sum over masked tokens of log p(x0 | x_t)]

    It falls as the grid refines, towards the continuous-time bound. For the exact denoiser that is -log p(x0) itself.
    """
    total = torch.zeros(len(x0), device=x0.device)
    for t, s in pairwise(times):
        x_t = add_noise(x0, uniform(torch.empty(x0.shape, device=x0.device)), t, denoiser.values)
        total = total + send(revealed(t, s), x0.device) * masked_entropy(denoiser(x_t, t, **cond), x0, x_t)
    return total


def linear_times(steps: int) -> Tensor:
    """Return times from 1 to 0 in equal steps, float64 [steps + 1]: each step reveals equally many tokens."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def cosine_times(steps: int) -> Tensor:
    """Return the times cos(pi i / (2 steps)) of MaskGIT, float64 [steps + 1]: the first steps reveal few tokens."""
    times = (torch.arange(steps + 1, dtype=torch.float64) * (math.pi / 2 / steps)).cos()
    return torch.cat([times[:-1], times.new_zeros(1)])


def drawn(probabilities: Tensor, u: Tensor) -> Tensor:
    """Return categories [...] of probabilities [..., K] by the inverse of their cumulative sum at u [...] in [0, 1)."""
    return (u.unsqueeze(-1) >= probabilities.cumsum(-1)).sum(-1).clamp(max=probabilities.shape[-1] - 1)


def two_uniforms(tokens: Tensor, uniform: Uniform) -> tuple[Tensor, Tensor]:
    """Return two numbers in [0, 1) for each token."""
    return uniform(torch.empty(*tokens.shape, 2, device=tokens.device)).unbind(-1)  # type: ignore[return-value]


def ancestral_steps(
    denoiser: MaskedLike, tokens: Tensor, times: Tensor, uniform: Uniform, **cond: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tokens [B, ...] after the step, probabilities used [B, ..., K]) of each ancestral step: a masked token is revealed with
    probability `revealed`, with a value drawn from the denoiser. ``times``: [N + 1], or [N + 1, B] for a grid per sample."""
    for t, s in pairwise(times):
        probabilities = denoiser(tokens, t, **cond)
        chance, value = two_uniforms(tokens, uniform)
        opened = (tokens == denoiser.values) & (chance < expand(revealed(t, s), chance))
        tokens = torch.where(opened, drawn(probabilities, value), tokens)
        yield tokens, probabilities


def ancestral(denoiser: MaskedLike, tokens: Tensor, times: Tensor, uniform: Uniform, **cond: Any) -> Tensor:
    """Return tokens at the last of ``times`` from tokens at the first (2406.07524); all masked at time 1. See `ancestral_steps`."""
    for tokens, _ in ancestral_steps(denoiser, tokens, times, uniform, **cond):  # noqa: B020 (the last ones)
        pass
    return tokens


def confidence(
    denoiser: MaskedLike, tokens: Tensor, times: Tensor, uniform: Uniform, temperature: float = 4.5, **cond: Any
) -> Tensor:
    """Return tokens by the decoding of MaskGIT (2202.04200): after the step to s, floor(s L) of the L tokens are masked.

    Each step draws a value for every masked token and keeps those of the largest log p(value) + ``temperature`` s g, g Gumbel noise.
    """
    for t, s in pairwise(times):
        probabilities = denoiser(tokens, t, **cond)
        value, noise = two_uniforms(tokens, uniform)
        values = drawn(probabilities, value)
        score = probabilities.gather(-1, values.unsqueeze(-1)).squeeze(-1).clamp(min=TINY).log()
        gumbel = -(-noise.clamp(TINY, 1 - 2**-24).log()).log()
        score = score + temperature * float(s) * gumbel
        hidden = tokens == denoiser.values
        score = torch.where(hidden, score, math.inf).flatten(1)
        rank = score.argsort(1).argsort(1).view_as(tokens)
        tokens = torch.where(hidden & (rank >= math.floor(float(s) * tokens[0].numel())), values, tokens)
    return tokens


SAMPLERS: dict[str, tuple[Callable[..., Tensor], Callable[[int], Tensor]]] = {
    "ancestral": (ancestral, linear_times),
    "confidence": (confidence, cosine_times),
}
