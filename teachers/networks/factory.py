"""Networks made by a factory of the user's own: ``package.module:function``."""

from __future__ import annotations

import importlib

from torch import nn


def build(config: dict) -> nn.Module:
    """Build the module that config["factory"] makes of config["arguments"].

    Raises ValueError if the factory cannot be imported or does not return an nn.Module.
    """
    module, _, name = config["factory"].partition(":")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {config['factory']!r}: {error}") from None
    net = factory(**config.get("arguments", {}))
    if not isinstance(net, nn.Module):
        raise ValueError(f"{config['factory']} made a {type(net).__name__}, not an nn.Module")
    return net
