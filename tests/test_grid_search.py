import itertools

import pytest
import torch
from conftest import refuses

from distill import grid
from distill.grid_search import coordinate_descent, gits, shortest, step_costs, trajectory
from distill.samplers import ddim
from distill.schedule import EDM, Flow
from teachers.oracle import Gaussian, Mixture


def mixture(schedule):
    means = torch.tensor([[-0.6, 0.0], [0.7, 0.4]]).double()
    return Mixture(schedule, means, torch.full((2,), 0.1).double(), torch.full((2,), 0.5).double())


def test_the_trajectory_is_ddims():
    oracle, times = mixture(EDM()), grid.karras(EDM(), 12)
    x = 80 * torch.randn(5, 2).double()
    xs, x0s = trajectory(oracle, x, times)
    assert len(xs) == 13 and len(x0s) == 12
    assert torch.allclose(xs[-1], ddim(oracle, x, times))


def test_a_fine_step_costs_nothing_and_longer_ones_more():
    oracle, times = mixture(EDM()), grid.karras(EDM(), 10)
    costs = step_costs(oracle, 80 * torch.randn(64, 2).double(), times)
    assert costs.shape == (10, 11)
    assert all(costs[i, i + 1] < 1e-9 for i in range(10))
    assert all(torch.isinf(costs[i, j]) for i in range(10) for j in range(i + 1))
    assert costs[0, 5] > costs[0, 3] > 0


def test_a_straight_path_costs_nothing_however_long_its_steps():
    """Between pure noise and one point, E[x0 | x_t] is that point: one Euler step is exact."""
    point = Gaussian(Flow(), torch.tensor([0.3, -0.2]).double(), torch.tensor([1e-9, 1e-9]).double())
    costs = step_costs(point, torch.randn(16, 2).double(), grid.uniform(Flow(), 8))
    assert costs[costs.isfinite()].max() < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("growth", [1.0, 1.15, 2.0])
def test_the_path_is_the_cheapest_of_all(steps, growth):
    generator = torch.Generator().manual_seed(steps)
    costs = torch.rand(7, 8, generator=generator, dtype=torch.float64)
    costs[torch.ones(7, 8).tril().bool()] = torch.inf

    def total(path):
        return sum(growth**k * float(costs[i, j]) for k, (i, j) in enumerate(itertools.pairwise(path)))

    every = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), steps - 1)]
    assert total(shortest(costs, steps, growth)) == pytest.approx(min(map(total, every)))


def test_a_searched_grid_beats_the_usual_one_at_few_steps():
    schedule = EDM()
    oracle = mixture(schedule)
    generator = torch.Generator().manual_seed(0)
    searching, testing = (80 * torch.randn(256, 2, generator=generator).double() for _ in range(2))
    fine = grid.karras(schedule, 60)
    costs = step_costs(oracle, searching, fine)
    truth = ddim(oracle, testing, grid.karras(schedule, 1000))
    for steps in (4, 6, 8):
        times = gits(costs, fine, steps)
        assert len(times) == steps + 1 and times[0] == schedule.t_max and times[-1] == 0
        searched, usual = ((ddim(oracle, testing, t) - truth).abs().mean() for t in (times, grid.karras(schedule, steps)))
        assert searched < 0.9 * usual, steps


def test_more_steps_than_the_grid_has_are_refused():
    refuses("accepted are 1 to 5", shortest, torch.zeros(5, 6), 6)


def test_coordinate_descent_finds_the_minimum_of_a_separable_bowl_and_never_worsens():
    goal = [0, 9, 23, 40]
    calls = []

    def merit(path):
        calls.append(path)
        return sum(abs(a - b) for a, b in zip(path, goal, strict=True))

    found, value = coordinate_descent(merit, [0, 13, 26, 40], 41)
    assert found == goal and value == 0
    assert all(list(path) == sorted(set(path)) and path[0] == 0 and path[-1] == 40 for path in calls)
    flat, value = coordinate_descent(lambda path: 1.0, [0, 13, 26, 40], 41)
    assert flat == [0, 13, 26, 40] and value == 1
