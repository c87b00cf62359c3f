"""The standings of methods that were trained with several seeds and measured together: means, intervals, Pareto fronts, one page.

A standing is one method at one step count. Its interval covers both what another training seed and what other samples would change:

    half^2 = (t s / sqrt(K))^2 + h^2        s: standard deviation of the FID over K training seeds; t: Student's 97.5 % quantile, K - 1
                                            degrees of freedom; h: mean half-width of the seeds' own sampling intervals

The seeds share their noise, so that h does not shrink with K.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from eval.columns import plural
from eval.html_page import definitions, document, figure, table
from eval.plots import FRONT, drawing
from eval.svg import Axis, Curve, Point, chart, look

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of 1, 2, ... degrees of freedom
MEANS = ("diversity", "recall", "coverage", "copies", "agreement", "fid2")  # averaged over the seeds where rows have them


@dataclass(frozen=True)
class Standing:
    """Hold what K trainings of one method give at one step count. ``half``: of the 95 % interval of the mean FID."""

    method: str
    steps: int
    fids: tuple[float, ...]
    fid: float
    half: float
    seconds: float | None = None  # of training, mean
    memory_gb: float | None = None  # peak of training, largest
    means: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, method: str, steps: int, rows: list[dict], memory_gb: float | None = None) -> Standing:
        """Return the standing of rows of a report, one for each training seed."""
        fids = tuple(row["fid"] for row in rows)
        sampling = fmean((row["fid_interval"][1] - row["fid_interval"][0]) / 2 for row in rows)
        seeds = quantile(len(fids) - 1) * stdev(fids) / math.sqrt(len(fids)) if len(fids) > 1 else 0.0
        known = tuple(
            (name, fmean(row[name] for row in rows)) for name in MEANS if all(row.get(name) is not None for row in rows)
        )
        seconds = [row["training_seconds"] for row in rows if row.get("training_seconds")]
        return cls(
            method, steps, fids, fmean(fids), math.hypot(seeds, sampling), fmean(seconds) if seconds else None, memory_gb, known
        )


def quantile(degrees: int) -> float:
    """Return Student's 97.5 % quantile, rounded up to that of 9 degrees of freedom beyond."""
    return T_975[min(degrees, len(T_975)) - 1]


def front(standings: list[Standing]) -> list[Standing]:
    """Return the standings that no other one beats in both training seconds and FID, cheapest first."""
    best, out = math.inf, list[Standing]()
    for one in sorted((s for s in standings if s.seconds), key=lambda s: (s.seconds, s.fid)):
        if one.fid < best:
            best, out = one.fid, [*out, one]
    return out


def advice(standings: list[Standing]) -> str:
    """Return for each step count which method to take for which training time."""
    sentences = []
    for steps in sorted({s.steps for s in standings}):
        best = front([s for s in standings if s.steps == steps])
        if not best:
            continue
        parts = [f"from {one.seconds:,.0f} s of training {one.method} (FID {one.fid:.3g} ± {one.half:.2g})" for one in best]
        sentences.append(f"For {plural(steps, 'evaluation')} take " + ", ".join(parts) + ".")
    return " ".join(sentences)


