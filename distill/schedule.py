"""x_t = alpha(t) * x0 + sigma(t) * eps          t grows with noise; sigma/alpha strictly increases

This file holds every formula of a noise schedule, and every conversion between x0, eps and x_t that depends on the schedule
alone. A schedule defines alpha(t), sigma(t), the inverse of its log-SNR, and the range [t_min, t_max] on which a network may be
evaluated. At ``t_clean`` sigma is exactly 0; every deterministic sampler ends there.

Times are tensors of any floating type, ``[]`` or ``[B]``. Coefficients are computed in the dtype of t (float64 in sampler grids,
float32 in losses), on the device of t, which is the CPU in samplers and losses. `expand` casts them to the dtype of x; no other
function but `expand_all` does. Samplers meet the same few times in every batch: `numbers` keeps the coefficients of single times.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.device import send


@dataclass(frozen=True)
class Schedule:
    """Define a noise schedule. Subclasses implement ``alpha(t)``, ``sigma(t)`` and ``time(logsnr)``, each elementwise."""

    t_min = 1e-3  # smallest time at which a network is evaluated; schedules with a range of their own override it
    t_max = 1.0
    t_clean = 0.0  # sigma(t_clean) == 0

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha(t), sigma(t)). A schedule that computes both from one number overrides it."""
        return self.alpha(t), self.sigma(t)

    def time(self, logsnr: Tensor) -> Tensor:
        """Return the time of a log-SNR, the inverse of `logsnr`. Accepts -inf and +inf."""
        raise NotImplementedError

    def logsnr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2): +inf at t_clean, -inf where alpha is 0."""
        return _logsnr(*self.at(t))

    def level(self, t: Tensor) -> Tensor:
        """Return the noise level sigma / alpha, the sigma of the VE literature: 0 at t_clean, inf where alpha is 0."""
        return torch.exp(-self.logsnr(t) / 2)

    def time_of(self, level: Tensor) -> Tensor:
        """Return the time of a noise level sigma / alpha, the inverse of `level`. Accepts 0 and inf."""
        return self.time(-2 * level.log())

    @cached_property
    def _numbers(self) -> dict[tuple, tuple[float, ...]]:
        """What `numbers` has computed."""
        return {}

    def ends(self) -> Tensor:
        """Return (t_max, t_min) as float64 [2]: the noisiest and the cleanest time at which a network is evaluated."""
        return torch.tensor([self.t_max, self.t_min], dtype=torch.float64)


def _logsnr(alpha: Tensor, sigma: Tensor) -> Tensor:
    return 2 * (alpha.log() - sigma.log())


def _require_order(schedule: Schedule, *names: str, equal: bool = False) -> None:
    """Raise ValueError unless 0 < first < second < inf of the named numbers; with ``equal`` the two may be equal."""
    values = [getattr(schedule, name) for name in names]
    rising = all(low < high or (equal and low == high) for low, high in pairwise(values))
    if not (rising and all(0 < value < math.inf for value in values)):
        found = ", ".join(f"{name} = {value:g}" for name, value in zip(names, values, strict=True))
        raise ValueError(
            f"{type(schedule).__name__} with {found}: accepted is 0 < {(' <= ' if equal else ' < ').join(names)} < inf"
        )


@dataclass(frozen=True)
class Flow(Schedule):
    """Flow matching (2210.02747), rectified flow (2209.03003): alpha = 1 - t, sigma = t."""

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def time(self, logsnr):
        return torch.sigmoid(-logsnr / 2)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Cosine schedule in continuous time (2202.00512): alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    def alpha(self, t):
        return torch.sin((1 - t) * (math.pi / 2))  # cos(pi t / 2), exactly 0 at t = 1

    def sigma(self, t):
        return torch.sin(t * (math.pi / 2))

    def time(self, logsnr):
        return torch.atan(torch.exp(-logsnr / 2)) * (2 / math.pi)


@dataclass(frozen=True)
class LinearVP(Schedule):
    """VP-SDE (Song et al. 2011.13456, eq. 32): log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        _require_order(self, "beta_min", "beta_max", equal=True)

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
    """VE-SDE (2011.13456): alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t. sigma is 0 only at t_clean = -inf."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0
    t_min = 0.0
    t_clean = -math.inf

    def __post_init__(self):
        _require_order(self, "sigma_min", "sigma_max")

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return self.sigma_min * torch.exp(t * math.log(self.sigma_max / self.sigma_min))

    def time(self, logsnr):
        return (-logsnr / 2 - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(Schedule):
    """EDM (Karras et al. 2206.00364): alpha = 1, sigma = t. Times are noise levels."""

    t_min: float = 0.002
    t_max: float = 80.0

    def __post_init__(self):
        _require_order(self, "t_min", "t_max")

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return t

    def time(self, logsnr):
        return torch.exp(-logsnr / 2)


@dataclass(frozen=True)
class Trig(Schedule):
    """TrigFlow (Lu & Song 2410.11081): alpha = cos t, sigma = sigma_data sin t, t in [0, pi/2].

    alpha is written as sin(pi/2 - t), which is 0 at t_max in any precision. cos t is 6e-17 there, and eps has no scale left.
    """

    sigma_data: float = 0.5
    t_max = math.pi / 2

    def __post_init__(self):
        _require_order(self, "sigma_data")

    def alpha(self, t):
        return torch.sin(self.t_max - t)

    def sigma(self, t):
        return self.sigma_data * torch.sin(t)

    def time(self, logsnr):
        return torch.atan(torch.exp(-logsnr / 2) / self.sigma_data)


@dataclass(frozen=True)
class Table(Schedule):
    """Discrete variance-preserving schedule of T steps: entry i of ``alphas_cumprod`` is at t = (i + 1) / T.

    The angle atan2(sigma, alpha) is interpolated linearly between entries, so the entries are exact. The angle is finite at both
    ends of the axis: neither the data (t = 0) nor a zero terminal SNR (alpha = 0 at t = 1) is a special case. On this axis the
    "trailing" grid of diffusers with N steps is the uniform one, t = 1, 1 - 1/N, ..., 0.

    Raises ValueError where ``alphas_cumprod`` does not fall strictly from below 1 to at least 0.
    """

    alphas_cumprod: tuple[float, ...]

    def __post_init__(self):
        table = self.alphas_cumprod
        if not table or not all(1 > b > c for b, c in zip(table, (*table[1:], -1.0))) or table[-1] < 0:
            raise ValueError("alphas_cumprod must fall strictly from below 1 to no less than 0")
        _ = self._knots  # first computed inside forward-mode differentiation, they would stay tensors of that call

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
        low = position.long().clamp(max=self.steps - 1)
        return torch.lerp(knots.take(low), knots.take(low + 1), position - low)

    def at(self, t):
        angle = self._angle(t)
        return torch.sin(math.pi / 2 - angle).to(t.dtype), torch.sin(angle).to(t.dtype)

    def alpha(self, t):
        return self.at(t)[0]

    def sigma(self, t):
        return self.at(t)[1]

    def time(self, logsnr):
        knots = self._angle_table(logsnr.device)
        angle = torch.atan(torch.exp(-logsnr.double() / 2)).clamp(max=knots[-1])
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
    """Return the schedule as JSON data. `schedule_from` is the inverse."""
    kind = next(name for name, cls in SCHEDULES.items() if cls is type(schedule))
    return {"kind": kind, **dataclasses.asdict(schedule)}


def schedule_from(description: dict | str) -> Schedule:
    """Build a schedule from its name or from the result of `describe`. Raises ValueError for what is none."""
    fields = {"kind": description} if isinstance(description, str) else dict(description)
    kind = fields.pop("kind", None)
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule {kind!r}: accepted are {', '.join(SCHEDULES)}")
    try:
        if "alphas_cumprod" in fields:
            fields["alphas_cumprod"] = tuple(fields["alphas_cumprod"])
        return SCHEDULES[kind](**fields)
    except TypeError as error:
        raise ValueError(f"schedule {kind}: {error}") from None


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Cast a coefficient [] or [B] to the dtype of x [B, ...] and shape it to multiply x sample by sample.

    [B] goes to the device of x. [] stays on the CPU, from where operators take a number without a copy.
    """
    assert coefficient.dim() == 0 or coefficient.shape == x.shape[:1], (coefficient.shape, x.shape)
    cast = coefficient.to(x.dtype)
    return send(cast, x.device).reshape(-1, *[1] * (x.dim() - 1)) if cast.dim() else cast


