"""diffusers' UNet2DModel as a network, with one time or with two."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

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


class UNet(nn.Module):
    """Call a UNet2DModel as (x [B, C, H, W], t [B], labels [B] or None) -> [B, C, H, W], without a learned variance.

    ``reach``: the longest jump, in the network's time input, of a two-time network; None for one time. A two-time network also takes
    ``to`` [B], the end of the jump from t, by default t. ``slow``: (first, last) time input of a network with `SlowTime`.
    """

    def __init__(self, unet: nn.Module, reach: float | None = None, slow: tuple[float, float] | None = None):
        super().__init__()
        self.unet, self.two_times, self.slow = unet, reach is not None, slow
        width: int = unet.config["block_out_channels"][0]  # type: ignore
        if slow is not None:
            unet.time_proj = SlowTime(width, *slow)
        if reach is not None:
            unet.time_proj = TwoTimes(unet.time_proj, width, reach)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, to: Tensor | None = None) -> Tensor:
        self._set_length(t, to)
        return self.unet(x, t, class_labels=labels, return_dict=False)[0][:, : x.shape[1]]

    def embedding(self, t: Tensor, to: Tensor | None = None) -> Tensor:
        """Return the output of the time projection, [B, width]."""
        self._set_length(t, to)
        return self.unet.time_proj(t)  # type: ignore[operator]

    def _set_length(self, t: Tensor, to: Tensor | None) -> None:
        if self.two_times:
            self.unet.time_proj.length = t - (t if to is None else to)  # type: ignore[union-attr]
        elif to is not None:
            raise ValueError("this network has one time input and does not accept the end of a jump")


def build(config: dict) -> UNet:
    """Build a network from its description's "config": the options of UNet2DModel, and perhaps "reach" and "slow"."""
    for package in ("diffusers.models.transformers", "diffusers.models.unets"):
        delay(package)  # they import transformers and scipy, which a UNet2DModel does not use
    from diffusers import UNet2DModel

    config = dict(config)
    reach, slow = config.pop("reach", None), config.pop("slow", None)
    return UNet(UNet2DModel(**config), reach, None if slow is None else tuple(slow))  # type: ignore[arg-type]


def describe(unet: nn.Module) -> dict:
    """Return the description of a UNet2DModel of one time, as JSON data."""
    return {"family": "unet2d", "config": {k: v for k, v in unet.config.items() if not k.startswith("_")}}  # type: ignore
