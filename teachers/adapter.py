"""What stands around the networks of foreign conventions, so that a row of the table of predictions reads them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from teachers.load import FAMILIES


class Unit(nn.Module):
    """The score of images in [-1, 1] from a network of images in [0, 1]: score(x, sigma) = F((x + 1) / 2, sigma / 2) / 2."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        return self.net((x + 1) / 2, sigma / 2, **cond) / 2


class Span(nn.Module):
    """A network that is told ``span`` t, where time "thousand_time" says 1000 t."""

    def __init__(self, net: nn.Module, span: float):
        super().__init__()
        self.net, self.factor = net, span / 1000

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.net(x, t * self.factor, **cond)


class Negative(nn.Module):
    """-F: diffusers' "v_prediction" of a network with EDM's preconditioning."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return -self.net(x, t, **cond)


class Boundary(nn.Module):
    """A consistency function, the identity at sigma_min (Song et al. 2023, eq. 5 and app. C), told t = 250 ln(sigma):

    sd^2 / ((sigma - sigma_min)^2 + sd^2) x + (sigma - sigma_min) sd / sqrt(sigma^2 + sd^2) F(x / sqrt(sigma^2 + sd^2), t)
    """

    def __init__(self, net: nn.Module, sigma_min: float, sigma_data: float):
        super().__init__()
        self.net, self.sigma_min, self.sigma_data = net, sigma_min, sigma_data

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        sigma = torch.exp(t.double() / 250).reshape(-1, *[1] * (x.dim() - 1))
        above, sd = sigma - self.sigma_min, self.sigma_data
        scale = (sigma**2 + sd**2).sqrt()
        output = self.net((1 / scale).to(x) * x, t, **cond)
        return (sd**2 / (above**2 + sd**2)).to(x) * x + (above * sd / scale).to(x) * output


def wrap(net: nn.Module, network: dict, adapter: dict | None) -> tuple[nn.Module, dict]:
    """The network within its adapter, with what rebuilds both."""
    if adapter is None:
        return net, network
    options = dict(adapter)
    made = {"unit": Unit, "span": Span, "negative": Negative, "boundary": Boundary}[options.pop("kind")](net, **options)
    return made, {"family": "adapter", "config": adapter | {"network": network}}


def build(config: dict) -> nn.Module:
    adapter = dict(config)
    network = adapter.pop("network")
    net = importlib.import_module(FAMILIES[network["family"]]).build(network["config"])
    return wrap(net, network, adapter)[0]
