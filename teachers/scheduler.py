"""What a diffusers scheduler's configuration says of its network: the schedule, the prediction, and what the network is told.

Which solver the scheduler is does not matter here: all schedulers of a discrete table are the same table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distill.schedule import EDM, VE, Flow, Schedule, Table

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
NAMES = {ours: theirs for theirs, ours in PREDICTIONS.items()}
DISCRETE = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
EXPLODING = ("ScoreSdeVeScheduler", "KarrasVeScheduler")
PRECONDITIONED = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
BOUNDARY = "CMStochasticIterativeScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"
SCHEDULERS = (*DISCRETE, *EXPLODING, *PRECONDITIONED, BOUNDARY, FLOW)


@dataclass(frozen=True)
class Convention:
    """The fields of a `Denoiser`, and what has to stand around the network (a configuration of `teachers.adapter`, or nothing).

    ``sampler``: as of a `Teacher`; ``record``: what only moves the sampling grid of the pipeline, such as a flow's shift.
    """

    schedule: Schedule
    prediction: str
    time: str = "index"
    sigma_data: float = 0.5
    adapter: dict | None = None
    sampler: dict = field(default_factory=dict)
    record: dict = field(default_factory=dict)


def table_of(config: dict) -> Table:
    """The schedule of a discrete scheduler's configuration, through diffusers' own table.

    Some schedulers put 2^-24 where a zero terminal SNR is asked for, so that they can divide by it: it is 0 here. A first entry of 1,
    where a `TCDScheduler` of ours has the data, is put half way to the second.
    """
    table = _instance("DDIMScheduler", config).alphas_cumprod.double().tolist()
    if config.get("rescale_betas_zero_snr") and table[-1] < 1e-6:
        table[-1] = 0.0
    if len(table) > 1 and table[0] == 1.0:
        table[0] = (1 + table[1]) / 2
    return Table(tuple(table))


def read(config: dict, what: str) -> Convention:
    """ValueError that begins with ``what`` and names what is accepted, for an unknown scheduler, prediction or option."""
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise ValueError(f"{what}: scheduler {name}; accepted are {', '.join(SCHEDULERS)}")
    try:
        c = dict(_instance(name, config).config)
        if name in DISCRETE:
            return _discrete(config, c)
        if name in EXPLODING:
            return _exploding(name, c)
        if name == FLOW:
            return _flow(c)
        return _edm(name, c)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{what}: {name}: {' '.join(str(error).split())}") from None


def _instance(default: str, config: dict) -> Any:
    """A scheduler of the class that the configuration names, with that class's own defaults."""
    import diffusers

    return getattr(diffusers, config.get("_class_name", default)).from_config(config)


def _discrete(config: dict, c: dict) -> Convention:
    if c.get("use_flow_sigmas"):
        _accept("prediction_type", c["prediction_type"], ("flow_prediction",))
        return Convention(Flow(), "flow", "thousand_time", record={"shift": c.get("flow_shift", 1.0)})
    _accept("prediction_type", c["prediction_type"], tuple(PREDICTIONS))
    _accept("timestep_type", c.get("timestep_type", "discrete"), ("discrete",))
    return Convention(table_of(config), PREDICTIONS[c["prediction_type"]])


def _exploding(name: str, c: dict) -> Convention:
    """A score on images in [0, 1], told their sigma, in Karras' pipeline as in Song's; only the latter counts its range in these."""
    scale = 2 if name == "ScoreSdeVeScheduler" else 1
    schedule = VE(scale * c["sigma_min"], scale * c["sigma_max"])
    return Convention(schedule, "score", "level", adapter={"kind": "unit"})


def _edm(name: str, c: dict) -> Convention:
    schedule = EDM(c["sigma_min"], c["sigma_max"])
    if name == BOUNDARY:
        around = {"kind": "boundary", "sigma_min": c["sigma_min"], "sigma_data": c["sigma_data"]}
        sampler = {"name": "consistency", "grid": "karras", "steps": [1, 2]}
        return Convention(schedule, "x0", "thousand_log_sigma", c["sigma_data"], around, sampler)
    _accept("prediction_type", c["prediction_type"], ("epsilon", "v_prediction"))
    adapter = {"kind": "negative"} if c["prediction_type"] == "v_prediction" else None
    return Convention(schedule, "edm", "log_sigma", c["sigma_data"], adapter)


def _flow(c: dict) -> Convention:
    _accept("num_train_timesteps", c["num_train_timesteps"], (1000,))
    _accept("invert_sigmas", c.get("invert_sigmas", False), (False,))
    return Convention(Flow(), "flow", "thousand_time", record={"shift": c["shift"]})


def _accept(name: str, value: Any, accepted: tuple) -> None:
    if value not in accepted:
        raise ValueError(f"{name} {value!r}; accepted are {', '.join(map(str, accepted))}")
