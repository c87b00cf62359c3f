"""Search for time grids, by dynamic programming along a fine trajectory or by coordinate descent.

Dynamic programming needs only a denoiser and serves training-free samplers. Coordinate descent needs a figure of merit and serves
students, whose steps are not those of a differential equation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.schedule import expand, move
from distill.self_conditioning import carrying


@torch.inference_mode()
def trajectory(denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Run DDIM from x at times[0]. Return x at every time, T + 1 of them, and E[x0 | x] at every time but the last."""
    denoiser, xs, x0s = carrying(denoiser), [x], []
    for t, s in pairwise(times):
        x0s.append(denoiser(xs[-1], t, **cond))
        xs.append(move(denoiser.schedule, xs[-1], x0s[-1], t, s))
    return xs, x0s


@torch.inference_mode()
def step_costs(denoiser: DenoiserLike, x: Tensor, fine: Tensor, **cond: Any) -> Tensor:
    """Return the error of one Euler step from fine[i] to fine[j] against the fine trajectory, [T, T + 1]; inf for j <= i.

    The error is the root mean square over samples in x / alpha, the variable in which the trajectory is d(x/alpha) = eps d(sigma/alpha).
    """
    schedule, (xs, x0s) = denoiser.schedule, trajectory(denoiser, x, fine, **cond)
    costs = torch.full((len(fine) - 1, len(fine)), torch.inf, dtype=torch.float64)
    for i in range(len(fine) - 1):
        for j in range(i + 1, len(fine)):
            off = (move(schedule, xs[i], x0s[i], fine[i], fine[j]) - xs[j]) / expand(schedule.alpha(fine[j]), x)
            costs[i, j] = off.double().square().mean().sqrt()
    return costs


def shortest(costs: Tensor, steps: int, growth: float = 1.0) -> list[int]:
    """Return the cheapest path of ``steps`` steps from node 0 to the last node, with cost c(i, j) + ``growth`` c(rest) at each node.

    ``growth``: how much more each later error weighs. GITS (Chen et al. 2405.11326, section 3.3) uses 1.15; 1 was better with these
    costs, and neither was always better with their squares (EXPERIMENTS.md). Raises ValueError for more steps than nodes.
    """
    nodes = costs.shape[1]
    if not 1 <= steps < nodes:
        raise ValueError(f"a path of {steps} steps on a grid of {nodes - 1}: accepted are 1 to {nodes - 1}")
    rest, choices = costs[:, -1], []
    rest = torch.cat([rest, torch.tensor([torch.inf], dtype=costs.dtype)])
    for _ in range(steps - 1):
        rest, choice = (costs + growth * rest).min(1)
        rest = torch.cat([rest, torch.tensor([torch.inf], dtype=costs.dtype)])
        choices.append(choice)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, nodes - 1]


def gits(costs: Tensor, fine: Tensor, steps: int, growth: float = 1.0) -> Tensor:
    """Return the grid [steps + 1] of the fine times on the `shortest` path."""
    return fine[shortest(costs, steps, growth)]


def coordinate_descent(
    merit: Callable[[Sequence[int]], float], start: Sequence[int], nodes: int, rounds: int = 3
) -> tuple[list[int], float]:
    """Minimise ``merit`` over the inner indices: move one at a time by +-1, +-2, +-4, ... until a round changes nothing.

    ``start``: increasing indices from 0 to ``nodes`` - 1; both ends are fixed. Returns the indices and their merit.
    """
    best, value = list(start), merit(start)
    for _ in range(rounds):
        before = value
        for k in range(1, len(best) - 1):
            stride = 1
            while stride < nodes:
                for new in (best[k] - stride, best[k] + stride):
                    if best[k - 1] < new < best[k + 1]:
                        candidate = [*best[:k], new, *best[k + 1 :]]
                        if (found := merit(candidate)) < value:
                            best, value = candidate, found
                stride *= 2
        if value == before:
            break
    return best, value
