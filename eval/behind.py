"""Results of a GPU, one chunk behind: the host waits for those of a chunk when the work on the next one is queued."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

Results = TypeVar("Results")  # a dataclass, some of whose fields are tensors


def one_behind(chunks: Iterable[Results]) -> Iterator[Results]:
    """Yield each of ``chunks`` with its tensors on the CPU. Those of a GPU come after the next chunk has been taken.

    Their copies to pinned memory are queued behind the work that makes them. The host then waits for these copies alone, while the
    GPU works on the next chunk. Results on the CPU are yielded directly.
    """
    last: Callable[[], Results] | None = None
    for results in chunks:
        arrived = _queued(results)
        if arrived is None:
            yield results
            continue
        if last is not None:
            yield last()
        last = arrived
    if last is not None:
        yield last()


def _queued(results: Results) -> Callable[[], Results] | None:
    """Queue the copies of a GPU's tensors. Return the function that waits for them and returns them; None without such tensors.

    What it returns is not pinned, so that the next chunks use the same pinned memory.
    """
    values = {field.name: getattr(results, field.name) for field in fields(results)}  # type: ignore[arg-type]
    there = {name: x for name, x in values.items() if isinstance(x, Tensor) and x.is_cuda}
    if not there:
        return None
    pinned = {name: x.to("cpu", non_blocking=True) for name, x in there.items()}
    event = torch.cuda.current_stream(next(iter(there.values())).device).record_event()

    def arrived() -> Results:
        event.synchronize()
        return replace(results, **{name: x.clone() for name, x in pinned.items()})  # type: ignore[type-var]

    return arrived
