"""Adapters around networks of other conventions, so that a row of `distill.denoiser.PREDICTIONS` fits them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """Hold a network under the name ``net``. Subclasses define how it is called."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net


class Unit(Adapter):
    """Convert a score network for images in [0, 1] to images in [-1, 1]: score(x, sigma) = F((x + 1) / 2, sigma / 2) / 2."""

    def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        return self.net((x + 1) / 2, sigma / 2, **_scaled(cond, 0.5)) / 2


class Span(Adapter):
    """Convert the time input 1000 t of "thousand_time" to ``span`` t."""

    def __init__(self, net: nn.Module, span: float):
        super().__init__(net)
        self.factor = span / 1000

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.net(x, t * self.factor, **_scaled(cond, self.factor))


class Reversed(Adapter):
    """Call a network whose time is ``span`` (1 - t): noise at 0, data at ``span``. ``sign``: -1 for its velocity, from noise to data."""

    def __init__(self, net: nn.Module, sign: float = 1.0, span: float = 1.0):
        super().__init__(net)
        self.sign, self.span = sign, span

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        ends = {"to": self.span * (1 - cond["to"])} if "to" in cond else {}
        return self.sign * self.net(x, self.span * (1 - t), **cond | ends)


class TimeFirst(Adapter):
    """Call a network that takes (t, x)."""

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.net(t, x, **cond)


class Negative(Adapter):
    """Return -F: "v_prediction" of diffusers' EDM schedulers."""

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return -self.net(x, t, **cond)


class Mean(Adapter):
    """Return the first half of twice as many output channels as inputs. The second half is a learned variance."""

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.net(x, t, **cond)[:, : x.shape[1]]


class Boundary(Adapter):
    """Evaluate a consistency function, the identity at sigma_min (Song et al. 2303.01469, eq. 5 and app. C), with t = 250 ln(sigma):

    sd^2 / ((sigma - sigma_min)^2 + sd^2) x + (sigma - sigma_min) sd / sqrt(sigma^2 + sd^2) F(x / sqrt(sigma^2 + sd^2), t)
    """

    def __init__(self, net: nn.Module, sigma_min: float, sigma_data: float):
        super().__init__(net)
        self.sigma_min, self.sigma_data = sigma_min, sigma_data

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        sigma = torch.exp(t.double() / 250).reshape(-1, *[1] * (x.dim() - 1))
        above, sd = sigma - self.sigma_min, self.sigma_data
        scale = (sigma**2 + sd**2).sqrt()
        output = self.net((1 / scale).to(x) * x, t, **cond)
        return (sd**2 / (above**2 + sd**2)).to(x) * x + (above * sd / scale).to(x) * output


class Rounded(Adapter):
    """Hold a network whose weights are rounded to bfloat16, in place. x and its conditions are rounded too, times are not."""

    def __init__(self, net: nn.Module):
        super().__init__(net.to(torch.bfloat16))

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        halves = {k: v.to(torch.bfloat16) if v.is_floating_point() and k != "to" else v for k, v in cond.items()}
        return self.net(x.to(torch.bfloat16), t, **halves).to(x.dtype)


class Renamed(Adapter):
    """Pass labels to a network under its own keyword ``name``."""

    def __init__(self, net: nn.Module, name: str):
        super().__init__(net)
        self.name = name

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, **cond: Any) -> Tensor:
        return self.net(x, t, **({} if labels is None else {self.name: labels}), **cond)


class SelfConditioned(Adapter):
    """Call a network of twice the input channels with x and the ``previous`` estimate of x0, zeros where there is none (2208.04202)."""

    self_conditioned = True

    def forward(self, x: Tensor, t: Tensor, previous: Tensor | None = None, **cond: Any) -> Tensor:
        previous = torch.zeros_like(x) if previous is None else previous.to(x.dtype)
        return self.net(torch.cat([x, previous], 1), t, **cond)[:, : x.shape[1]]


def _scaled(cond: dict[str, Any], factor: float) -> dict[str, Any]:
    """Return the conditions of a call with the end of a jump, ``to``, times ``factor``, as its start is."""
    return cond | {"to": factor * cond["to"]} if "to" in cond else cond


KINDS: dict[str, type[Adapter]] = {
    "unit": Unit,
    "span": Span,
    "reversed": Reversed,
    "time_first": TimeFirst,
    "negative": Negative,
    "mean": Mean,
    "boundary": Boundary,
    "renamed": Renamed,
    "rounded": Rounded,
    "self_conditioned": SelfConditioned,
}


def wrap(net: nn.Module, network: dict, adapter: dict | None) -> tuple[nn.Module, dict]:
    """Return a network in its adapter, {"kind": a key of `KINDS`, **options}, and the description of both; unchanged for None."""
    if adapter is None:
        return net, network
    options = dict(adapter)
    made = KINDS[options.pop("kind")](net, **options)
    return made, {"family": "adapter", "config": adapter | {"network": network}}
