"""Memorisation: the distance of generated images to real ones, relative to distances among real images."""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES = 2000  # images per search for neighbours; medians and quantiles need no more


def nearest(queries: Tensor, keys: Tensor, own: bool = False) -> tuple[Tensor, Tensor]:
    """Return the distance [Q] of each query [Q, D] to the nearest key [K, D], and the index [Q] of that key.

    ``own``: query i is key i and is not its own neighbour.
    """
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
    """Return two measures from features [N, D] of generated and of real images.

    ``nearest_real``: median distance to the nearest real image over the same median among real images; 1 for fresh images.
    ``copies``: fraction of generated images closer to a real one than the closest 1 % of real images are to each other; 0.01
    for fresh images.
    """
    to_real, _ = nearest(generated[:QUERIES], real)
    among, _ = nearest(real[:QUERIES], real, own=True)
    return {
        "nearest_real": (to_real.median() / among.median()).item(),
        "copies": (to_real < among.quantile(0.01)).float().mean().item(),
    }
