"""Gaussian and mixture data, whose consistency functions and jumps are closed forms or exact to the solver's error."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from distill.rng import Rng
from distill.schedule import Cosine, Schedule, explain
from teachers.oracle import Gaussian, Mixture

MEAN, STD = torch.tensor([0.5, -0.3]).double(), torch.tensor([0.4, 0.8]).double()


def rng(n, seed=0):
    return Rng(torch.Generator().manual_seed(seed), n)


@dataclass(frozen=True)
class Exact:
    """The consistency function of Gaussian data: where the path through x_t ends."""

    schedule: Schedule

    def __call__(self, x_t, t, **cond):
        clean = torch.full_like(t, self.schedule.t_clean)
        return Gaussian(self.schedule, MEAN, STD).flow(x_t, t, clean)


def data(n):
    return MEAN + STD * torch.randn(n, 2, generator=torch.Generator().manual_seed(9)).double()


class Small(nn.Module):
    """A network of two dimensions and one time that can hold the consistency map of a Gaussian."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, t, to=None):
        t, to = t[:, None], (t if to is None else to)[:, None]
        return self.body(torch.cat([x, t, t - to, torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)], 1))


class SmallHeads(nn.Module):
    """`Small` with 8 heads, one for each eighth of the time axis, for parallel decoding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 16))

    def forward(self, x, t, to=None, head=None):
        number = torch.arange(8)
        first = (8 * (1 - t)).round().clamp(max=7)[:, None]
        last = first + 1 if to is None else torch.maximum((8 * (1 - to)).round()[:, None], first + 1)
        weights = (number >= first) & (number < last) if head is None else number == head[:, None]
        weights = weights / weights.sum(1, keepdim=True)
        return torch.einsum("bn,bnc->bc", weights.to(x), self.body(torch.cat([x, t[:, None]], 1)).unflatten(1, (8, 2)))


MEANS, DEVIATION, SHARES = torch.tensor([[0.8, 0.0], [-0.5, 0.6], [-0.4, -0.7]]), 0.3, torch.tensor([0.4, 0.3, 0.3])
ORACLE = Mixture(Cosine(), MEANS, torch.full((3,), DEVIATION), SHARES)


def mixture(n, seed):
    generator = torch.Generator().manual_seed(seed)
    of = torch.multinomial(SHARES, n, True, generator=generator)
    return MEANS[of] + DEVIATION * torch.randn(n, 2, generator=generator)


@dataclass(frozen=True)
class ExactJump:
    """The x0 whose move from t to ``to`` lands on the path of Gaussian data; the denoiser itself where the two are one."""

    schedule: Schedule

    def __call__(self, x_t, t, to=None, **cond):
        teacher = Gaussian(self.schedule, MEAN, STD)
        t = t.expand(len(x_t))
        to = t if to is None else to.expand(len(x_t))
        near = torch.where(to < t, to, t / 2)
        x0 = explain(self.schedule, x_t, teacher.flow(x_t, t, near), t, near)
        return torch.where((to < t)[:, None], x0, teacher(x_t, t))
