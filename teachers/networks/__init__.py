"""Networks as modules called as (x [B, ...], c_noise [B], **cond) -> [B, ...], rebuilt from JSON descriptions.

A description is ``{"family": ..., "config": {...}}``. `build` makes the network without its weights. The family "adapter" wraps
another description; "given" stands for a module that the caller passes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from teachers.networks import adapters, conditional, factory, unet

FAMILIES: dict[str, Callable[[dict], nn.Module]] = {
    "unet2d": unet.build,
    "stock": conditional.build,
    "module": factory.build,
}


def build(network: dict, given: nn.Module | None = None) -> nn.Module:
    """Build the network of a description, adapters included. ``given``: the module of a description of the family "given".

    Raises ValueError for an unknown family, and if ``given`` is needed and missing or passed and not needed.
    """
    family, config = network["family"], dict(network["config"])
    if family == "adapter":
        inner = config.pop("network")
        return adapters.wrap(build(inner, given), inner, config)[0]
    if family == "given":
        if given is None:
            raise ValueError(f"this model needs your module {config['class']}: use teachers.load_file(path, net=MODULE)")
        return given
    if given is not None:
        raise ValueError(f"net={type(given).__name__}: this model's file builds its own network; load it without net")
    if family not in FAMILIES:
        raise ValueError(f"unknown network family {family!r}: accepted are adapter, given, {', '.join(FAMILIES)}")
    return FAMILIES[family](config)


def around(network: dict, model: nn.Module) -> nn.Module:
    """Return the modules that a description puts around a ``model`` of diffusers, its pipeline's own network."""
    family, config = network["family"], dict(network["config"])
    if family == "adapter":
        inner = config.pop("network")
        return adapters.wrap(around(inner, model), inner, config)[0]
    return unet.UNet(model) if family == "unet2d" else conditional.wrap(model, config.get("guidance"))[0]
