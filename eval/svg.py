"""Charts as SVG inside a page: intervals, labels at the ends of curves, and a title that is shown on hover.

They name no colour. The style of the page gives it by class, and ``currentColor`` to axes and text, so that dark mode works. There is
no style attribute and no script, which the pages' content-security policy would refuse. matplotlib's SVG is 20 times as large, has fixed
colours, and needs style attributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 570, 380
LEFT, TOP, BOTTOM = 60, 14, 336  # of the area of the data
LABELS = 165  # width of the names of curves on the right of it
LINE = 13  # between two labels of curves
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-5L5 0L0 5L-5 0z",
    "M0-4.8L4.6 3.6H-4.6z",
    "M0 4.8L4.6-3.6H-4.6z",
    "M-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "M0-5L1.4-1.6 5-1.5 2.2.8 3.1 4.3 0 2.3-3.1 4.3-2.2.8-5-1.5-1.4-1.6z",
    "M-4.5-3L-3-4.5 0-1.5 3-4.5 4.5-3 1.5 0 4.5 3 3 4.5 0 1.5-3 4.5-4.5 3-1.5 0z",
)


@dataclass(frozen=True)
class Point:
    """Hold one point, the ends of its interval or None, the text shown on hover, and the id of the element that it links to."""

    x: float
    y: float
    ends: Sequence[float] | None = None
    tip: str = ""
    link: str = ""


@dataclass(frozen=True)
class Curve:
    """Hold one curve. ``look``: its classes; ``marker``: index into `MARKERS`, None for none. An empty name gives no label."""

    name: str
    points: Sequence[Point]
    look: str
    marker: int | None = None


@dataclass(frozen=True)
class Axis:
    """Hold the label and the scale of an axis: "log", "linear", or "symlog", asinh(v / unit), which is linear about 0.

    ``ticks``: the values to mark, as far as there is room; by default 1, 2 and 5 times powers of ten.
    """

    label: str
    scale: str = "log"
    unit: float = 1.0
    ticks: Sequence[float] = ()

    def __call__(self, value: float) -> float:
        """Return the place of a value, before it is fitted into the area."""
        if self.scale == "log":
            return math.log10(value)
        return math.asinh(value / self.unit) if self.scale == "symlog" else value

    def marks(self, low: float, high: float) -> list[float]:
        """Return the ticks between two values, in order."""
        if self.ticks:
            found = list(self.ticks)
        elif self.scale == "linear":
            step = 10 ** math.floor(math.log10(max(high - low, 1e-12)))
            step *= 0.2 if (high - low) / step < 2 else 0.5 if (high - low) / step < 5 else 1
            found = [round(i * step, 12) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
        else:
            largest = max(abs(low), abs(high), self.unit)
            smallest = low if self.scale == "log" else self.unit
            decades = range(math.floor(math.log10(smallest)), math.ceil(math.log10(largest)) + 1)
            factors = (1, 2, 5) if len(decades) < 4 and self.scale == "log" else (1,)
            found = [float(f"{f}e{decade}") for decade in decades for f in factors]
            found = found if self.scale == "log" else [-v for v in found] + [0.0] + found
        return sorted({v for v in found if low <= v <= high})


@dataclass(frozen=True)
class _Fit:
    """Fit an axis between two places of the picture."""

    axis: Axis
    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(cls, axis: Axis, values: Iterable[float], start: float, end: float) -> _Fit:
        known = list(values)
        low, high = axis(min(known)), axis(max(known))
        edge = 0.05 * (high - low) or 0.5
        return cls(axis, low - edge, high + edge, start, end)

    def __call__(self, value: float) -> float:
        return self.place(self.axis(value))

    def place(self, at: float) -> float:
        part = (min(max(at, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + part * (self.end - self.start), 1)

    def marks(self, gap: float) -> list[tuple[float, float]]:
        """Return value and place of each tick that is at least ``gap`` away from the one before it."""
        back = {"log": lambda v: 10**v, "symlog": lambda v: math.sinh(v) * self.axis.unit, "linear": float}[self.axis.scale]
        out: list[tuple[float, float]] = []
        for value in self.axis.marks(back(self.low), back(self.high)):
            if not out or abs(self(value) - out[-1][1]) >= gap:
                out.append((value, self(value)))
        return out


def look(i: int) -> tuple[str, int]:
    """Return the classes and the marker of the i-th model: both together are different for 64 models."""
    return f"c{i % len(MARKERS)} student", (i + i // len(MARKERS)) % len(MARKERS)


def chart(title: str, curves: Sequence[Curve], x: Axis, y: Axis, rules: Sequence[tuple[float, str]] = ()) -> str:
    """Return an <svg>. ``rules``: horizontal lines with their labels. Returns nothing without any point that the axes can show.

    On a logarithmic axis an interval ends at a quarter of the smallest value, or above.
    """
    curves = [Curve(c.name, [p for p in c.points if _fits(p, x, y)], c.look, c.marker) for c in curves]
    points = [p for c in curves for p in c.points]
    if not points:
        return ""
    least = min(p.y for p in points) / 4 if y.scale == "log" else -math.inf
    ends = [max(end, least) for c in curves if "thin" not in c.look for p in c.points for end in p.ends or ()]
    right = WIDTH - (LABELS if any(c.name for c in curves) else 14)
    across = _Fit.of(x, [p.x for p in points], LEFT, right)
    up = _Fit.of(y, [*(p.y for p in points), *ends, *(v for v, _ in rules if y.scale != "log" or v >= least)], BOTTOM, TOP)
    parts = [_axes(across, up)]
    for value, label in rules:
        if y.scale != "log" or value > 0:
            parts.append(f'<path class="rule" d="M{LEFT} {up(value)}H{right}"/>')
            parts.append(f'<text class="rule" x="{LEFT + 4}" y="{up(value) - 4:.1f}">{escape(label)}</text>')
    parts += [_curve(c, across, up, least) for c in curves if c.points]
    parts.append(_labels([c for c in curves if c.points and c.name], across, up))
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{escape(title)}">'
    return head + "".join(parts) + "</svg>"


def _fits(point: Point, x: Axis, y: Axis) -> bool:
    shown = all(v > 0 or axis.scale != "log" for v, axis in ((point.x, x), (point.y, y)))
    return shown and math.isfinite(point.x) and math.isfinite(point.y)


def _axes(x: _Fit, y: _Fit) -> str:
    lines = "".join(f"M{at} {TOP}V{BOTTOM}" for _, at in x.marks(24)) + "".join(
        f"M{LEFT} {at}H{x.end}" for _, at in y.marks(14)
    )
    out = f'<path class="grid" d="{lines}"/>'
    out += "".join(f'<text x="{at}" y="{BOTTOM + 16}" text-anchor="middle">{v:,g}</text>' for v, at in x.marks(24))
    out += "".join(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(v)}</text>' for v, at in y.marks(14))
    middle = (LEFT + x.end) / 2
    out += f'<text class="name" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.axis.label)}</text>'
    turn = f'transform="translate(13 {(TOP + BOTTOM) / 2}) rotate(-90)"'
    return out + f'<text class="name" {turn} text-anchor="middle">{escape(y.axis.label)}</text>'


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _curve(curve: Curve, x: _Fit, y: _Fit, least: float) -> str:
    line = "L".join(f"{x(p.x)} {y(p.y)}" for p in curve.points)
    bars = "".join(f"M{x(p.x)} {y(max(p.ends[0], least))}V{y(p.ends[1])}" for p in curve.points if p.ends)
    out = f'<path class="bars" d="{bars}"/>' if bars and "thin" not in curve.look else ""
    out += f'<path class="line" d="M{line}"/>'
    for p in curve.points if curve.marker is not None else ():
        mark = f'<path class="mark" d="{MARKERS[curve.marker % len(MARKERS)]}"/><circle class="hit" r="8"/>'  # type: ignore[operator]
        mark = f'<g transform="translate({x(p.x)} {y(p.y)})">{mark}<title>{escape(p.tip)}</title></g>'
        out += f'<a href="#{escape(p.link)}" aria-label="{escape(p.tip)}">{mark}</a>' if p.link else mark
    return f'<g class="{escape(curve.look)}">{out}</g>'


def _labels(curves: list[Curve], x: _Fit, y: _Fit) -> str:
    """Return the names beside the last points, moved apart so that none covers another."""
    ends = sorted(((y(c.points[-1].y), x(c.points[-1].x), c) for c in curves), key=lambda end: end[0])
    lowest, places = TOP - LINE + 4.0, []
    for i, (at, _, _) in enumerate(ends):
        lowest = max(lowest + LINE, min(at, BOTTOM - LINE * (len(ends) - 1 - i)))
        places.append(lowest)
    out = ""
    for place, (at, from_x, curve) in zip(places, ends, strict=True):
        marker = "" if curve.marker is None else f'<path class="mark" d="{MARKERS[curve.marker % len(MARKERS)]}"/>'
        leader = f'<path class="leader" d="M{from_x + 5:.1f} {at}L{x.end + 6} {place:.1f}"/>'
        name = f'<text x="{x.end + 20}" y="{place + 4:.1f}">{escape(curve.name)}</text>'
        out += f'<g class="{escape(curve.look)} label">{leader}<g transform="translate({x.end + 12} {place:.1f})">{marker}</g>{name}</g>'
    return out
