"""Any nn.Module: ``package.module:factory,schedule=cosine,prediction=v,shape=3x32x32`` and nothing to subclass.

The factory is called without arguments (or with ``key=value`` pairs given as ``arg.key=value``) and returns a module called as
(x, c_noise, **cond); with ``classes`` it is given ``labels``. Weights come with the module or from ``weights=FILE``, a state dict as
.safetensors or as a .pt that holds nothing but tensors; ``part`` names the one that is meant where a file holds several. ``range=unit``:
a score of images in [0, 1], as score_sde's VE networks are; ``span=999``: told 999 t, as its VP networks are;
``schedule.sigma_max=348`` and the like: the fields of the schedule.
"""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.checkpoint import load_weights
from distill.denoiser import PREDICTIONS, TIMES, Denoiser
from distill.schedule import SCHEDULES, schedule_from
from teachers.adapter import wrap
from teachers.load import Teacher, frozen
from teachers.text import first_line

CONVERT = (
    "not readable without running code that is in it, which is never done here: where you trust that code, "
    'python -c \'import torch, safetensors.torch as s; net = torch.load("IN", weights_only=False)["ema"]; '
    's.save_file(net.state_dict(), "OUT.safetensors")\' makes a file that is accepted'
)
BROKEN = "not a whole file of tensors; a state dict as .safetensors or .pt is accepted"
PREFIXES = ("module.", "model.", "ema.")
FIELDS = (
    "schedule",
    "prediction",
    "shape",
    "time",
    "sigma_data",
    "classes",
    "null",
    "weights",
    "part",
    "range",
    "span",
    "schedule.*",
    "arg.*",
)


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
    ends = {k.removeprefix("schedule."): _number(k, fields.pop(k)) for k in list(fields) if k.startswith("schedule.")}
    unknown = sorted(fields.keys() - set(FIELDS))
    if "part" in fields and "weights" not in fields:
        raise ValueError(f"part={fields['part']}: accepted with weights=FILE, of which it is one")
    if unknown or not {"schedule", "prediction", "shape"} <= fields.keys():
        raise ValueError(
            f"{spec!r}: {'unknown ' + ', '.join(unknown) if unknown else 'schedule, prediction and shape must be named'}; accepted "
            f"are {', '.join(FIELDS)}, schedules {', '.join(SCHEDULES)}, predictions {', '.join(PREDICTIONS)}, times {', '.join(TIMES)}"
        )
    config = {"factory": factory, "arguments": arguments}
    net = build(config)
    if "weights" in fields:
        tensors = state_dict(fields["weights"], fields.get("part"))
        load_weights(net, tensors if tensors.keys() & net.state_dict().keys() else unwrapped(tensors), fields["weights"])
    around = _around(fields)
    net, network = wrap(net, {"family": "module", "config": config}, around)
    denoiser = Denoiser(
        frozen(net),
        schedule_from({"kind": fields["schedule"], **ends}),
        fields["prediction"],
        fields.get("time", "time"),
        float(fields.get("sigma_data", 0.5)),
    )
    classes, null = (int(fields[k]) if k in fields else None for k in ("classes", "null"))
    shape = tuple(map(int, fields["shape"].split("x")))
    return Teacher(denoiser, shape, network, classes, null, record={"source": spec})


def _around(fields: dict[str, str]) -> dict | None:
    """The adapter of a network that works on images in [0, 1], or is told another multiple of t; None for any other."""
    if "range" in fields:
        said = fields["range"], fields["prediction"], fields.get("time"), fields["schedule"] in ("ve", "edm"), "span" in fields
        if said != ("unit", "score", "level", True, False):
            raise ValueError(
                f"range={fields['range']}: accepted is unit, with prediction=score, time=level and schedule=ve or edm"
            )
        return {"kind": "unit"}
    if "span" in fields:
        if fields.get("time") != "thousand_time":
            raise ValueError(f"span={fields['span']}: accepted with time=thousand_time, which it replaces")
        return {"kind": "span", "span": _number("span", fields["span"])}
    return None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text}: a number is accepted") from None


def state_dict(path: str, part: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file by name. ValueError in one line for a file that cannot be read without running code, or holds several
    state dicts of which none is named."""
    tensors = _tensors(path)
    parts = [name for name, value in tensors.items() if isinstance(value, Mapping)]
    if part is not None or parts:
        if part not in parts:
            raise ValueError(
                f"{path}: holds several state dicts, one has to be named: part={' or part='.join(parts) or '(none here)'}"
            )
        tensors = tensors[part]
    kept = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}  # not an epoch or a rate
    if not kept:
        raise ValueError(f"{path}: holds no tensors; a state dict is accepted")
    return kept


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the name that something around the network put before all of theirs: "module.", "model.", "ema."."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            return unwrapped({name.removeprefix(prefix): value for name, value in tensors.items()})
    return tensors


def _tensors(path: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    if path.endswith((".safetensors", ".sft")):
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a safetensors file ({error})") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: {CONVERT if 'GLOBAL' in str(error) else BROKEN} ({first_line(error)[:80]})") from None
    except Exception as error:  # of a torn or foreign file torch raises many kinds
        raise ValueError(f"{path}: {BROKEN} ({first_line(error)[:80]})") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: holds a {type(found).__name__}; a state dict is accepted")
    return dict(found)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
