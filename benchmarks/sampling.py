"""Sampling by as many bare calls of its network, at a large batch and at one image, guided and not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.networks import Network
from benchmarks.turns import Clock, Ratio, Work, in_turn, seconds_of
from distill.images import to_uint8
from distill.sampling import Sampling
from eval.generate import counted, generate, initial_noise
from teachers import Teacher

SAMPLERS = ("ddim", "dpm++2m", "unipc", "heun")
GUIDED = "guided ddim"
STEPS = 4
WANTED = {256: 1.02, 1: 1.05}
SHORTEST = 0.1  # seconds of a turn's work: shorter ones are repeated


def rows(
    title: str,
    network: Network,
    turns: int,
    clock: Clock,
    device: torch.device,
    batches: tuple[int, ...] = tuple(WANTED),
    names: tuple[str, ...] = (*SAMPLERS, GUIDED),
) -> Iterator[Ratio]:
    """Yield the ratio of each sampler's seconds, to uint8 pixels, by those of the bare network calls that it makes."""
    model = network.model.to(device)
    for batch in batches:
        begin = initial_noise(range(batch), model.shape, model.classes, 0)
        for name in names:
            denoiser, sampling = model.guided(2.0 if name == GUIDED else 1.0), Sampling(name.split()[-1])
            times = sampling.times_for(denoiser.schedule, STEPS)
            sample = partial(generate, denoiser, sampling, times, begin, model.condition, device)
            calls = [0]
            generate(counted(denoiser, calls), sampling, times, begin, model.condition, device)
            call = bare(model, batch * (2 if name == GUIDED else 1), device)
            needed = calls[0] // (batch * (2 if name == GUIDED else 1))
            repeats = max(1, round(SHORTEST / max(1e-4, seconds_of(sample, clock))))
            ours, theirs = partial(_repeat, partial(_pixels, sample), repeats), partial(_repeat, call, repeats * needed)
            yield in_turn(f"{title} {name}, batch {batch}", ours, theirs, turns, clock, WANTED.get(batch))


def bare(model: Teacher, batch: int, device: torch.device) -> Work:
    """Return a function that calls the bare network once."""
    labels = None if model.classes is None else torch.arange(batch, device=device) % model.classes
    x, t = torch.randn(batch, *model.shape, device=device), torch.full((batch,), 500.0, device=device)
    return torch.inference_mode()(partial(model.parametric.net, x, t, **model.condition(labels)))


def _pixels(sample: Callable[[], Tensor]) -> Tensor:
    return to_uint8(sample())


def _repeat(work: Work, times: int) -> None:
    for _ in range(times):
        work()
