"""The page about target variance: the error of each training target at each noise level, and its effect on training.

The dict ``out`` of these functions is the content of variance.json, which recipes/variance.py writes.
"""

from __future__ import annotations

from pathlib import Path

from eval.html_page import document, figure, table
from eval.plots import drawing
from eval.svg import Axis, Curve, Point, chart, look

COLOURS = {"data": "#1f77b4", "teacher": "#d62728", "mix": "#2ca02c", "posterior mean": "#9467bd"}
NAMES = {"data": "data sample"}  # where the page's name differs from the key


def draw(out: dict, path: Path) -> None:
    """Plot error and gradient signal-to-noise ratio of each target, and the training curves."""
    with drawing(path, (14, 4), columns=3) as (_, axes):
        for name, rows in out["targets"].items():
            line = ":" if name == "mix" else "-"  # the mix often covers the teacher
            style = {"color": COLOURS[name], "marker": ".", "label": NAMES.get(name, name), "linestyle": line}
            positive = [(level, error) for level, error in zip(out["logsnr"], rows["error"], strict=True) if error > 0]
            if positive:  # a bias within chance is 0, which a log axis cannot show
                axes[0].plot(*zip(*positive, strict=True), **style)
            axes[1].plot(out["logsnr"], rows["gradient_snr"], **style)
        for name, points in out["curves"].items():
            axes[2].plot(*zip(*points, strict=True), color=COLOURS[name], label=f"target: {NAMES.get(name, name)}")
        axes[0].set(yscale="log", xlabel="log-SNR", title="error of the target: variance + bias$^2$")
        axes[1].set(yscale="log", xlabel="log-SNR", title="signal-to-noise ratio of a batch's gradient")
        axes[2].set(yscale="log", xlabel="training images", title="held-out error of the student above the teacher's")
        for axis in axes:
            axis.grid(alpha=0.25)
            axis.legend(fontsize=8)


def page(out: dict) -> str:
    """Return the page."""
    heads = ["log-SNR", *(NAMES.get(name, name) for name in out["targets"]), "best teacher weight"]
    rows = []
    for i, level in enumerate(out["logsnr"]):
        errors = [f"{target['error'][i]:.2e}" for target in out["targets"].values()]
        rows.append([f"{round(level, 1) + 0.0:.1f}", *errors, f"{out['best'][i]:.3f}"])
    body = f"""<div class="plots">{charts(out)}</div>
<h2>Error of each target</h2>
<p>Mean squared distance of the target from E[x0 | x_t], per pixel. 0 stands for a bias within chance. The mix is the weighted mean of
data sample and teacher. Its teacher weight is the best one for training, where the errors of many targets average out. It is not the one
that minimises the error of a single target.</p>
{table(heads, rows)}"""
    return document("Target variance", out["verdict"], body)


def charts(out: dict) -> str:
    """Return the charts of the page. A bias within chance is 0, which a logarithmic axis cannot show."""
    level = Axis("log-SNR", "linear")
    shown = [
        (
            "Error of the target: variance + bias²",
            level,
            {n: zip(out["logsnr"], t["error"], strict=True) for n, t in out["targets"].items()},
        ),
        (
            "Signal-to-noise ratio of a batch's gradient",
            level,
            {n: zip(out["logsnr"], t["gradient_snr"], strict=True) for n, t in out["targets"].items()},
        ),
        ("Held-out error of the student above the teacher's", Axis("training images", "linear"), out["curves"]),
    ]
    names = list(COLOURS)
    parts = []
    for title, axis, lines in shown:
        drawn = []
        for name, pairs in lines.items():
            points = [Point(x, y, tip=f"{NAMES.get(name, name)}: {y:.3g} at {x:,.6g}") for x, y in pairs]
            drawn.append(Curve(NAMES.get(name, name), points, *look(names.index(name) if name in names else len(names))))
        parts.append(figure(chart(title, drawn, axis, Axis("")), "", title))
    return "".join(parts)


def verdict(out: dict) -> str:
    """Return the result in two sentences: the images that the teacher's student needed for the final error of the other one."""
    data, teacher = out["curves"]["data"], out["curves"]["teacher"]
    goal = min(error for _, error in data)
    reached = next((images for images, error in teacher if error <= goal), None)
    first = f"The student trained on data samples ended {goal:.3g} above the teacher's error (in v, per pixel, on held-out images). "
    if reached is None:
        return first + "The student trained on the teacher did not reach this error."
    return first + f"The student trained on the teacher reached it after {reached / data[-1][0]:.0%} of the images."
