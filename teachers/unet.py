"""diffusers' UNet2DModel as a network family of our own files: built anew, rebuilt, and given a second time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoiser import TIMES, Denoiser
from distill.schedule import Schedule
from teachers.load import Teacher, frozen
from teachers.scheduler import table_of

COSINE_ZERO_SNR = {"num_train_timesteps": 1024, "beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}


class TwoTimes(nn.Module):
    """In place of a UNet's time projection P: P(t) + A (cos, sin)(k pi (t - s) / reach), k = 1..4, where ``length`` is t - s.

    ``reach``: the longest jump, in the network's time. Only slow waves, since MeanFlow differentiates along t. A starts at 0.
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
    """A UNet2DModel called as (x [B, C, H, W], t [B], labels [B] or nothing) -> [B, C, H, W], without a learned variance.

    With ``reach``, the longest jump in the network's time, it also takes ``to`` [B], the end of a jump from t; t where not given.
    """

    def __init__(self, unet: nn.Module, reach: float | None = None):
        super().__init__()
        self.unet, self.two_times = unet, reach is not None
        if reach is not None:
            unet.time_proj = TwoTimes(unet.time_proj, unet.config["block_out_channels"][0], reach)  # type: ignore

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, to: Tensor | None = None) -> Tensor:
        self._aim(t, to)
        return self.unet(x, t, class_labels=labels, return_dict=False)[0][:, : x.shape[1]]

    def embedding(self, t: Tensor, to: Tensor | None = None) -> Tensor:
        """What the time projection hands to the rest of the network, [B, width]."""
        self._aim(t, to)
        return self.unet.time_proj(t)  # type: ignore[operator]

    def _aim(self, t: Tensor, to: Tensor | None) -> None:
        if self.two_times:
            self.unet.time_proj.length = t - (t if to is None else to)  # type: ignore[union-attr]
        elif to is not None:
            raise ValueError("this network knows one time and cannot be told where a step ends")


def build(config: dict) -> UNet:
    from diffusers import UNet2DModel

    config = dict(config)
    reach = config.pop("reach", None)
    return UNet(UNet2DModel(**config), reach)  # type: ignore[arg-type]


def network(unet: nn.Module) -> dict:
    """What rebuilds a UNet2DModel, as JSON."""
    return {"family": "unet2d", "config": {k: v for k, v in unet.config.items() if not k.startswith("_")}}  # type: ignore


def with_two_times(model: Teacher) -> Teacher:
    """The same weights in a network that can be told where a jump ends, and so far does not heed it. ValueError where the
    network is no UNet2DModel with a positional time embedding."""
    net = model.parametric.net
    if not isinstance(net, UNet) or net.unet.config["time_embedding_type"] != "positional":  # type: ignore[index]
        raise ValueError("only a UNet2DModel with a positional time embedding can be given a second time")
    if net.two_times:
        return model
    assert model.network is not None
    ends = torch.tensor([model.denoiser.schedule.t_max, model.denoiser.schedule.t_clean])
    first, last = TIMES[model.parametric.time](model.denoiser.schedule, ends).tolist()
    if not math.isfinite(first - last):
        raise ValueError(
            f"a second time needs times that are finite up to the data, and {model.parametric.time!r} on this schedule is not: "
            "a model on a discrete table or a flow is accepted"
        )
    config = model.network["config"] | {"reach": abs(first - last)}
    twin = build(config)
    weights = net.state_dict() | {k: v for k, v in twin.state_dict().items() if "length_linear" in k}
    twin.load_state_dict(weights)
    twin.train(net.training)
    return replace(model, denoiser=replace(model.parametric, net=frozen(twin)), network=model.network | {"config": config})


def on_table(model: Teacher) -> Teacher:
    """The weights of a UNet2DModel of any schedule as the beginning of a v network on the table of `untrained`, which stock schedulers
    know, with as many entries as do not go below half of the lowest noise level of the model: it has to be trained before it is a
    denoiser again. ValueError for any other network."""
    net: Any = model.parametric.net
    inner = net if isinstance(net, UNet) else getattr(net, "net", None)
    if not isinstance(inner, UNet) or inner.two_times:
        raise ValueError("only a UNet2DModel of one time can be put on a table")
    tables = (table_of(COSINE_ZERO_SNR | {"num_train_timesteps": 2**k}) for k in range(10, 0, -1))
    fits = (table for table in tables if _lowest(table) >= _lowest(model.denoiser.schedule) / 2)
    denoiser = Denoiser(inner, next(fits, table_of(COSINE_ZERO_SNR)), "v", "index")
    return replace(model, denoiser=denoiser, network=network(inner.unet), sampler={})


def _lowest(schedule: Schedule) -> float:
    return float(schedule.level(torch.tensor(schedule.t_min, dtype=torch.float64)))


def untrained(shape: tuple[int, ...], classes: int | None, channels: tuple[int, ...], layers: int, seed: int) -> Teacher:
    """A new UNet2DModel for images of ``shape`` [C, H, W] with a null class, predicting v on a cosine table of 1024 entries and
    zero terminal SNR, which every ladder of powers of two meets exactly. ValueError where ``channels`` do not fit the shape."""
    depth, height, width = shape
    levels = len(channels)
    if any(c % 8 or c < 8 for c in channels) or channels[-1] < 16:
        raise ValueError(f"--channels {channels}: each must be a multiple of 8, and the last at least 16")
    if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        raise ValueError(f"--channels names {levels} resolutions, but {height}x{width} cannot be halved {levels - 1} times")
    torch.manual_seed(seed)
    net = build({
        "sample_size": height if height == width else [height, width],
        "in_channels": depth,
        "out_channels": depth,
        "block_out_channels": list(channels),
        "layers_per_block": layers,
        "down_block_types": ["DownBlock2D"] * levels,
        "up_block_types": ["UpBlock2D"] * levels,
        "norm_num_groups": 8,
        "attention_head_dim": 16,
        "num_class_embeds": None if classes is None else classes + 1,
    })  # fmt: skip
    return Teacher(Denoiser(net, table_of(COSINE_ZERO_SNR), "v", "index"), shape, network(net.unet), classes, classes)
