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


class UNet(nn.Module):
    """Call a UNet2DModel as (x [B, C, H, W], t [B], labels [B] or None) -> [B, C, H, W], without a learned variance.

    ``reach``: the longest jump, in the network's time input, of a two-time network; None for one time. A two-time network also takes
    ``to`` [B], the end of the jump from t, by default t.
    """

    def __init__(self, unet: nn.Module, reach: float | None = None):
        super().__init__()
        self.unet, self.two_times = unet, reach is not None
        if reach is not None:
            unet.time_proj = TwoTimes(unet.time_proj, unet.config["block_out_channels"][0], reach)  # type: ignore

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
    """Build a network from its description's "config": the options of UNet2DModel, and perhaps "reach"."""
    for package in ("diffusers.models.transformers", "diffusers.models.unets"):
        delay(package)  # they import transformers and scipy, which a UNet2DModel does not use
    from diffusers import UNet2DModel

    config = dict(config)
    reach = config.pop("reach", None)
    return UNet(UNet2DModel(**config), reach)  # type: ignore[arg-type]


def describe(unet: nn.Module) -> dict:
    """Return the description of a UNet2DModel of one time, as JSON data."""
    return {"family": "unet2d", "config": {k: v for k, v in unet.config.items() if not k.startswith("_")}}  # type: ignore
