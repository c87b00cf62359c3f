"""Any nn.Module: ``package.module:factory,schedule=cosine,prediction=v,shape=3x32x32`` and nothing to subclass.

The factory is called without arguments (or with ``key=value`` pairs given as ``arg.key=value``) and returns a module called as
(x, c_noise, **cond); with ``classes`` it is given ``labels``. Weights come with the module or from ``weights=FILE.safetensors``.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

from torch import nn

from distill.denoiser import PREDICTIONS, TIMES, Denoiser
from distill.schedule import SCHEDULES, schedule_from
from teachers.load import Teacher, frozen

FIELDS = ("schedule", "prediction", "shape", "time", "sigma_data", "classes", "null", "weights", "arg.*")


def build(config: dict) -> nn.Module:
    """The module a factory makes. ValueError where there is no such factory or it makes something else."""
    module, _, name = config["factory"].partition(":")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {config['factory']!r}: {error}") from None
    net = factory(**config.get("arguments", {}))
    if not isinstance(net, nn.Module):
        raise ValueError(f"{config['factory']} made a {type(net).__name__}, not an nn.Module")
    return net


def load(spec: str) -> Teacher:
    factory, *pairs = spec.split(",")
    fields = dict(pair.partition("=")[::2] for pair in pairs)
    arguments = {k.removeprefix("arg."): _value(fields.pop(k)) for k in list(fields) if k.startswith("arg.")}
    unknown = sorted(fields.keys() - set(FIELDS))
    if unknown or not {"schedule", "prediction", "shape"} <= fields.keys():
        raise ValueError(
            f"{spec!r}: {'unknown ' + ', '.join(unknown) if unknown else 'schedule, prediction and shape must be named'}; accepted "
            f"are {', '.join(FIELDS)}, schedules {', '.join(SCHEDULES)}, predictions {', '.join(PREDICTIONS)}, times {', '.join(TIMES)}"
        )
    config = {"factory": factory, "arguments": arguments}
    net = build(config)
    if "weights" in fields:
        _load_plain(net, fields["weights"])
    denoiser = Denoiser(
        frozen(net),
        schedule_from(fields["schedule"]),
        fields["prediction"],
        fields.get("time", "time"),
        float(fields.get("sigma_data", 0.5)),
    )
    classes, null = (int(fields[k]) if k in fields else None for k in ("classes", "null"))
    shape = tuple(map(int, fields["shape"].split("x")))
    return Teacher(denoiser, shape, {"family": "module", "config": config}, classes, null, record={"source": spec})


def _load_plain(net: nn.Module, path: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from distill.checkpoint import load_weights

    try:
        load_weights(net, load_file(path), path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