def expand_all(coefficients: Iterable[Tensor], x: Tensor) -> list[Tensor]:
    """Return `expand` of each coefficient. Those of [B] that go to another device go there in one copy."""
    coefficients = list(coefficients)
    if any(c.dim() == 0 or c.device == x.device for c in coefficients):
        return [expand(c, x) for c in coefficients]
    return [expand(c, x) for c in send(torch.stack([c.to(x.dtype) for c in coefficients]), x.device)]


KEPT_NUMBERS = 10_000  # of one schedule, before all are dropped


class Keeps(Protocol):
    """A schedule, or a denoiser between two schedules, that keeps what `numbers` computes."""

    @property
    def _numbers(self) -> dict[tuple, tuple[float, ...]]: ...


def numbers(formula: Callable[..., Iterable[Any]], schedule: Keeps, *arguments: Any) -> tuple[float, ...]:
    """Return formula(schedule, *arguments) as floats, computed once for equal arguments: times [] and hashable options."""
    key = (formula, *((float(a), a.dtype) if isinstance(a, Tensor) else a for a in arguments))
    known = schedule._numbers
    if key not in known:
        if len(known) >= KEPT_NUMBERS:
            known.clear()
        known[key] = tuple(map(float, formula(schedule, *arguments)))
    return known[key]


