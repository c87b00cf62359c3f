"""Read the conventions of a network from the configuration of its diffusers scheduler: schedule, prediction and time input.

The scheduler's solver does not matter here: all schedulers with a discrete table have the same table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.sampling import Sampling
from distill.schedule import EDM, VE, Flow, Schedule, Table
from teachers.networks.records.record import by_count

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
NAMES = {ours: theirs for theirs, ours in PREDICTIONS.items()}
DISCRETE = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
    "DEISMultistepScheduler", "HeunDiscreteScheduler", "LCMScheduler", "TCDScheduler", "DPMSolverSDEScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
)  # fmt: skip
STAND_IN = (
    "HeunDiscreteScheduler"  # has the options and defaults of these; one needs torchsde, the others take seconds to build
)
STOOD_IN = ("DPMSolverSDEScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
EXPLODING = ("ScoreSdeVeScheduler", "KarrasVeScheduler")
PRECONDITIONED = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
BOUNDARY = "CMStochasticIterativeScheduler"
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
SCHEDULERS = (*DISCRETE, *EXPLODING, *PRECONDITIONED, BOUNDARY, *FLOWS)


@dataclass(frozen=True)
class Convention:
    """Hold the fields of a `Denoiser` and the network's adapter, a configuration of `teachers.networks.adapters` or None.

    ``sampling``: as in a `Teacher`. ``record``: options that only change the pipeline's sampling grid, such as a flow's shift.
    """

    schedule: Schedule
    prediction: str
    time: str = "index"
    sigma_data: float = 0.5
    adapter: dict | None = None
    sampling: Sampling = field(default_factory=Sampling)
    record: dict = field(default_factory=dict)


def table_of(config: dict) -> Table:
    """Return the schedule of a discrete scheduler's configuration, from diffusers' own table.

    Two entries are corrected. Some schedulers replace a zero terminal SNR by 2^-24, to divide by it; here it is 0. The first entry of a
    `TCDScheduler` exported by this project is 1, the data; it is moved half way to the second.
    """
    table = _instance("DDIMScheduler", config).alphas_cumprod.double().tolist()
    if config.get("rescale_betas_zero_snr") and table[-1] < 1e-6:
        table[-1] = 0.0
    if len(table) > 1 and table[0] == 1.0:
        table[0] = (1 + table[1]) / 2
    return Table(tuple(table))


def read(config: dict, what: str) -> Convention:
    """Return the conventions of a scheduler's configuration.

    Raises ValueError, beginning with ``what``, for an unknown scheduler, prediction or option.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise ValueError(f"{what}: scheduler {name}; accepted are {', '.join(SCHEDULERS)}")
    try:
        c = dict(_instance(name, config).config)
        if name in DISCRETE:
            return _discrete(config, c)
        if name in EXPLODING:
            return _exploding(name, c)
        if name in FLOWS:
            return _flow(c)
        return _edm(name, c)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ValueError(f"{what}: {name}: {' '.join(str(error).split())}") from None


def times(config: dict, steps: int, shape: tuple[int, ...], grid: Callable[..., dict] = by_count) -> Tensor:
    """Return the times that a pipeline's own scheduler visits, then the data, float64 [steps + 1], on the schedule that `read` returns.

    ``shape``: of one sample; a dynamic shift depends on it. ``grid``: that of the network's `Record`. Second stages of a step, such as
    Heun's, are left out. Raises ValueError for a scheduler without a list of noise levels.
    """
    scheduler, schedule = _instance(config["_class_name"], config), read(config, "the pipeline").schedule
    if config["_class_name"] not in (*DISCRETE, *FLOWS):
        raise ValueError(f"{config['_class_name']}: accepted are {', '.join((*DISCRETE, *FLOWS))}")
    scheduler.set_timesteps(**grid(scheduler.config, steps, shape))
    levels = getattr(scheduler, "sigmas", None)
    if levels is None:  # entries of the table
        found = (scheduler.timesteps.double() + 1) / scheduler.config["num_train_timesteps"]
    elif isinstance(schedule, Flow):
        found = levels[:-1].double()
    else:
        found = schedule.time_of(levels[:-1][levels[:-1] > 0].double())
    return torch.cat([torch.unique_consecutive(found), found.new_tensor([schedule.t_clean])])


def _instance(default: str, config: dict) -> Any:
    """Return a scheduler of the configuration's class, by default ``default``, with the defaults of that class."""
    import diffusers

    if "_class_name" not in config:  # one of this project; `from_config` would import all schedulers, and scipy with them
        return getattr(diffusers, default)(**config)
    name = config["_class_name"]
    if name in STOOD_IN:
        return getattr(diffusers, STAND_IN).from_config({key: v for key, v in config.items() if key != "_class_name"})
    return getattr(diffusers, name).from_config(config)


def _discrete(config: dict, c: dict) -> Convention:
    if c.get("use_flow_sigmas"):
        _accept("prediction_type", c["prediction_type"], ("flow_prediction",))
        return Convention(Flow(), "flow", "thousand_time", record={"shift": c.get("flow_shift", 1.0)})
    _accept("prediction_type", c["prediction_type"], tuple(PREDICTIONS))
    _accept("timestep_type", c.get("timestep_type", "discrete"), ("discrete",))
    return Convention(table_of(config), PREDICTIONS[c["prediction_type"]])


def _exploding(name: str, c: dict) -> Convention:
    """Read a VE score network for images in [0, 1]. Only Song's scheduler counts its sigmas on that range; Karras' uses [-1, 1]."""
    scale = 2 if name == "ScoreSdeVeScheduler" else 1
    schedule = VE(scale * c["sigma_min"], scale * c["sigma_max"])
    return Convention(schedule, "score", "level", adapter={"kind": "unit"})


def _edm(name: str, c: dict) -> Convention:
    schedule = EDM(c["sigma_min"], c["sigma_max"])
    if name == BOUNDARY:
        adapter = {"kind": "boundary", "sigma_min": c["sigma_min"], "sigma_data": c["sigma_data"]}
        sampling = Sampling("consistency", grid="karras", steps=(1, 2))
        return Convention(schedule, "x0", "thousand_log_sigma", c["sigma_data"], adapter, sampling)
    _accept("prediction_type", c["prediction_type"], ("epsilon", "v_prediction"))
    negative = {"kind": "negative"} if c["prediction_type"] == "v_prediction" else None
    return Convention(schedule, "edm", "log_sigma", c["sigma_data"], negative)


def _flow(c: dict) -> Convention:
    _accept("num_train_timesteps", c["num_train_timesteps"], (1000,))
    _accept("invert_sigmas", c.get("invert_sigmas", False), (False,))
    return Convention(Flow(), "flow", "thousand_time", record={"shift": c["shift"]})


def _accept(name: str, value: Any, accepted: tuple) -> None:
    if value not in accepted:
        raise ValueError(f"{name} {value!r}; accepted are {', '.join(map(str, accepted))}")
