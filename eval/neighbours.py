"""Memorisation: how near generated images lie to the real ones, measured by how near the real ones lie to each other."""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES = 2000  # images whose neighbours are sought; the medians and quantiles need no more


def nearest(queries: Tensor, keys: Tensor, own: bool = False) -> tuple[Tensor, Tensor]:
    """Distance [Q] of each query to the nearest key, and which key that is [Q]. ``own``: query i is key i, which does not count."""
    distances, which = [], []
    for begin in range(0, len(queries), 256):
        distance = torch.cdist(queries[begin : begin + 256], keys, compute_mode="donot_use_mm_for_euclid_dist")
        if own:
            rows = torch.arange(len(distance))
            distance[rows, begin + rows] = torch.inf
        value, index = distance.min(1)
        distances.append(value)
        which.append(index)
    return torch.cat(distances), torch.cat(which)


def memorisation(generated: Tensor, real: Tensor) -> dict[str, float]:
    """``nearest_real``: the median distance to the nearest real image over the same median among real images, 1 for fresh ones.

    ``copies``: the part of generated images nearer to a real one than the nearest 1 % of real images are to each other, 0.01
    for fresh ones; a model that repeats its data has much more.
    """
    theirs, _ = nearest(generated[:QUERIES], real)
    among, _ = nearest(real[:QUERIES], real, own=True)
    return {
        "nearest_real": (theirs.median() / among.median()).item(),
        "copies": (theirs < among.quantile(0.01)).float().mean().item(),
    }
