"""diffusers' UNet2DModel: as a network family of our own files, and from DDPM and DDIM pipelines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.denoiser import Denoiser
from distill.schedule import Table
from teachers.load import Teacher, frozen

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
COSINE_ZERO_SNR = {"num_train_timesteps": 1024, "beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")


class TwoTimes(nn.Module):
    """In place of a UNet's time projection P: P(t) + A P(t - s), where ``length`` is t - s. A starts at 0."""

    def __init__(self, projection: nn.Module, width: int):
        super().__init__()
        self.projection = projection
        self.length_linear = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.length_linear.weight)
        self.length: Tensor | None = None

    def forward(self, t: Tensor) -> Tensor:
        length, self.length = self.length, None
        assert length is not None
        return self.projection(t) + self.length_linear(self.projection(length))


class UNet(nn.Module):
    """A UNet2DModel called as (x [B, C, H, W], t [B], labels [B] or nothing) -> [B, C, H, W].

    With ``two_times`` it also takes ``to`` [B], the end of a jump that starts at t; t itself where it is not given.
    """

    def __init__(self, unet: nn.Module, two_times: bool = False):
        super().__init__()
        self.unet, self.two_times = unet, two_times
        if two_times:
            unet.time_proj = TwoTimes(unet.time_proj, unet.config["block_out_channels"][0])  # type: ignore

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, to: Tensor | None = None) -> Tensor:
        self._aim(t, to)
        return self.unet(x, t, class_labels=labels, return_dict=False)[0]

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
    two_times = config.pop("two_times", False)
    return UNet(UNet2DModel(**config), two_times)  # type: ignore[arg-type]


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
    config = model.network["config"] | {"two_times": True}
    twin = build(config)
    weights = net.state_dict() | {k: v for k, v in twin.state_dict().items() if "length_linear" in k}
    twin.load_state_dict(weights)
    twin.train(net.training)
    return replace(model, denoiser=replace(model.parametric, net=frozen(twin)), network=model.network | {"config": config})


def table_of(scheduler_config: dict) -> Table:
    """The schedule of a diffusers scheduler configuration, through diffusers' own table."""
    from diffusers import DDIMScheduler, DDPMScheduler

    cls = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}[scheduler_config.get("_class_name", "DDIMScheduler")]
    return Table(tuple(cls.from_config(scheduler_config).alphas_cumprod.double().tolist()))


def untrained(shape: tuple[int, ...], classes: int | None, channels: tuple[int, ...], layers: int, seed: int) -> Teacher:
    """A new UNet2DModel for images of ``shape`` [C, H, W] with a null class, predicting v on a cosine table of 1024 entries and
    zero terminal SNR, which every ladder of powers of two meets exactly. ValueError where ``channels`` do not fit the shape."""
    depth, height, width = shape
    levels = len(channels)
    if any(c % 8 for c in channels):
        raise ValueError(f"--channels {channels}: each must be a multiple of 8")
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


def load(spec: str) -> Teacher:
    """A DDPM or DDIM pipeline with a UNet2DModel, from a folder or, where there is none of that name, from the hub."""
    from diffusers import DiffusionPipeline, UNet2DModel

    folder = Path(spec)
    if not folder.is_dir():
        try:
            folder = Path(DiffusionPipeline.download(spec, trust_remote_code=False))
        except Exception as error:  # the hub client raises many kinds; all mean that the model cannot be had
            raise ValueError(
                f"cannot fetch {spec!r} from the hub ({type(error).__name__}): is it spelt right, is there a network?"
            ) from None
    index = _read(folder / "model_index.json", "no diffusers pipeline")
    if "unet" not in index or "scheduler" not in index or index["unet"][1] != "UNet2DModel":
        raise ValueError(f"{spec}: holds a {index.get('_class_name')}; accepted are pipelines of a UNet2DModel and a scheduler")
    scheduler = _read(folder / "scheduler" / "scheduler_config.json", "the pipeline lacks its scheduler")
    name, prediction = scheduler.get("_class_name"), scheduler.get("prediction_type", "epsilon")
    if name not in SCHEDULERS:
        raise ValueError(f"{spec}: scheduler {name}; accepted are {', '.join(SCHEDULERS)}")
    if prediction not in PREDICTIONS:
        raise ValueError(f"{spec}: prediction_type {prediction!r}; accepted are {', '.join(PREDICTIONS)}")
    try:
        unet = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
    except OSError as error:
        raise ValueError(f"{spec}: the pipeline lacks its weights as safetensors ({str(error).splitlines()[0]})") from None
    c = unet.config
    size = (c.sample_size, c.sample_size) if isinstance(c.sample_size, int) else tuple(c.sample_size)
    return Teacher(
        Denoiser(frozen(UNet(unet)), table_of(scheduler), PREDICTIONS[prediction], "index"),
        (c.in_channels, *size),
        network(unet),
        classes=c.num_class_embeds,
        record={"source": spec},
    )


def _read(path: Path, otherwise: str) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        raise ValueError(f"{path}: {otherwise}") from None
