"""Measure the negative log-likelihood of data under a model, and at which noise levels its bits are paid.

    python recipes/likelihood.py --model SPEC --data DATA --output-dir runs/likelihood

Prints bits per dimension by the variational bound, term by term, and by the probability flow. Writes likelihood.json and likelihood.png:
the integrand of the bound over log-SNR, and the diffusion term of discrete chains of T steps, which falls to the continuous limit.
Kingma et al., Variational Diffusion Models, arXiv 2107.00630; Song et al., arXiv 2011.13456.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from recipes.common import flags
from recipes.common.accepted import SEED
from recipes.common.cli import flag, flags_first, machine_flag, measuring_flag, model_flag, one_line_errors, parse

PRESETS: dict[str, dict] = {
    "default": {},  # about a minute
    "smoke": {"images": 32, "levels": 8, "bins": 16, "flow_steps": 4, "chains": (4, 16)},  # some seconds
}


@dataclass(frozen=True)
class Config(flags.MachineFlags):
    preset: str = flag("default", "smoke is a trial run of some seconds", choices=PRESETS)
    model: str = model_flag("digits", "the model (accepted: --help teacher)")
    data: str = model_flag("digits", "the data (accepted: --help data)")
    output_dir: str = flags.output_dir("runs/likelihood-digits")
    images: int = measuring_flag(128, "samples, drawn at random", at_least=2, at_most=1_000_000)
    levels: int = measuring_flag(48, "noise levels per sample, for the bound", at_least=1, at_most=10_000)
    bins: int = measuring_flag(64, "log-SNRs at which the integrand is measured", at_least=2, at_most=10_000)
    flow_steps: int = measuring_flag(16, "Runge-Kutta steps of the probability flow", at_least=1, at_most=10_000)
    chains: tuple[int, ...] = measuring_flag(
        (4, 16, 64, 256), "steps T of discrete chains", at_least=1, at_most=100_000, distinct=True
    )
    seed: int = machine_flag(0, "seed of all random numbers", **SEED)

    TOPICS: ClassVar = flags.TOPICS


flags_first(__name__, Config, __doc__, PRESETS)

import math

import torch
from torch import Tensor

import teachers
from distill.files import write_json
from distill.likelihood import Proposal, bits, bound, discrete, flow, integrand, span
from eval.likelihood_plot import draw
from eval.progress import progress
from recipes.common.checks import check_match, conditioned
from recipes.common.run import Run, processes
from recipes.common.several_sizes import at_size
from recipes.data import sets
from recipes.data.sets import Data
from teachers import Teacher


def measured(model: Teacher, data: Data, config: Config, device: torch.device) -> dict:
    """Return the content of likelihood.json, in bits per dimension.

    For the flow, pixels are dequantised with uniform noise of their bin width 2 / 255. For the bound, the decoder is a probability over
    their 256 values. Latents have a density. The times of the bound are drawn in proportion to the measured integrand.
    """
    rng = torch.Generator().manual_seed(config.seed)
    index = torch.randperm(len(data.images), generator=rng)[: config.images]
    x0, pixels = data.x0(index).to(device), data.latents is None
    cond: dict[str, Any] = model.condition(None if data.labels is None else data.labels[index].to(device))
    denoiser, d, values = model.denoiser, x0[0].numel(), 256 if pixels else None
    width = 2 / 255 if pixels else 1.0

    edges = torch.linspace(*span(denoiser.schedule), config.bins + 1, dtype=torch.float64)
    centres = (edges[1:] + edges[:-1]) / 2
    paid = [
        float(integrand(denoiser, x0, L.expand(len(x0)), rng, **cond).mean()) for L in progress(centres, desc="noise levels")
    ]
    proposal = Proposal.measured(edges, torch.tensor(paid))

    def diffusion(proposal: Proposal | None) -> Tensor:
        return bound(denoiser, x0, rng, levels=config.levels, values=values, proposal=proposal, **cond).diffusion

    terms = bound(denoiser, x0, rng, levels=config.levels, values=values, proposal=proposal, **cond)
    noise = {  # standard error of the mean that the draws of times and noise cause, from two estimates of each sample
        "uniform": _drawn_error(diffusion(None), diffusion(None)) / d / math.log(2),
        "importance": _drawn_error(terms.diffusion, diffusion(proposal)) / d / math.log(2),
    }
    rows = {"bound": bits(terms.total, d), **{name: bits(nats, d) for name, nats in vars(terms).items()}}
    dequantised = x0 + (torch.rand(x0.shape, generator=rng).to(x0) - 0.5) * width if pixels else x0
    rows["flow"] = bits(-flow(denoiser, dequantised, rng, steps=config.flow_steps, **cond), d, width)
    return {
        "model": config.model,
        "data": data.name,
        "images": len(x0),
        "probability": pixels,
        "bits": {name: {"mean": float(v.mean()), "error": float(v.std()) / len(v) ** 0.5} for name, v in rows.items()},
        "logsnr": centres.tolist(),
        "width": float(edges[1] - edges[0]),
        "integrand": [value / d / math.log(2) for value in paid],
        "drawn_error": noise,
        "discrete": [
            {"steps": n, "diffusion": float(terms_of.sum()), "terms": terms_of.tolist()}
            for n in config.chains
            for terms_of in [bits(discrete(denoiser, x0, rng, n, **cond).mean(1), d)]
        ],
    }


def _drawn_error(first: Tensor, second: Tensor) -> float:
    return float((first - second).square().mean() / (2 * len(first))) ** 0.5


def lines(out: dict) -> list[str]:
    """Return the numbers for people."""
    names = {"bound": "variational bound", "flow": "probability flow"}
    what = "-log2 p" if out["probability"] else "-log2 density"
    noise = out["drawn_error"]
    return [
        f"{what} of {out['images']} samples of {out['data']}, bits per dimension",
        *(f"  {names.get(name, name):<18} {v['mean']:8.4f} +- {v['error']:.4f}" for name, v in out["bits"].items()),
        *(f"  {'diffusion, T = ' + str(row['steps']):<18} {row['diffusion']:8.4f}" for row in out["discrete"]),
        f"importance sampling: the error from drawn times falls from {noise['uniform']:.4f} to {noise['importance']:.4f}",
    ]


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        model, data = conditioned(teachers.load(config.model), sets.load(config.data))
        data = check_match(model, data, training=True)
        if data.imageless or processes() > 1:
            raise ValueError("a likelihood needs one process, and data with images or latents")
        data = data.of_one_shape(model.shape)
        model = at_size(model, data)
        run = Run.open(config)
    out = measured(model.to(run.device), data, config, run.device)
    write_json(run.folder / "likelihood.json", out)
    draw(out, run.folder / "likelihood.png")
    run.say("\n".join(lines(out)) + f"\npicture: {run.folder / 'likelihood.png'}")
    run.close()


if __name__ == "__main__":
    main()
