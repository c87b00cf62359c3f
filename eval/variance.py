"""The page about target variance: what each target costs in noise at each noise level, and what that does to training."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from distill.checkpoint import replacing

COLOURS = {"datum": "#1f77b4", "teacher": "#d62728", "mix": "#2ca02c", "posterior mean": "#9467bd"}


def draw(out: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), dpi=120)
    for name, rows in out["targets"].items():
        line = ":" if name == "mix" else "-"  # which often lies on the teacher's
        how = {"color": COLOURS[name], "marker": ".", "label": name, "linestyle": line}
        seen = [(level, error) for level, error in zip(out["logsnr"], rows["error"], strict=True) if error > 0]
        if seen:  # a bias within chance is 0
            axes[0].plot(*zip(*seen, strict=True), **how)
        axes[1].plot(out["logsnr"], rows["gradient_snr"], **how)
    for name, points in out["curves"].items():
        axes[2].plot(*zip(*points, strict=True), color=COLOURS[name], label=f"trained on the {name}")
    axes[0].set(yscale="log", xlabel="log-SNR", title="error of the target: variance + bias$^2$")
    axes[1].set(yscale="log", xlabel="log-SNR", title="signal-to-noise ratio of a batch's gradient")
    axes[2].set(yscale="log", xlabel="training images", title="error of the student above its teacher's, held out")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.tight_layout()
    with replacing(path) as aside:
        figure.savefig(aside, format="png")
    plt.close(figure)


def page(out: dict, folder: Path) -> str:
    picture = base64.b64encode((folder / "variance.png").read_bytes()).decode()
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in out["targets"])
    rows = ""
    for i, level in enumerate(out["logsnr"]):
        cells = "".join(f"<td>{rows_['error'][i]:.2e}</td>" for rows_ in out["targets"].values())
        rows += f"<tr><td>{round(level, 1) + 0.0:.1f}</td>{cells}<td>{out['best'][i]:.3f}</td></tr>"
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Target variance</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; }} td, th {{ padding: .2rem .7rem; text-align: right; }}</style></head><body>
<h1>Target variance</h1><p>{html.escape(out["verdict"])}</p>
<img alt="variance, gradients and loss curves" src="data:image/png;base64,{picture}">
<h2>Error of each target about E[x0 | x_t], a pixel</h2>
<p>0 is a bias within chance. The mix has the best part of the teacher for a student, which averages many targets, and not for one.</p>
<table><tr><th>log-SNR</th>{heads}<th>best part of the teacher</th></tr>{rows}</table></body></html>"""


def verdict(out: dict) -> str:
    """One sentence: how many fewer images the teacher's student needed for what the datum's reached at the end."""
    datum, teacher = out["curves"]["datum"], out["curves"]["teacher"]
    goal = min(error for _, error in datum)
    reached = next((images for images, error in teacher if error <= goal), None)
    if reached is None:
        return f"The student of the data ended {goal:.3g} above the teacher's error, which the student of the teacher did not reach."
    part = reached / datum[-1][0]
    return (
        f"The student of the data ended {goal:.3g} above the teacher's error (in v, a pixel, on images held out); the student of the "
        f"teacher was there after {part:.0%} of its images."
    )
