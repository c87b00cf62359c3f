"""Networks that students start from: a new UNet, or a teacher's weights with a second time, a slow time, heads, the guidance scale, a
previous estimate, or on a discrete table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from distill.decoding import decoding_times
from distill.denoiser import TIMES, Denoiser
from distill.guidance import GuidanceRange
from distill.sampling import Sampling
from distill.schedule import Schedule
from distill.self_conditioning import self_conditioned
from teachers import networks
from teachers.diffusers_scheduler import table_of
from teachers.networks import adapters, unet
from teachers.networks.unet import UNet
from teachers.teacher import Teacher, frozen

SCALE_WIDTH = 256  # of the embedding of the guidance scale in a UNet2DConditionModel, as in 2310.04378
COSINE_ZERO_SNR = {"num_train_timesteps": 1024, "beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}


def with_two_times(model: Teacher) -> Teacher:
    """Return the model as a two-time network that at first ignores the end of a jump; unchanged if it is one already.

    Raises ValueError unless the network is a UNet2DModel with a positional time embedding and a time input that is finite at the data.
    """
    net, schedule = model.parametric.net, model.denoiser.schedule
    if not isinstance(net, UNet) or net.unet.config["time_embedding_type"] != "positional":  # type: ignore[index]
        raise ValueError("a two-time network can be made only of a UNet2DModel with a positional time embedding")
    if net.two_times:
        return model
    _refuse_guided(net, "a second time")
    assert model.network is not None
    ends = torch.tensor([schedule.t_max, schedule.t_clean])
    first, last = TIMES[model.parametric.time](schedule, ends).tolist()
    if not math.isfinite(first - last):
        raise ValueError(
            f"a two-time network needs a time input that is finite at the data; {model.parametric.time!r} on this schedule is not: "
            "accepted is a model on a discrete table or a flow"
        )
    config = model.network["config"] | {"reach": abs(first - last)}
    twin = beside(net, unet.build, config)
    kept = {k.replace("time_proj.", "time_proj.projection."): v for k, v in net.state_dict().items()}
    twin.load_state_dict(kept | {k: v for k, v in twin.state_dict().items() if "length_linear" in k})
    twin.train(net.training)
    return replace(model, denoiser=replace(model.parametric, net=frozen(twin)), network=model.network | {"config": config})


def with_slow_time(model: Teacher) -> Teacher:
    """Return the model with `SlowTime`, a time embedding for methods that differentiate along t; unchanged if it has one already.

    The linear map of the waves is the least-squares fit to the time projection, so that the fast parts of it are lost: the result is
    near the model and must be trained before it is a denoiser again. Raises ValueError as `with_two_times` does.
    """
    net, schedule = model.parametric.net, model.denoiser.schedule
    if not isinstance(net, UNet) or net.unet.config["time_embedding_type"] != "positional":  # type: ignore[index]
        raise ValueError("a slow time embedding can be given only to a UNet2DModel with a positional time embedding")
    if net.slow is not None:
        return model
    _refuse_guided(net, "a slow time embedding")
    assert model.network is not None
    if net.two_times:
        raise ValueError("a slow time embedding can be given only to a network with one time")
    times = torch.linspace(schedule.t_max, schedule.t_min, 2048, dtype=torch.float64)
    inputs = TIMES[model.parametric.time](schedule, times)
    if not inputs.isfinite().all():
        raise ValueError(f"a slow time embedding needs a finite time input; {model.parametric.time!r} on this schedule is not")
    config = model.network["config"] | {"slow": [float(inputs[-1]), float(inputs[0])]}
    twin = beside(net, unet.build, config)
    slow: Any = twin.unet.time_proj
    with torch.no_grad():
        fitted = torch.linalg.lstsq(slow.waves(inputs), net.embedding(inputs.float()).double()).solution
    twin.load_state_dict(net.state_dict() | {"unet.time_proj.linear.weight": fitted.T.float().contiguous()})
    twin.train(net.training)
    return replace(model, denoiser=replace(model.parametric, net=frozen(twin)), network=model.network | {"config": config})


def with_heads(model: Teacher, heads: int) -> Teacher:
    """Return the model with ``heads`` copies of its last layer, for parallel decoding; unchanged if it has heads already.

    Raises ValueError unless the network is a UNet2DModel of one time whose time input is finite at the data, and for more heads than
    entries of a discrete table.
    """
    net, schedule = model.parametric.net, model.denoiser.schedule
    if isinstance(net, UNet) and net.heads:
        return model
    if not isinstance(net, UNet) or net.two_times:
        raise ValueError("heads can be given only to a UNet2DModel with one time")
    assert model.network is not None
    times, straight = decoding_times(schedule, heads)
    inputs = TIMES[model.parametric.time](schedule, times)
    if not inputs.isfinite().all():
        raise ValueError(
            f"heads need a time input that is finite at the data; {model.parametric.time!r} on this schedule is not"
        )
    config = model.network["config"] | {"heads": [inputs.tolist(), straight.tolist()]}
    twin, weights = beside(net, unet.build, config), net.state_dict()
    for name in ("weight", "bias"):
        last = weights.pop(f"unet.conv_out.{name}")
        weights[f"unet.conv_out.conv.{name}"] = last.repeat(heads, *[1] * (last.dim() - 1))
    twin.load_state_dict(weights)
    twin.train(net.training)
    return replace(model, denoiser=replace(model.parametric, net=frozen(twin)), network=model.network | {"config": config})


def with_guidance(model: Teacher, over: GuidanceRange) -> Teacher:
    """Return the model as a network that takes the guidance scale and at first ignores it (Meng et al. 2210.03142).

    A UNet2DModel gets `unet.GuidedTime`, a UNet2DConditionModel diffusers' ``time_cond_proj_dim``; a network that takes the scale
    already stays. Raises ValueError for any other network, without a null class, and for a range beyond that of the network.
    """
    if model.guidance is not None:
        model.guided_over(over)  # raises where the range is wider
        return replace(model, guidance=over)
    if model.null is None:
        raise ValueError("a guidance range needs a teacher trained with a null class; this one has none: leave the range out")
    network = _taking_scale(model.network or {"family": "none"}, over)
    net = model.parametric.net
    twin = beside(net, networks.build, network)
    kept = {k.replace("unet.time_proj.", "unet.time_proj.projection."): v for k, v in net.state_dict().items()}
    added = {k: torch.zeros_like(v) for k, v in twin.state_dict().items() if k not in kept}
    twin.load_state_dict(kept | added)
    twin.train(net.training)
    return replace(model, denoiser=replace(model.parametric, net=frozen(twin)), network=network, guidance=over)


def _taking_scale(network: dict, over: GuidanceRange) -> dict:
    """Return the description of a network that also takes the guidance scale."""
    family, config = network["family"], network.get("config", {})
    if family == "adapter":
        more: dict = {"network": _taking_scale(config["network"], over)}
    elif family == "unet2d":
        more = {"guidance": over.describe()[:2]}
    elif family == "stock" and config["class"] == "UNet2DConditionModel":
        more = {"time_cond_proj_dim": SCALE_WIDTH}
    else:
        name = config.get("class", family)
        raise ValueError(f"{name} cannot take the guidance scale: accepted are a UNet2DModel and a UNet2DConditionModel")
    return network | {"config": config | more}


def with_self_conditioning(model: Teacher) -> Teacher:
    """Return the model as a network that also takes its previous estimate of x0, and at first ignores it; unchanged if it takes one.

    Raises ValueError unless the network is a UNet2DModel with one time.
    """
    net = model.parametric.net
    if self_conditioned(net):
        return model
    if not isinstance(net, UNet) or net.two_times:
        raise ValueError("a previous estimate can be given only to a UNet2DModel with one time")
    assert model.network is not None
    config = model.network["config"]
    wide, weights = config | {"in_channels": 2 * config["in_channels"]}, net.state_dict()
    first = weights["unet.conv_in.weight"]
    twin = beside(net, unet.build, wide)
    twin.load_state_dict(weights | {"unet.conv_in.weight": torch.cat([first, torch.zeros_like(first)], 1)})
    twin.train(net.training).requires_grad_(next(net.parameters()).requires_grad)
    adapted, network = adapters.wrap(twin, model.network | {"config": wide}, {"kind": "self_conditioned"})
    return replace(model, denoiser=replace(model.parametric, net=adapted), network=network)


def beside(net: nn.Module, build: Callable[[dict], nn.Module], description: dict) -> Any:
    """Build a network from its description on the device of another one."""
    with next(net.parameters()).device:
        return build(description)


def _refuse_guided(net: UNet, what: str) -> None:
    if net.guided:
        raise ValueError(f"{what} cannot be given to a network that takes the guidance scale: accepted is one that does not")


def on_table(model: Teacher) -> Teacher:
    """Return the weights of a UNet2DModel as a v network on the cosine table of `untrained`, which stock schedulers support.

    It must be trained before it is a denoiser again. The table has the most entries, a power of two up to 1024, whose lowest noise
    level is at least half of the model's. Raises ValueError for any other network.
    """
    net: Any = model.parametric.net
    inner = net if isinstance(net, UNet) else getattr(net, "net", None)
    if not isinstance(inner, UNet) or inner.two_times or self_conditioned(net):
        raise ValueError("only a UNet2DModel with one time input and no previous estimate can be put on a discrete table")
    _refuse_guided(inner, "another table")
    tables = (table_of(COSINE_ZERO_SNR | {"num_train_timesteps": 2**k}) for k in range(10, 0, -1))
    fits = (table for table in tables if _lowest_level(table) >= _lowest_level(model.denoiser.schedule) / 2)
    denoiser = Denoiser(inner, next(fits, table_of(COSINE_ZERO_SNR)), "v", "index")
    return replace(model, denoiser=denoiser, network=unet.describe(inner.unet), sampling=Sampling())


def _lowest_level(schedule: Schedule) -> float:
    return float(schedule.level(schedule.ends()[1]))


def untrained(shape: tuple[int, ...], classes: int | None, channels: tuple[int, ...], layers: int, seed: int) -> Teacher:
    """Return a new UNet2DModel for samples of ``shape`` [C, H, W], with a null class after ``classes``.

    It predicts v on a cosine table of 1024 entries with zero terminal SNR; 1, 2, 4, ..., 64 steps meet the entries exactly.
    ``channels``: per resolution. ``layers``: residual blocks per resolution. ``seed``: of the weights.

    Raises ValueError if ``channels`` do not fit the shape.
    """
    depth, height, width = shape
    levels = len(channels)
    if any(c % 8 or c < 8 for c in channels) or channels[-1] < 16:
        raise ValueError(f"--channels {channels}: accepted are multiples of 8, the last at least 16")
    if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        raise ValueError(f"--channels has {levels} resolutions, but {height}x{width} cannot be halved {levels - 1} times")
    torch.manual_seed(seed)
    net = unet.build({
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
    return Teacher(Denoiser(net, table_of(COSINE_ZERO_SNR), "v", "index"), shape, unet.describe(net.unet), classes, classes)
