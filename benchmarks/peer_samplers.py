"""Samplers beside those of diffusers and k-diffusion, on the same weights, noise and times.

The weights are read as a v network on DDPM's linear table, where all of them run the same calculation: diffusers visits the "trailing"
entries, and k-diffusion gets their noise levels. The images need not be good for that; they must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.networks import Network
from benchmarks.turns import Clock, Figure, Row, in_turn
from distill.denoiser import Denoiser
from distill.grid import trailing
from distill.samplers import SAMPLERS
from teachers.diffusers_scheduler import table_of

LINEAR: dict[str, Any] = {
    "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "v_prediction", "timestep_spacing": "trailing"
}  # fmt: skip
TABLE = table_of(LINEAR)
SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2, "final_sigmas_type": "zero"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_order": 3, "final_sigmas_type": "zero"}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
}
OF_K_DIFFUSION = {"ddim": "sample_euler", "dpm++2m": "sample_dpmpp_2m", "heun": "sample_heun"}
STEPS = 8
SAME = 1e-4  # the largest difference of the same calculation, by the largest pixel

Sample = Callable[[Tensor, Tensor | None], Tensor]  # noise, labels -> samples


def diffusers_loop(unet: Any, name: str) -> Sample:
    """Return the loop of a diffusers pipeline with the scheduler of this name."""
    kind, options = SCHEDULERS[name]
    scheduler = kind(**LINEAR, **options)

    def sample(noise: Tensor, labels: Tensor | None) -> Tensor:
        scheduler.set_timesteps(STEPS, device=noise.device)
        high = float(scheduler.sigmas.max()) if name == "heun" else 0.0  # their Heun starts from noise of this level
        x = noise * (1 + high**2) ** 0.5
        for t in scheduler.timesteps:
            out = unet(scheduler.scale_model_input(x, t), t, class_labels=labels, return_dict=False)[0]
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return x

    return sample


def k_diffusion_loop(unet: Any, name: str) -> Sample:
    """Return the sampler of k-diffusion. Raises ImportError where it cannot be imported."""
    import k_diffusion

    class Wrapped(k_diffusion.external.DiscreteSchedule):
        """Its `DiscreteVDDPMDenoiser`, with the entries of the table as the time input."""

        def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            scale = (sigma**2 + 1).rsqrt()[:, None, None, None]
            v = unet(scale * x, self.sigma_to_t(sigma), class_labels=labels, return_dict=False)[0]
            return scale**2 * x - sigma[:, None, None, None] * scale * v

    levels = torch.tensor([float(TABLE.level(t)) for t in trailing(TABLE, STEPS)])
    table = torch.tensor(TABLE.alphas_cumprod)
    model = Wrapped(((1 - table) / table).sqrt().float(), quantize=True)
    run = getattr(k_diffusion.sampling, OF_K_DIFFUSION[name])

    def sample(noise: Tensor, labels: Tensor | None) -> Tensor:
        sigmas = levels.to(noise.device)
        return run(model.to(noise.device), noise * (1 + levels[0] ** 2).sqrt(), sigmas, {"labels": labels}, disable=True)

    return sample


def rows(
    title: str, network: Network, turns: int, clock: Clock, device: torch.device, batches: tuple[int, ...] = (256, 1)
) -> Iterator[Row]:
    """Yield our seconds by those of each peer, with the largest difference of the images by the largest pixel."""
    model = network.model.to(device)
    net: Any = model.parametric.net
    denoiser, times = Denoiser(net, TABLE, "v", "index"), trailing(TABLE, STEPS)
    for batch in batches:
        noise = torch.randn(batch, *model.shape, generator=torch.Generator().manual_seed(0)).to(device)
        labels = None if model.classes is None else (torch.arange(batch) % model.classes).to(device)
        cond = model.condition(labels)
        for peer, names, loop in (("diffusers", SCHEDULERS, diffusers_loop), ("k-diffusion", OF_K_DIFFUSION, k_diffusion_loop)):
            for name in names:
                title_of_row = f"{title} {name} by {peer}, batch {batch}"
                try:
                    theirs = loop(net.unet, name)
                except ImportError:
                    yield Figure(title_of_row, None, "not installed")
                    continue
                our_work = torch.inference_mode()(partial(SAMPLERS[name].run, denoiser, noise, times, **cond))
                their_work = torch.inference_mode()(partial(theirs, noise, labels))
                a, b = our_work(), their_work()
                difference = float((a - b).abs().max() / a.abs().max())
                yield in_turn(title_of_row, our_work, their_work, turns, clock, 1.0, difference)
