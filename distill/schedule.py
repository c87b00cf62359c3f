"""x_t = alpha(t) * x0 + sigma(t) * eps          t grows with noise; sigma/alpha strictly increases

Every formula about a noise schedule stands in this file, and every conversion between x0, eps and x_t that needs only
the schedule. A schedule is two functions of t, alpha and sigma, the inverse of its log-SNR, and the range of t on
which a network may be asked; ``t_clean`` is the time at which sigma is exactly 0, where every deterministic sampler ends.

Times are tensors of any floating type, ``[]`` or ``[B]``. Coefficients are computed in the type of t (float64 in sampler
grids, float32 in losses) and cast to the type of x where the two meet, in `expand` and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Base of all schedules: subclasses give ``alpha(t)``, ``sigma(t)`` and ``time(logsnr)``, each elementwise."""

    t_min = 1e-3  # smallest time at which a network is evaluated, where the schedule itself names none
    t_max = 1.0
    t_clean = 0.0  # sigma(t_clean) == 0

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def time(self, logsnr: Tensor) -> Tensor:
        """Inverse of `logsnr`; accepts -inf and +inf."""
        raise NotImplementedError

    def logsnr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2): +inf at t_clean, -inf where alpha is 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def level(self, t: Tensor) -> Tensor:
        """sigma / alpha, the sigma of the variance-exploding literature: 0 at t_clean, inf where alpha is 0."""
        return torch.exp(-self.logsnr(t) / 2)


@dataclass(frozen=True)
class Flow(Schedule):
    """Flow matching, rectified flow: alpha = 1 - t, sigma = t."""

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def time(self, logsnr):
        return torch.sigmoid(-logsnr / 2)


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    def alpha(self, t):
        return torch.sin((1 - t) * (math.pi / 2))  # cos(pi t / 2), exactly 0 at t = 1

    def sigma(self, t):
        return torch.sin(t * (math.pi / 2))

    def time(self, logsnr):
        return torch.atan(torch.exp(-logsnr / 2)) * (2 / math.pi)


