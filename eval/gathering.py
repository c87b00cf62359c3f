"""Rows of all processes, gathered as tensors: pickled objects would be copied several times on their way."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from torch import Tensor


def gather_rows(parts: list[Tensor]) -> Tensor | None:
    """Return the rows [n, ...] of the parts of all processes, in the order of the processes, on the CPU. None if there are none.

    A collective call. A process without parts takes part. Only shapes and types go as objects.
    """
    mine = torch.cat(parts) if parts else None
    facts = gather_object([None if mine is None else (tuple(mine.shape), mine.dtype)])
    known = [fact for fact in facts if fact is not None]
    if len(facts) == 1 or not known:
        return None if mine is None else mine.cpu()
    (_, *shape), dtype = known[0]
    counts = [0 if fact is None else fact[0][0] for fact in facts]
    padded = torch.zeros(max(counts), *shape, dtype=dtype, device=PartialState().device)
    if mine is not None:
        padded[: len(mine)] = mine
    everything = gather(padded).cpu().split(max(counts))
    return torch.cat([rows[:count] for rows, count in zip(everything, counts, strict=True)])
