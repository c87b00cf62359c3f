"""Count the collective calls of torch.distributed, and their bytes. Those that DDP makes from C++ are among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()
        self.bytes: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            self.calls[name] += 1
            self.bytes[name] += max(sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, Tensor)) for arg in args)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[_Collectives]:
    """Yield ``calls`` and ``bytes`` of the block, by name. Bytes are those of the whole tensor: gathered, or before its reduction."""
    with _Collectives() as found:
        yield found
