"""Self-distillation through time of masked diffusion (SDTT, 2410.21035): one step of the student predicts what m steps of the teacher do.

The target of a masked token of x_t, from an ancestral path of the teacher x_t = x_{t_0}, x_{t_1}, ..., x_{t_m}:

    target = E_teacher[onehot(x0) | x_{t_i}]      i: the step that reveals it; m - 1 where it is still masked at the end
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.device import send
from distill.masked import TINY, MaskedLike, Uniform, add_noise, ancestral_steps
from distill.rng import Rng


@torch.no_grad()
def target(teacher: MaskedLike, x_t: Tensor, times: Tensor, uniform: Uniform, **cond: Any) -> Tensor:
    """Return the probabilities [B, ..., K] that the teacher's steps over ``times`` [m + 1] or [m + 1, B] used for each token."""
    hidden, used = x_t, None
    for tokens, probabilities in ancestral_steps(teacher, x_t, times, uniform, **cond):
        open_until_now = (hidden == teacher.values).unsqueeze(-1)
        used = probabilities if used is None else torch.where(open_until_now, probabilities, used)
        hidden = tokens
    assert used is not None
    return used


def divergence(target: Tensor, student: Tensor) -> Tensor:
    """Return KL(target || student), in nats, [...], of probabilities [..., K]."""
    p, q = target.clamp(min=TINY), student.clamp(min=TINY)
    return (target * (p.log() - q.log())).sum(-1)


@dataclass(frozen=True)
class SelfDistillation:
    """Return the divergence of the student from the target, in nats per token with the weight 1 / t, [B].

    ``steps``: of the student; t is drawn from its grid 1/steps, 2/steps, ..., 1, and the end of the jump is the next time. ``substeps``:
    m of the teacher. ``reverse``: KL(student || target) instead of KL(target || student).

    The first divergence has the mean target as its minimiser. For an exact teacher this is the teacher's own prediction, since
    E[E[onehot(x0) | x_s] | x_t] = E[onehot(x0) | x_t]. The second one has the normalised geometric mean, which is sharper.
    """

    teacher: MaskedLike
    steps: int
    substeps: int = 2
    reverse: bool = False

    def __call__(self, student: MaskedLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        t = (rng.integers(self.steps) + 1) / self.steps
        x_t = add_noise(x0, rng.uniform(torch.empty(x0.shape)), t, student.values)
        part = torch.linspace(0, 1, self.substeps + 1).unsqueeze(1)
        x0_hat = target(self.teacher, x_t, t - part / self.steps, rng.uniform, **cond)
        pair = (x0_hat, student(x_t, t, **cond))
        loss = divergence(*(pair[::-1] if self.reverse else pair)).flatten(1).mean(1)
        return loss / send(t, loss.device)
