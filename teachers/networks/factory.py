"""Networks made by a factory of the user's own, ``package.module:function``, which must be trusted: building one runs its code."""

from __future__ import annotations

import importlib

from torch import nn

_TRUSTED: set[str] = set()


def trust(*names: str) -> None:
    """Allow model files to name factories of these packages or modules, or one factory ``package.module:function``.

    A file that names any other factory is refused. The factory of a spec that the user gives is trusted by being given.
    """
    _TRUSTED.update(names)


def _is_trusted(factory: str) -> bool:
    parts = factory.partition(":")[0].split(".")
    return bool(_TRUSTED & {factory, *(".".join(parts[:n]) for n in range(1, len(parts) + 1))})


def build(config: dict) -> nn.Module:
    """Build the module that config["factory"] makes of config["arguments"].

    Raises ValueError if the factory is not trusted, cannot be imported or does not return an nn.Module.
    """
    factory = str(config["factory"])
    module, _, name = factory.partition(":")
    if not _is_trusted(factory):
        raise ValueError(
            f"its network is made by {factory[:80]!r}, code outside of this project: if you trust it, add --trust {module[:80]}"
            " (in Python: teachers.trust)"
        )
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {factory!r}: {error}") from None
    net = make(**config.get("arguments", {}))
    if not isinstance(net, nn.Module):
        raise ValueError(f"{factory} made a {type(net).__name__}, not an nn.Module")
    return net