def coefficients(
    formula: Callable[..., Iterable[Tensor]], schedule: Schedule, x: Tensor, *arguments: Any
) -> Sequence[Tensor | float]:
    """Return formula(schedule, *arguments), each of a form to multiply x: the floats of `numbers` for single times, else `expand_all`."""
    if all(is_number(a) for a in arguments if isinstance(a, Tensor)):
        return numbers(formula, schedule, *arguments)
    return expand_all(formula(schedule, *arguments), x)


def is_number(t: Tensor) -> bool:
    """Return whether t is a single time on the CPU through which nothing is differentiated or traced."""
    plain = type(t) is Tensor and t.dim() == 0 and t.is_cpu and not t.requires_grad
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(t) and not torch.compiler.is_compiling()


def weighted(a: Tensor | float, x: Tensor, b: Tensor | float, y: Tensor) -> Tensor:
    """Return a x + b y [B, ...], with `coefficients` a and b. Numbers take one pass over y, and none over x where a is 1."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a * x + b * y
    return torch.add(scaled(a, x), y, alpha=b)


def scaled(a: Tensor | float, x: Tensor) -> Tensor:
    """Return a x [B, ...], and x itself where a is the number 1."""
    return x if isinstance(a, float) and a == 1 else a * x


def per_sample(mask: Tensor, x: Tensor) -> Tensor:
    """Shape a mask [B] to select samples of x [B, ...], for `torch.where`."""
    return send(mask, x.device).reshape(-1, *[1] * (x.dim() - 1))


def _at(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    return schedule.at(t)


def add_noise(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return x_t = alpha(t) x0 + sigma(t) eps. x0 and eps are [B, ...]; t is [] or [B]."""
    alpha, sigma = coefficients(_at, schedule, x0, t)
    return weighted(alpha, x0, sigma, eps)


