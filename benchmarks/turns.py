"""Ratios of two pieces of work that take turns in one run, each with the noise floor of the same run.

One turn is: theirs, ours, theirs again. Its ratio is ours by the mean of theirs; its A/A ratio is theirs by theirs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from eval.machine import clock

Work = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """Hold the median over ``turns`` of the seconds of ours by those of theirs. Less is better.

    ``floor``: the ratio of theirs to itself in the same run is 1 +- this. ``seconds``: the median of theirs. ``wanted``: the most that
    the project accepts; None for no target. ``difference``: the largest one between both results, where they are the same calculation.
    """

    name: str
    ratio: float
    floor: float
    turns: int
    seconds: float
    wanted: float | None = None
    difference: float | None = None

    def __str__(self) -> str:
        wanted = "" if self.wanted is None else f", wanted <= {self.wanted:g}"
        same = "" if self.difference is None else f", largest difference {self.difference:.1g}"
        return f"{self.ratio:.3f} (A/A 1 +- {self.floor:.3f}, {self.turns} turns of {self.seconds:.3g} s{wanted}{same})"


@dataclass(frozen=True)
class Figure:
    """Hold a number that is no ratio of two works in turn, or None where a package is missing. ``wanted``: what is accepted, in words."""

    name: str
    value: float | None
    unit: str
    wanted: str = ""

    def __str__(self) -> str:
        number = "" if self.value is None else f"{self.value:.4g} "
        return f"{number}{self.unit}" + (f" (wanted {self.wanted})" if self.wanted else "")


Row = Ratio | Figure


def clock_of(name: str, device: torch.device) -> Clock:
    """Return the clock "cpu", seconds of this process on all its threads, or "wall", seconds after the device has finished."""
    return time.process_time if name == "cpu" else lambda: clock(device)


def seconds_of(work: Work, clock: Clock) -> float:
    """Return the seconds of one call."""
    began = clock()
    work()
    return clock() - began


def in_turn(
    name: str, ours: Work, theirs: Work, turns: int, clock: Clock, wanted: float | None = None, difference: float | None = None
) -> Ratio:
    """Return the `Ratio` of ours by theirs over ``turns`` turns, after one turn of warm-up."""
    taken = [[seconds_of(work, clock) for work in (theirs, ours, theirs)] for _ in range(turns + 1)][1:]
    ratio = median(2 * our / (one + two) for one, our, two in taken)
    floor = max(abs(end - 1) for end in interval([two / one for one, _, two in taken]))
    return Ratio(name, ratio, floor, turns, median(one for one, _, _ in taken), wanted, difference)


def interval(values: list[float]) -> tuple[float, float]:
    """Return a 95 % interval of the median, from order statistics; the whole range for fewer than six values."""
    n, low, tail = len(values), 0, 0.0
    while (tail := tail + math.comb(n, low) / 2**n) <= 0.025:
        low += 1
    low = max(0, low - 1)
    ranked = sorted(values)
    return ranked[low], ranked[n - 1 - low]
