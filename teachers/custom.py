"""Any nn.Module as a model: an object, with `wrap`, or ``package.module:factory,schedule=cosine,prediction=v,shape=3x32x32``.

The factory is called with the ``arg.KEY=VALUE`` options of the spec. It returns a module called as (x, c_noise, **cond), where cond is
``labels`` if ``classes`` is given. A network of yet another call needs a wrapper. The other options:

    labels_as=y                the network takes labels under this keyword (DiT, SiT)
    order=t,x                  the network is called as (t, x) (torchcfm, flow_matching)
    time=reversed              its time is 1 - t: noise at 0 and data at 1; prediction=flow is then the velocity from noise to data
    weights=FILE, part=NAME    a state dict as .safetensors or as a .pt of tensors alone, and which one if the file holds several
    time, sigma_data           the fields of `distill.denoiser.Denoiser`
    classes, null              the number of classes, and the label of the unconditional case
    schedule.FIELD=NUMBER      a field of the schedule, such as schedule.sigma_max=348
    range=unit                 the network is a score of images in [0, 1] (the VE networks of score_sde)
    span=999                   the time input is 999 t (the VP networks of score_sde), or 999 (1 - t) with time=reversed
"""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from distill.denoiser import PREDICTIONS, TIMES, Denoiser
from distill.files import load_weights
from distill.schedule import SCHEDULES, Schedule, schedule_from
from teachers.call import fitted
from teachers.networks import adapters, factory
from teachers.teacher import Teacher, frozen
from teachers.weights import state_dict, unwrapped

REQUIRED = ("schedule", "prediction", "shape")
OPTIONS = ("time", "sigma_data", "classes", "null", "weights", "part", "range", "span", "labels_as", "order")
ORDERS = ("x,t", "t,x")
REVERSED = "reversed"


def wrap(
    net: nn.Module,
    *,
    shape: tuple[int, ...],
    schedule: Schedule | str,
    prediction: str,
    time: str = "time",
    classes: int | None = None,
    null: int | None = None,
    labels: str = "labels",
    order: str = "x,t",
    sigma_data: float = 0.5,
) -> Teacher:
    """Return a module as a model. The module itself is frozen and put in eval mode.

    ``net``: called as (x [B, *shape], c_noise [B]), with ``classes`` also with labels [B] under the keyword ``labels``. ``order``:
    "t,x" for a network called as (c_noise, x). ``shape``: of one sample. ``schedule``: a value or a name. ``prediction``, ``time``,
    ``sigma_data``: as in `distill.denoiser.Denoiser`; the time "reversed" is 1 - t, and "flow" is then the velocity to the data.
    ``classes``, ``null``: as in `Teacher`. `teachers.save` saves the result; `teachers.load_file` needs a module of the same class.

    The module is called once. If it returns twice the channels, the second half, a learned variance, is dropped.

    Raises ValueError for an unknown schedule, prediction or time, and for a module whose call does not fit.
    """
    name = f"{type(net).__module__}.{type(net).__qualname__}"
    schedule = schedule_from(schedule) if isinstance(schedule, str) else schedule
    outer, network = net, {"family": "given", "config": {"class": name}}
    kinds = _call(order, labels)
    if time == REVERSED:
        kinds, time = [*kinds, _reversed(schedule, prediction, 1.0)], "time"
    for adapter in kinds:
        outer, network = adapters.wrap(outer, network, adapter)
    denoiser = Denoiser(frozen(outer), schedule, prediction, time, sigma_data)
    denoiser, network = fitted(denoiser, network, tuple(shape), classes, name)
    return Teacher(denoiser, tuple(shape), network, classes, null, record={"source": name})


