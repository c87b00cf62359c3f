"""Hollow networks: shapes without weights, on the meta device, built from config.json alone. The plan of a run needs no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from teachers.hub import check_numbers, first_line, left_out, quiet, read_json, stock

META = torch.device("meta")
OLDER = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}  # of a Transformer2DModel


def is_hollow(net: Any) -> bool:
    """Return whether a network has shapes alone: some of its weights are on the meta device."""
    return isinstance(net, nn.Module) and any(weight.device.type == "meta" for weight in net.parameters())


def has_weights(folder: Path) -> bool:
    """Return whether the folder of a pipeline has the weights of all components that are loaded."""
    parts = [path.parent for path in folder.glob("*/config.json") if path.parent.name not in left_out(folder)]
    return all(any(part.glob("*.safetensors")) for part in parts)


def component(folder: Path, part: str, name: str, what: str) -> Any:
    """Return a hollow component of a pipeline by the name of its diffusers class.

    Raises ValueError, beginning with ``what``, if its config.json is missing or does not fit the class.
    """
    if not (folder / part / "config.json").is_file():
        raise ValueError(f"{what}: the pipeline lacks {part}/config.json")
    check_numbers(read_json(folder / part / "config.json", "no configuration"), f"{what}: {part}/config.json")
    try:
        return network(folder / part, name)
    except Exception as error:  # diffusers raises many types; all mean that the configuration does not fit
        raise ValueError(f"{what}: {part}/config.json does not fit a {name} ({first_line(error)[:80]})") from None


def network(folder: Path, name: str) -> Any:
    """Return a hollow network of diffusers. Older folders have Transformer2DModel, which diffusers loads as DiT or PixArt."""
    config = read_json(folder / "config.json", "no configuration")
    with quiet(), META:
        return stock(OLDER.get(str(config.get("norm_type")), name) if name == "Transformer2DModel" else name).from_config(
            config
        )


def text_encoder(folder: Path, cls: Any) -> Any:
    """Return a hollow text encoder of a class of transformers. It takes tokens on the CPU and returns zeros there.

    No shape depends on attention masks and caches; they are left out, because transformers looks at values of some.
    """
    with META:
        encoder = cls(cls.config_class.from_pretrained(folder))
    encoder.register_parameter("place", nn.Parameter(torch.empty(0), requires_grad=False))  # the first one says where it is
    encoder.register_forward_pre_hook(_given, with_kwargs=True)
    encoder.register_forward_hook(lambda encoder, given, output: tree_map_only(Tensor, _zeros, output))
    return encoder


def _given(encoder: nn.Module, tokens: tuple, options: dict) -> tuple[tuple, dict]:
    kept = {name: value for name, value in options.items() if name not in ("attention_mask", "use_cache")}
    return tree_map_only(Tensor, lambda value: value.to(META), (tokens[:1], kept))


def _zeros(values: Tensor) -> Tensor:
    return torch.zeros(values.shape, dtype=values.dtype)
