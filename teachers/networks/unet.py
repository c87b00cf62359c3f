"""diffusers' UNet2DModel as a network, with one time or with two."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from distill.device import send
from teachers.networks.late import delay


class TwoTimes(nn.Module):
    """Replace a UNet's time projection P by P(t) + A (cos, sin)(k pi (t - s) / reach), k = 1..4, where ``length`` is t - s.

    ``reach``: the longest jump, in the network's time input. Frequencies are low because MeanFlow differentiates along t. A starts
    at 0, so that a converted network first ignores s.
    """

    def __init__(self, projection: nn.Module, width: int, reach: float):
        super().__init__()
        self.projection, self.reach = projection, reach
        self.length_linear = nn.Linear(8, width, bias=False)
        nn.init.zeros_(self.length_linear.weight)
        self.length: Tensor | None = None

    def forward(self, t: Tensor) -> Tensor:
        length, self.length = self.length, None
        assert length is not None
        angles = torch.arange(1, 5, device=t.device) * (math.pi / self.reach) * length[:, None]
        return self.projection(t) + self.length_linear(torch.cat([angles.cos(), angles.sin()], 1))


class SlowTime(nn.Module):
    """Replace a UNet's time projection by a linear map of slow waves: 1, cos(k pi u) and sin(k pi u), u = (t - first) / (last - first).

    k goes from 1 to ``waves``. Positional embeddings turn by up to one radian per entry of a table, so that their derivatives are
    ripple; continuous-time methods differentiate the network along t (sCM 2410.11081, section 4.1).
    """

    def __init__(self, width: int, first: float, last: float, waves: int = 8):
        super().__init__()
        self.first, self.last = first, last
        self.count = waves
        self.linear = nn.Linear(2 * waves + 1, width, bias=False)

    def waves(self, t: Tensor) -> Tensor:
        """Return the waves [B, 2 waves + 1] at t [B]."""
        k = torch.arange(1, self.count + 1, device=t.device)
        angles = math.pi * k * ((t - self.first) / (self.last - self.first))[:, None]
        return torch.cat([torch.ones_like(angles[:, :1]), angles.cos(), angles.sin()], 1)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear(self.waves(t))


class GuidedTime(nn.Module):
    """Replace a UNet's time projection P by P(t) + A (u, cos(k pi u), sin(k pi u)), k = 1..4, u = (w - low) / (high - low).

    w is the guidance ``scale`` (Fourier features beside the time, Meng et al. 2210.03142). `with_guidance` begins with A = 0.
    """

    def __init__(self, projection: nn.Module, width: int, low: float, high: float):
        super().__init__()
        self.projection, self.low, self.high = projection, low, high
        self.scale_linear = nn.Linear(9, width, bias=False)
        self.scale: Tensor | None = None

    def forward(self, t: Tensor) -> Tensor:
        scale, self.scale = self.scale, None
        assert scale is not None
        u = ((scale - self.low) / (self.high - self.low))[:, None].to(self.scale_linear.weight.dtype)
        angles = torch.arange(1, 5, device=u.device) * math.pi * u
        return self.projection(t) + self.scale_linear(torch.cat([u, angles.cos(), angles.sin()], 1))


class Heads(nn.Module):
    """Replace a UNet's last convolution by N of them, one for each step of a grid, and return a weighted mean of their outputs.

    ``inputs``, ``times``: the grid [N + 1] as the network's time input, and on the straight path, from noise to data. A jump from t to s
    takes each head with its step's share of the straight path between s and t; the head of the step that begins at t where s is t.
    """

    inputs: Tensor
    times: Tensor

    def __init__(self, last: nn.Conv2d, inputs: list[float], times: list[float]):
        super().__init__()
        self.count = len(times) - 1
        out, into, *kernel = last.weight.shape
        self.conv = nn.Conv2d(into, self.count * out, kernel, padding=last.padding)  # type: ignore[arg-type]
        self.register_buffer("inputs", torch.tensor(inputs), persistent=False)
        self.register_buffer("times", torch.tensor(times), persistent=False)
        self.weights: Tensor | None = None

    def weights_of(self, t: Tensor, to: Tensor | None, head: Tensor | None) -> Tensor:
        """Return the weight of each head, [B, N], for jumps from ``t`` to ``to`` (None: t), or for single heads [B]."""
        start = self._straight(t)
        end = start if to is None else self._straight(to)
        high, low = self.times[:-1], self.times[1:]
        overlap = (torch.minimum(start[:, None], high) - torch.maximum(end[:, None], low)).clamp(min=0)
        alone = ((start[:, None] <= high + 1e-6) & (start[:, None] > low + 1e-6)).to(overlap)
        if head is not None:
            alone = (send(head, t.device)[:, None] == torch.arange(self.count, device=t.device)).to(overlap)
        single = (start - end < 1e-6)[:, None] if head is None else torch.ones_like(start, dtype=torch.bool)[:, None]
        return torch.where(single, alone, overlap / (start - end).clamp(min=1e-6)[:, None])

    def fused(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the one convolution that stands for all heads with these weights [N]."""
        assert self.conv.bias is not None
        weight, bias = (p.detach().unflatten(0, (self.count, -1)) for p in (self.conv.weight, self.conv.bias))
        return torch.einsum("n,n...->...", weights, weight), torch.einsum("n,n...->...", weights, bias)

    def forward(self, x: Tensor) -> Tensor:
        weights, self.weights = self.weights, None
        assert weights is not None
        return torch.einsum("bn,bnchw->bchw", weights.to(x.dtype), self.conv(x).unflatten(1, (self.count, -1)))

    def _straight(self, t: Tensor) -> Tensor:
        """Return the time on the straight path of a time input, linear between the entries of the grid."""
        inputs, times = self.inputs.flip(0), self.times.flip(0)  # rising
        i = torch.searchsorted(inputs, t.to(inputs).contiguous()).clamp(1, self.count)
        share = ((t - inputs[i - 1]) / (inputs[i] - inputs[i - 1])).clamp(0, 1)
        return torch.lerp(times[i - 1], times[i], share)