def _to_eps(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = schedule.at(t)
    return 1 / sigma, -alpha / sigma


def to_eps(schedule: Schedule, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Return the noise implied by x0 at x_t: (x_t - alpha x0) / sigma."""
    on_x, on_x0 = coefficients(_to_eps, schedule, x_t, t)
    return weighted(on_x, x_t, on_x0, x0)


def _to_x0(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = schedule.at(t)
    return 1 / alpha, -sigma / alpha


def to_x0(schedule: Schedule, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return the x0 implied by eps at x_t: (x_t - sigma eps) / alpha. Requires alpha > 0."""
    on_x, on_eps = coefficients(_to_x0, schedule, x_t, t)
    return weighted(on_x, x_t, on_eps, eps)


def move_weights(schedule: Schedule, t: Tensor, s: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return r = kept / sigma_t and alpha_s - r alpha_t, the weights of x_t and x0 in alpha_s x0 + kept eps.

    ``kept``: the weight of the noise of x_t; by default sigma_s, all of it.
    """
    (a_t, s_t), (a_s, s_s) = schedule.at(t), schedule.at(s)
    ratio = (s_s if kept is None else kept) / s_t
    return ratio, a_s - ratio * a_t


def move(schedule: Schedule, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Take one DDIM step from t to s with x0 fixed: alpha_s x0 + (sigma_s / sigma_t) (x_t - alpha_t x0) (2010.02502, eq. 12)."""
    on_x, on_x0 = coefficients(move_weights, schedule, x_t, t, s)
    return weighted(on_x, x_t, on_x0, x0)


def explain(schedule: Schedule, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return the x0 for which `move` from t lands on x_s, the inverse of `move`. s must have less noise than t.

        x0 = (x_s - r x_t) / (alpha_s - r alpha_t),        r = sigma_s / sigma_t

    The denominator cancels where t and s are close. It is therefore computed from log-SNRs:
    alpha_s - r alpha_t = -alpha_s expm1((logsnr_t - logsnr_s) / 2).
    """
    (a_t, s_t), (a_s, s_s) = schedule.at(t), schedule.at(s)
    denominator = -a_s * torch.expm1((_logsnr(a_t, s_t) - _logsnr(a_s, s_s)) / 2)
    ratio, below = expand_all((s_s / s_t, denominator), x_t)
    return (x_s - ratio * x_t) / below


def heun_x0(schedule: Schedule, x_t: Tensor, x0: Tensor, t: Tensor, x_s: Tensor, x0_s: Tensor, s: Tensor) -> Tensor:
    """Return the x0 at t whose `move` to s is Heun's step in sigma / alpha (2206.00364, Alg. 1).

    It is the x0 of the mean of both noise estimates: x0 at x_t, and ``x0_s`` at ``x_s``, where the Euler step from t ended.
    """
    eps = (to_eps(schedule, x_t, x0, t) + to_eps(schedule, x_s, x0_s, s)) / 2
    return to_x0(schedule, x_t, eps, t)


def posterior(schedule: Schedule, t: Tensor, s: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the two noise weights of x_s given x_t and x0, where s has less noise (Ho et al. 2006.11239, eq. 7).

    x_s = alpha_s x0 + kept eps + fresh z with eps the noise of x_t and z new noise; the result is (kept, fresh). ``eta``: the noise of
    the reverse SDE over that of 2011.13456, eq. 6. With x0 fixed its solution is kept = sigma_s (level_s / level_t)^(eta^2).
    """
    (a_t, s_t), (a_s, s_s) = schedule.at(t), schedule.at(s)
    ratio = (a_t * s_s / (a_s * s_t)) ** eta**2
    return s_s * ratio, s_s * (1 - ratio.square()).clamp(min=0).sqrt()


def prior_std(schedule: Schedule, t: Tensor) -> float:
    """Return the standard deviation of the initial noise at t: sigma(t), but 1 at the end of a discrete table.

    DDPM-type models and diffusers pipelines start from unit noise even if alpha(t_max) > 0.
    """
    return 1.0 if isinstance(schedule, Table) and float(t) == schedule.t_max else float(schedule.sigma(t))
