"""One call of a user's own network when it is loaded, so that a call that does not fit is refused before anything else is done."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import TIMES, Denoiser
from teachers.hub import first_line
from teachers.networks import adapters
from teachers.teacher import frozen


@torch.no_grad()
def fitted(denoiser: Denoiser, network: dict, shape: tuple[int, ...], classes: int | None, what: str) -> tuple[Denoiser, dict]:
    """Call the network of a denoiser once, as the denoiser calls it, on a few samples of zeros at t_min.

    ``network``: the description of the network. ``shape``: of one sample. ``classes``: as in `Teacher`; without them, no labels are
    passed. ``what``: begins an error. Returns the denoiser and the description; if the network returns twice the channels, with an
    adapter that drops the second half, a learned variance.

    Raises ValueError, in one line, if the call fails or returns anything else.
    """
    batch = next(n for n in count(2) if n not in shape)  # a time that broadcasts along another axis then fails
    like = next(chain(denoiser.net.parameters(), denoiser.net.buffers()), torch.empty(0))
    x = torch.zeros(batch, *shape, device=like.device)
    t = denoiser.schedule.ends()[1].to(like.device)
    cond: dict[str, Any] = {} if classes is None else {"labels": torch.zeros(batch, dtype=torch.long, device=like.device)}
    try:
        output = denoiser.net(x, TIMES[denoiser.time](denoiser.schedule, t).to(x).expand(batch), **cond)
        reason = "" if isinstance(output, Tensor) else f"it returns a {type(output).__name__}"
    except Exception as error:  # a network may raise any type
        reason = f"{type(error).__name__}: {first_line(error)[:64]}"
    if not reason and output.shape == (batch, 2 * shape[0], *shape[1:]):
        net, network = adapters.wrap(denoiser.net, network, {"kind": "mean"})
        return replace(denoiser, net=frozen(net)), network
    if reason or output.shape != x.shape:
        size, labels = ", ".join(map(str, shape)), len(cond)
        raise ValueError(
            f"{what} does not fit its call net(x [B, {size}], t [B]{', labels=[B]' * labels}): "
            f"{reason or f'it returns {list(output.shape)}, not {list(x.shape)}'}; "
            f"use order=t,x, labels_as=NAME, or def forward(self, x, t{', labels' * labels}): return self.net(...)"
        )
    return denoiser, network