@dataclass(frozen=True)
class LinearVP(Schedule):
    """VP-SDE (Song et al. 2021, eq. 32): log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_alpha(self, t):
        return -t * t * ((self.beta_max - self.beta_min) / 4) - t * (self.beta_min / 2)

    def alpha(self, t):
        return self._log_alpha(t).exp()

    def sigma(self, t):
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def time(self, logsnr):
        y = torch.nn.functional.softplus(-logsnr)  # -log alpha^2
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * y).sqrt()
        return torch.where(y.isinf(), torch.full_like(y, self.t_max), 2 * y / (self.beta_min + root))


@dataclass(frozen=True)
class VE(Schedule):
    """VE-SDE: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t. Noise reaches 0 only at t_clean = -inf."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0
    t_min = 0.0
    t_clean = -math.inf

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return self.sigma_min * torch.exp(t * math.log(self.sigma_max / self.sigma_min))

    def time(self, logsnr):
        return (-logsnr / 2 - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(Schedule):
    """Karras et al. 2022: alpha = 1, sigma = t, in units of sigma."""

    t_min: float = 0.002
    t_max: float = 80.0

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return t

    def time(self, logsnr):
        return torch.exp(-logsnr / 2)


@dataclass(frozen=True)
class Trig(Schedule):
    """TrigFlow (Lu & Song 2024): alpha = cos t, sigma = sigma_data sin t, t in [0, pi/2]."""

    sigma_data: float = 0.5
    t_max = math.pi / 2

    def alpha(self, t):
        return torch.cos(t).clamp(min=0)  # the float32 next to pi/2 lies past it

    def sigma(self, t):
        return self.sigma_data * torch.sin(t)

    def time(self, logsnr):
        return torch.atan(torch.exp(-logsnr / 2) / self.sigma_data)


@dataclass(frozen=True)
class Table(Schedule):
    """A discrete variance-preserving model of T steps: entry i of ``alphas_cumprod`` stands at t = (i + 1) / T.

    Between entries the angle atan2(sigma, alpha) is interpolated linearly. It is finite at both ends of the axis, so
    the data (t = 0) and a zero terminal SNR (alpha = 0 at t = 1) need no special case; at the entries the table itself
    comes out. On this axis diffusers' "trailing" grid of N steps is the uniform one, t = 1, 1 - 1/N, ..., 0.
    """

    alphas_cumprod: tuple[float, ...]

    def __post_init__(self):
        table = self.alphas_cumprod
        if not table or not all(1 > b > c for b, c in zip(table, (*table[1:], -1.0))) or table[-1] < 0:
            raise ValueError("alphas_cumprod must fall strictly from below 1 to no less than 0")

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return 1 / self.steps

    @cached_property
    def _knots(self) -> dict[torch.device, Tensor]:
        alphas_cumprod = torch.tensor((1.0, *self.alphas_cumprod), dtype=torch.float64)
        return {torch.device("cpu"): torch.atan2((1 - alphas_cumprod).sqrt(), alphas_cumprod.sqrt())}

    def _angle_table(self, device: torch.device) -> Tensor:
        if device not in self._knots:
            self._knots[device] = self._knots[torch.device("cpu")].to(device)
        return self._knots[device]

    def _angle(self, t):
        knots = self._angle_table(t.device)
        position = t.double().clamp(0, 1) * self.steps
        low = position.floor().clamp(max=self.steps - 1).long()
        return torch.lerp(knots[low], knots[low + 1], position - low)

    def alpha(self, t):
        return torch.sin(math.pi / 2 - self._angle(t)).to(t.dtype)

    def sigma(self, t):
        return torch.sin(self._angle(t)).to(t.dtype)

    def time(self, logsnr):
        knots = self._angle_table(logsnr.device)
        angle = torch.atan(torch.exp(-logsnr.double() / 2)).clamp(max=float(knots[-1]))
        low = (torch.searchsorted(knots, angle, right=True) - 1).clamp(0, self.steps - 1)
        return ((low + (angle - knots[low]) / (knots[low + 1] - knots[low])) / self.steps).to(logsnr.dtype)


SCHEDULES: dict[str, type[Schedule]] = {
    "flow": Flow,
    "cosine": Cosine,
    "linear_vp": LinearVP,
    "ve": VE,
    "edm": EDM,
    "trig": Trig,
    "table": Table,
}


def describe(schedule: Schedule) -> dict:
    """The schedule as plain JSON data; `schedule_from` turns it back."""
    kind = next(name for name, cls in SCHEDULES.items() if cls is type(schedule))
    return {"kind": kind, **dataclasses.asdict(schedule)}


def schedule_from(description: dict | str) -> Schedule:
    """A schedule from its name or from the result of `describe`. Raises ValueError for an unknown name or field."""
    fields = {"kind": description} if isinstance(description, str) else dict(description)
    kind = fields.pop("kind", None)
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule {kind!r}: accepted are {', '.join(SCHEDULES)}")
    if "alphas_cumprod" in fields:
        fields["alphas_cumprod"] = tuple(fields["alphas_cumprod"])
    try:
        return SCHEDULES[kind](**fields)
    except TypeError as error:
        raise ValueError(f"schedule {kind}: {error}") from None


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient [] or [B] in the type and on the device of x, shaped to multiply x [B, ...] sample by sample."""
    assert coefficient.dim() == 0 or coefficient.shape == x.shape[:1], (coefficient.shape, x.shape)
    return coefficient.to(x).reshape(coefficient.shape + (1,) * (x.dim() - 1) if coefficient.dim() else ())


def add_noise(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t from datum and noise, both [B, ...]; t is [] or [B]."""
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps


def to_eps(schedule: Schedule, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """The eps that goes with x0 at x_t: (x_t - alpha x0) / sigma."""
    return (x_t - expand(schedule.alpha(t), x_t) * x0) / expand(schedule.sigma(t), x_t)


def to_x0(schedule: Schedule, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The x0 that goes with eps at x_t: (x_t - sigma eps) / alpha. Needs alpha > 0."""
    return (x_t - expand(schedule.sigma(t), x_t) * eps) / expand(schedule.alpha(t), x_t)


def move(schedule: Schedule, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Go from t to s as if x0 were true: alpha_s x0 + (sigma_s / sigma_t) (x_t - alpha_t x0). One DDIM step."""
    ratio = expand(schedule.sigma(s) / schedule.sigma(t), x_t)
    return expand(schedule.alpha(s), x_t) * x0 + ratio * (x_t - expand(schedule.alpha(t), x_t) * x0)


def posterior(schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Of x_s given x_t and x0, s with less noise: the weights of eps that is kept and of fresh noise (Ho et al. 2020, eq. 7)."""
    ratio = schedule.alpha(t) * schedule.sigma(s) / (schedule.alpha(s) * schedule.sigma(t))
    return schedule.sigma(s) * ratio, schedule.sigma(s) * (1 - ratio.square()).clamp(min=0).sqrt()


def prior_std(schedule: Schedule, t: Tensor) -> float:
    """Of the noise that sampling starts from at t: sigma(t), and 1 on a discrete table, whose models and pipelines all begin with
    unit noise even where some signal is left at its end."""
    return 1.0 if isinstance(schedule, Table) and float(t) == schedule.t_max else float(schedule.sigma(t))


def explain(schedule: Schedule, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x0 for which `move` from t lands on x_s at s, its inverse; s must have less noise than t.

    (x_s - r x_t) / (alpha_s - r alpha_t) with r = sigma_s / sigma_t. The denominator cancels where t and s are near,
    so it is taken from log-SNRs: alpha_s - r alpha_t = -alpha_s expm1((logsnr_t - logsnr_s) / 2).
    """
    ratio = expand(schedule.sigma(s) / schedule.sigma(t), x_t)
    denominator = -schedule.alpha(s) * torch.expm1((schedule.logsnr(t) - schedule.logsnr(s)) / 2)
    return (x_s - ratio * x_t) / expand(denominator, x_t)