def load(spec: str, trusted: bool = True) -> Teacher:
    """Load the module that a factory makes. ``trusted``: the user named the factory; otherwise `factory.trust` must have named it.

    Raises ValueError for a missing or unknown option, factory or weight, and for a factory that is not trusted.
    """
    path, *pairs = spec.replace("order=t,x", "order=t;x").replace("order=x,t", "order=x;t").split(",")
    fields = dict(pair.partition("=")[::2] for pair in pairs)
    arguments = {k: _value(v) for k, v in _take(fields, "arg.").items()}
    ends = {k: _number(f"schedule.{k}", v) for k, v in _take(fields, "schedule.").items()}
    unknown = sorted(fields.keys() - {*REQUIRED, *OPTIONS})
    if unknown or not fields.keys() >= set(REQUIRED):
        problem = f"unknown {', '.join(unknown)}" if unknown else f"{', '.join(REQUIRED)} are required"
        raise ValueError(
            f"{spec!r}: {problem}; accepted are {', '.join((*REQUIRED, *OPTIONS))}, schedule.*, arg.*; "
            f"schedules {', '.join(SCHEDULES)}; predictions {', '.join(PREDICTIONS)}; times {', '.join(TIMES)}, {REVERSED}"
        )
    if "part" in fields and "weights" not in fields:
        raise ValueError(f"part={fields['part']}: accepted together with weights=FILE only")
    config = {"factory": path, "arguments": arguments}
    if trusted:
        factory.trust(path)
    net = factory.build(config)
    if "weights" in fields:
        tensors = state_dict(fields["weights"], fields.get("part"))
        load_weights(net, tensors if tensors.keys() & net.state_dict().keys() else unwrapped(tensors), fields["weights"])
    schedule, time = schedule_from({"kind": fields["schedule"], **ends}), fields.get("time", "time")
    network: dict = {"family": "module", "config": config}
    order = fields.get("order", ORDERS[0]).replace(";", ",")
    for adapter in (*_call(order, fields.get("labels_as", "labels")), *_conventions(fields, schedule)):
        net, network = adapters.wrap(net, network, adapter)
    time = "time" if time == REVERSED else time
    denoiser = Denoiser(frozen(net), schedule, fields["prediction"], time, float(fields.get("sigma_data", 0.5)))
    classes, null = (int(fields[k]) if k in fields else None for k in ("classes", "null"))
    shape = tuple(map(int, fields["shape"].split("x")))
    denoiser, network = fitted(denoiser, network, shape, classes, path)
    return Teacher(denoiser, shape, network, classes, null, record={"source": spec})


def _take(fields: dict[str, str], prefix: str) -> dict[str, str]:
    """Remove the fields that begin with ``prefix``, and return them without it."""
    return {key.removeprefix(prefix): fields.pop(key) for key in list(fields) if key.startswith(prefix)}


def _call(order: str, labels: str) -> list[dict]:
    """Return the adapters of a network called in this order, that takes labels under this keyword."""
    if order not in ORDERS:
        raise ValueError(f"order={order}: accepted are {' and '.join(ORDERS)}")
    first = [{"kind": "time_first"}] if order == "t,x" else []
    return first if labels == "labels" else [*first, {"kind": "renamed", "name": labels}]


def _reversed(schedule: Schedule, prediction: str, span: float) -> dict:
    """Return the adapter of a network whose time is 1 - t. Raises ValueError for a schedule whose times are not from 0 to 1."""
    if (schedule.t_clean, schedule.t_max) != (0.0, 1.0):
        raise ValueError(
            "time=reversed: accepted with a schedule whose times go from 0 to 1, such as flow, cosine or linear_vp"
        )
    return {"kind": "reversed", "sign": -1.0 if prediction == "flow" else 1.0, "span": span}


def _conventions(fields: dict[str, str], schedule: Schedule) -> list[dict]:
    """Return the adapters that the options "range", "span" and "time" ask for."""
    if "range" in fields:
        given = fields["range"], fields["prediction"], fields.get("time"), fields["schedule"] in ("ve", "edm"), "span" in fields
        if given != ("unit", "score", "level", True, False):
            raise ValueError(
                f"range={fields['range']}: accepted is range=unit with prediction=score, time=level and schedule=ve or edm"
            )
        return [{"kind": "unit"}]
    if fields.get("time") == REVERSED:
        return [_reversed(schedule, fields["prediction"], _number("span", fields.get("span", "1")))]
    if "span" in fields:
        if fields.get("time") != "thousand_time":
            raise ValueError(f"span={fields['span']}: accepted with time=thousand_time and time=reversed only")
        return [{"kind": "span", "span": _number("span", fields["span"])}]
    return []


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text}: accepted is a number") from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