def draw(standings: list[Standing], baselines: list[dict], path: Path) -> None:
    """Plot FID against training seconds, one panel per step count; dashed: the best training-free sampler of that many evaluations."""
    counts = sorted({s.steps for s in standings})
    methods = sorted({s.method for s in standings})
    with drawing(path, (5.2 * len(counts), 5), columns=len(counts)) as (_, axes):
        for axis, steps in zip([axes] if len(counts) == 1 else axes, counts, strict=True):
            own = [s for s in standings if s.steps == steps and s.seconds]
            best = {s.method for s in front(own)}
            for s in own:
                colour = f"C{methods.index(s.method) % 10}"
                ring = {"markeredgecolor": FRONT, "markeredgewidth": 2.5} if s.method in best else {}
                low = min(s.half, 0.999 * s.fid)
                axis.errorbar(s.seconds, s.fid, [[low], [s.half]], marker="o", color=colour, capsize=2, **ring)
                axis.annotate(s.method, (s.seconds, s.fid), xytext=(5, 4), textcoords="offset points", fontsize=7, color=colour)
            free = [row["fid"] for row in baselines if row["nfe"] <= steps]
            if free:
                axis.axhline(min(free), color="grey", linestyle="--", linewidth=1)
            axis.set(xscale="log", yscale="log", xlabel="seconds of training", ylabel="FID", title=plural(steps, "evaluation"))
            axis.margins(x=0.2)  # room for a name at the right edge
            if own:
                axis.set_ylim(bottom=min([s.fid for s in own] + free) / 4)  # not where an interval ends, which may be at 0
            axis.grid(alpha=0.25, which="both")


def page(title: str, standings: list[Standing], baselines: list[dict], facts: dict[str, Any]) -> str:
    """Return the page."""
    names = [name for name in MEANS if any(name in dict(s.means) for s in standings)]
    heads = ("method", "steps", "FID", "95 % ±", "of each seed", *names, "training, s", "memory, GB")
    rows, kinds = list[list[str]](), list[str]()
    for steps in sorted({s.steps for s in standings}):
        own = sorted((s for s in standings if s.steps == steps), key=lambda s: s.fid)
        best = {s.method for s in front(own)}
        for s in own:
            means = dict(s.means)
            cells = [s.method, str(s.steps), f"{s.fid:.4f}", f"{s.half:.4f}", ", ".join(f"{fid:.3f}" for fid in s.fids)]
            cells += [f"{means[name]:.3f}" if name in means else "" for name in names]
            cells += ["" if s.seconds is None else f"{s.seconds:,.0f}", "" if s.memory_gb is None else f"{s.memory_gb:.2f}"]
            rows.append(cells)
            kinds.append("front" if s.method in best else "")
    free = sorted(baselines, key=lambda row: (row["nfe"], row["fid"]))
    body = f"""{charts(standings, baselines)}
<p>A star marks the Pareto front of training time and FID at each step count. The dashed line is the teacher's best training-free
sampler with as many evaluations. Intervals cover other training seeds and other samples.</p>
{table(heads, rows, kinds)}
<h2>Training-free samplers of the teacher</h2>
{table(("sampler", "NFE", "FID"), ([row["sampler"], f"{row['nfe']:g}", f"{row['fid']:.4f}"] for row in free))}
<h2>Protocol</h2>{definitions((name, str(value)) for name, value in facts.items())}"""
    return document(title, advice(standings), body)


def charts(standings: list[Standing], baselines: list[dict]) -> str:
    """Return the charts of the page: FID against training seconds, one for each step count."""
    methods = sorted({s.method for s in standings})
    out = ""
    for steps in sorted({s.steps for s in standings}):
        drawn = []
        for s in (s for s in standings if s.steps == steps and s.seconds):
            tip = f"{s.method}: FID {s.fid:.4f} ± {s.half:.4f} after {s.seconds:,.0f} s"
            point = Point(s.seconds or 0, s.fid, (s.fid - s.half, s.fid + s.half), tip)
            drawn.append(Curve(s.method, [point], *look(methods.index(s.method))))
        free = [row["fid"] for row in baselines if row["nfe"] <= steps]
        rules = [(min(free), "best training-free sampler")] if free else []
        title = plural(steps, "evaluation")
        out += figure(chart(title, drawn, Axis("seconds of training"), Axis("FID"), rules), "", title)
    return f'<div class="plots">{out}</div>'


def as_json(standings: list[Standing], baselines: list[dict], facts: dict[str, Any]) -> dict[str, Any]:
    """Return everything as JSON data."""
    rows = [asdict(s) | {"means": dict(s.means)} for s in standings]
    return {"advice": advice(standings), "standings": rows, "baselines": baselines, "facts": facts}
