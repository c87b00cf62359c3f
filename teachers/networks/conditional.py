"""diffusers' networks other than UNet2DModel, as modules called as (x [B, C, H, W], t [B], **cond) -> [B, C, H, W].

How each class is called is in its record, `teachers.networks.records`. The second half of twice as many output channels is a learned
variance; it is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from teachers.hub import stock
from teachers.networks.records import RECORDS

SHORT = [name.removesuffix("Model").removesuffix("Transformer2D") for name in RECORDS]
OWN = 'one file in teachers/networks/records adds another, see CONTRIBUTING.md, "A network of diffusers"'


def wrap(net: Any, guidance: float | None = None) -> tuple[nn.Module, dict]:
    """Return a network of a class in `RECORDS` as a module of this project, and its description, as JSON data.

    ``guidance``: the scale for a network that embeds it; by default that of its pipeline.
    Raises ValueError for a scale that the network does not embed.
    """
    record = RECORDS[type(net).__name__]
    embeds = record.guidance is not None and bool(net.config.get("guidance_embeds"))
    if guidance is not None and not embeds:
        raise ValueError(f"guidance={guidance:g}: a {type(net).__name__} without guidance_embeds has no such input")
    scale = {"guidance": record.guidance if guidance is None else guidance} if embeds else {}
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    return record.call(net, **scale), {"family": "stock", "config": {"class": type(net).__name__, **scale, **config}}


def build(config: dict) -> nn.Module:
    """Build a network from its description's "config". Raises ValueError for a class not in `RECORDS` or not in diffusers."""
    options = dict(config)
    name = options.pop("class")
    scale = {"guidance": options.pop("guidance")} if "guidance" in options else {}
    if name not in RECORDS:
        raise ValueError(f"unknown network {name!r}: accepted are {', '.join(SHORT)}")
    return RECORDS[name].call(stock(name).from_config(options), **scale)


def classes_of(net: Any) -> tuple[int | None, int | None]:
    """Return (classes, null label) of a DiT, where the null label is None without an embedding for it; (None, None) otherwise."""
    if type(net).__name__ != "DiTTransformer2DModel":
        return None, None
    classes = net.config["num_embeds_ada_norm"]
    rows = [len(m.embedding_table.weight) for m in net.modules() if hasattr(m, "embedding_table")]
    return classes, classes if rows and min(rows) > classes else None


def size_of(net: Any) -> tuple[int, ...]:
    """Return the shape [C, H, W] of one sample. Raises ValueError if the configuration has no sample_size."""
    record = RECORDS.get(type(net).__name__)
    size = net.config.get("sample_size", record and record.side)
    if size is None:
        raise ValueError("the network's config.json has no sample_size")
    return (channels_of(net), *((size, size) if isinstance(size, int) else size))


def channels_of(net: Any) -> int:
    """Return the channels of one sample that a network takes."""
    record = RECORDS.get(type(net).__name__)
    return net.config["in_channels"] // (record.packing**2 if record else 1)


def multiple_of(name: str, config: Mapping[str, Any]) -> int:
    """Return what height and width of a sample are multiples of, for a network of this class and configuration."""
    if name == "UNet2DModel":
        return 2 ** (len(config["block_out_channels"]) - 1)
    record, patch = RECORDS.get(name), config.get("patch_size") or 1
    return max(record.packing if record else 1, patch, *config.get("all_patch_size", (1,)))


def check_sides(network: dict | None, height: int, width: int, unit: int = 1) -> None:
    """Raise ValueError where the network of a description takes no samples of this height and width, in parts 1 / ``unit`` of a latent.

    Of networks from elsewhere nothing is known.
    """
    while network is not None and "network" in network["config"]:  # inside adapters
        network = network["config"]["network"]
    config = {} if network is None or network["family"] not in ("stock", "unet2d") else network["config"]
    name = config.get("class", "UNet2DModel" if config else "")
    if name == "DiTTransformer2DModel":
        raise ValueError(f"a {name} has one size; accepted are UNets and other transformers")
    every = unit * multiple_of(name, config)
    most = every * (config.get("pos_embed_max_size") or 2**16)
    if height % every or width % every or max(height, width) > most:
        raise ValueError(f"accepted are heights and widths that are multiples of {every}, up to {most}")