class UNet(nn.Module):
    """Call a UNet2DModel as (x [B, C, H, W], t [B], labels [B] or None) -> [B, C, H, W], without a learned variance.

    ``reach``: the longest jump, in the network's time input, of a two-time network; None for one time. A two-time network also takes
    ``to`` [B], the end of the jump from t, by default t. ``slow``: (first, last) time input of a network with `SlowTime`.
    ``heads``: (inputs, times) of a network with `Heads`, which takes ``to``, or ``head`` [B], the number of a single one.
    ``guidance``: (low, high), the scales of a network with `GuidedTime`, which takes the scale ``guidance`` [B].
    """

    def __init__(
        self,
        unet: nn.Module,
        reach: float | None = None,
        slow: tuple[float, float] | None = None,
        heads: tuple[list[float], list[float]] | None = None,
        guidance: tuple[float, float] | None = None,
    ):
        super().__init__()
        self.unet, self.slow, self.heads, self.guided = unet, slow, heads is not None, guidance is not None
        self.two_times = reach is not None or self.heads
        if heads is not None:
            unet.conv_out = Heads(unet.conv_out, *heads)  # type: ignore[arg-type]
        width: int = unet.config["block_out_channels"][0]  # type: ignore
        if slow is not None:
            unet.time_proj = SlowTime(width, *slow)
        if reach is not None:
            unet.time_proj = TwoTimes(unet.time_proj, width, reach)  # type: ignore[arg-type]
        if guidance is not None:
            unet.time_proj = GuidedTime(unet.time_proj, width, *guidance)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        to: Tensor | None = None,
        head: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        self._set_inputs(t, to, guidance)
        if self.heads:
            last: Any = self.unet.conv_out
            last.weights = last.weights_of(t, to, head)
        return self.unet(x, t, class_labels=labels, return_dict=False)[0][:, : x.shape[1]]

    def embedding(self, t: Tensor, to: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        """Return the output of the time projection, [B, width]."""
        self._set_inputs(t, to, guidance)
        return self.unet.time_proj(t)  # type: ignore[operator]

    def _set_inputs(self, t: Tensor, to: Tensor | None, guidance: Tensor | None) -> None:
        projection: Any = self.unet.time_proj
        if self.guided != (guidance is not None):
            raise ValueError(f"this network {'needs' if self.guided else 'does not accept'} a guidance scale")
        if self.guided:
            projection.scale, projection = guidance, projection.projection
        if self.heads:
            return
        if self.two_times:
            projection.length = t - (t if to is None else to)
        elif to is not None:
            raise ValueError("this network has one time input and does not accept the end of a jump")


def build(config: dict) -> UNet:
    """Build a network from its description's "config": the options of UNet2DModel, and perhaps "reach", "slow", "heads" and "guidance"."""
    for package in ("diffusers.models.transformers", "diffusers.models.unets"):
        delay(package)  # they import transformers and scipy, which a UNet2DModel does not use
    from diffusers import UNet2DModel

    config = dict(config)
    reach, *pairs = (config.pop(key, None) for key in ("reach", "slow", "heads", "guidance"))
    return UNet(UNet2DModel(**config), reach, *(None if pair is None else tuple(pair) for pair in pairs))  # type: ignore


def describe(unet: nn.Module) -> dict:
    """Return the description of a UNet2DModel of one time, as JSON data."""
    return {"family": "unet2d", "config": {k: v for k, v in unet.config.items() if not k.startswith("_")}}  # type: ignore
