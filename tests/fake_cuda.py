"""A pretended CUDA device, for machines without one: its tensors are CPU tensors whose storage is registered as the device's.

Values are real; what CUDA would do with the same calls is checked and counted, with file and line of the project:

    mixed devices   an operator on tensors of both devices raises; CUDA's exceptions are let through: 0-dim CPU tensors in pointwise
                    operators, and CPU indices of a device tensor, which are copied
    syncs           the host waits for the device: item, nonzero, masks as indices, copies to the host, copies from it that block, events
    late copies     copies to the host that do not block hold garbage until the host has waited for them
    pageable        copies to the device from memory that is not pinned
    launches        operators on the device that are neither views nor allocations: "network" in the forward and backward passes of
                    watched networks, "outside" elsewhere

    with FakeCuda() as gpu:
        gpu.watch(net.to("cuda"))
        ...
    gpu.syncs, gpu.pageable, gpu.launches      # Counters of (what, "file:line function"), and of (where, operator, line)

A device tensor is known by its storage, so views, in-place operators and functorch need no code here. C++ sees CPU tensors; backward
therefore runs in the calling thread, and autocast is the CPU's.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = str(Path(__file__).parent.parent)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "bincount",
    "repeat_interleave",
    "_linalg_",
    "linalg_eigh",
    "linalg_cholesky_ex",
    "linalg_inv_ex",
)
ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put")
HOST_SCALARS = (
    "where",
    "lerp",
    "masked_fill",
    "clamp",
    "fill",
)  # operators without the pointwise tag that take a 0-dim CPU tensor


class MixedDevices(RuntimeError):
    """What CUDA raises for tensors on two devices."""


def _plain(x: Tensor) -> Tensor:
    """Return the tensor inside the wrappers of jvp and grad."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def _storage(x: Tensor) -> Any:
    return _plain(x).untyped_storage()


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


class _Generator(torch._C.Generator):
    """A generator of either device. Numbers of the pretended one come from a CPU generator."""

    def __new__(cls, device: Any = "cpu"):
        self = super().__new__(cls, "cpu")
        self.where = CUDA if _is_cuda(device) else CPU
        return self

    device = property(lambda self: self.where)


class FakeCuda:
    """See the module. ``syncs``, ``pageable`` and ``launches`` grow until `reset`."""

    def __init__(self) -> None:
        self.syncs: Counter = Counter()
        self.pageable: Counter = Counter()
        self.launches: Counter = Counter()
        self._device: dict[int, StorageWeakRef] = {}
        self._pinned: dict[int, StorageWeakRef] = {}
        self._depth = 0  # of watched networks that are running
        self._started = 0  # number of the first autograd node of the forward pass that is running
        self._nodes: list[range] = []  # numbers of the autograd nodes of watched networks
        self._creating = False
        self._arriving: deque[tuple[Tensor, Tensor]] = deque()  # host tensors of copies that do not block, and their values
        self._arrived = 0
        self._crossing: tuple[str, bool] | None = None  # the device that a copy goes to, and whether the host waits for it
        self._stack = ExitStack()

    def reset(self) -> None:
        for counter in (self.syncs, self.pageable, self.launches):
            counter.clear()

    def total(self, where: str) -> int:
        """Return the launches "network" or "outside"."""
        return sum(count for (place, *_), count in self.launches.items() if place == where)

    def watch(self, *nets: nn.Module) -> None:
        """Count the launches of these networks, and of their backward passes, as "network"."""

        def enter(*_: Any) -> None:
            if not self._depth:
                self._started = torch.autograd._get_sequence_nr()
            self._depth += 1

        def leave(*_: Any) -> None:
            self._depth -= 1
            if not self._depth:
                self._nodes.append(range(self._started, torch.autograd._get_sequence_nr()))

        for net in nets:
            net.register_forward_pre_hook(enter, prepend=True)
            net.register_forward_hook(leave, always_call=True)

    def __enter__(self) -> FakeCuda:
        for target, name, value in (
            (torch, "Generator", _Generator),
            (torch.autocast, "__init__", _cpu_autocast(torch.autocast.__init__)),
            (torch._C, "_group_tensors_by_device_and_dtype", self._grouped(torch._C._group_tensors_by_device_and_dtype)),
            *((torch.optim.Optimizer, name, lambda self: None) for name in dir(torch.optim.Optimizer) if name.endswith("_health_check")),
            *((torch.cuda, name, value) for name, value in self._driver().items()),
        ):  # fmt: skip
            self._stack.enter_context(mock.patch.object(target, name, value))
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _driver(self) -> dict[str, Any]:
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "is_bf16_supported": lambda *_, **__: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_name": lambda *_: "a pretended GPU",
            "get_device_capability": lambda *_: (9, 0),
            "max_memory_allocated": lambda *_: 0,
            "mem_get_info": lambda *_: (2**30, 2**30),
            "empty_cache": lambda: None,
            "manual_seed": lambda seed: None,
            "manual_seed_all": lambda seed: None,
            "get_rng_state": lambda *_: torch.get_rng_state(),
            "set_rng_state": lambda state, *_: torch.set_rng_state(state),
            "synchronize": lambda *_: self._wait("synchronize"),
            "current_stream": lambda *_: SimpleNamespace(record_event=self._record_event),
        }

    def _wait(self, what: str, copies: int | None = None) -> None:
        """Count a wait for all that is queued, or for the first ``copies`` of all to the host, which then arrive."""
        self._count(self.syncs, what)
        with torch.utils._python_dispatch._disable_current_modes():
            while self._arriving and (copies is None or self._arrived < copies):
                tensor, values = self._arriving.popleft()
                tensor.copy_(values)
                self._arrived += 1

    def _record_event(self) -> SimpleNamespace:
        return SimpleNamespace(synchronize=partial(self._wait, "event", self._arrived + len(self._arriving)))

    # -- where a tensor is ---------------------------------------------------------------------------------------------------------
    def holds(self, x: Tensor) -> bool:
        return _storage(x)._cdata in self._device

    def _register(self, x: Tensor, registry: dict[int, StorageWeakRef]) -> Tensor:
        storage = _storage(x)
        registry[storage._cdata] = StorageWeakRef(storage)  # which also keeps the address from being used again
        return x

    def _count(self, counter: Counter, what: str) -> None:
        counter[what, _line()] += 1

    def _grouped(self, group: Any) -> Any:
        def grouped(lists: Any, with_indices: bool = False) -> Any:
            found = group(lists, with_indices)
            return {(CUDA if self.holds(lists[0][0]) else CPU, kind): value for (_, kind), value in found.items()}

        return grouped

    # -- functions: what C++ decides by the device before it calls an operator ---------------------------------------------------------
    def function(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        on_device = isinstance(first, Tensor) and self.holds(first)
        if name == "__get__":
            known = {Tensor.device.__get__: CUDA, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}  # type: ignore
            return known[func] if on_device and func in known else func(*args, **kwargs)
        if name in ("to", "cuda", "cpu") and isinstance(first, Tensor):
            return self._to(name, *args, **kwargs)
        if name == "pin_memory":
            copy = torch.empty_strided(first.size(), first.stride(), dtype=first.dtype).copy_(first)  # type: ignore[union-attr]
            return self._register(copy, self._pinned)  # raises for rows that share memory, as the real one does
        if kwargs.pop("pin_memory", False):
            return self._register(func(*args, **kwargs), self._pinned)
        if name == "get_device" and on_device:
            return 0
        if name in ("numpy", "__array__") and on_device:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if name == "tolist" and on_device:
            self._wait("tolist")
            with torch.utils._python_dispatch._disable_current_modes():
                return func(*args, **kwargs)
        wanted = kwargs.get("device")
        if name in ("tensor", "as_tensor", "asarray", "new_tensor") and (_is_cuda(wanted) or (wanted is None and on_device)):
            made = func(*args, **{key: value for key, value in kwargs.items() if key != "device"})
            if name != "new_tensor":
                return self._to("to", made, CUDA)
            self._device.pop(_storage(made)._cdata, None)
            return self._to("to", made, CUDA)
        on_device = _is_cuda(wanted) or (wanted is None and any(map(self.holds, _tensors(args, kwargs))))
        if (generator := kwargs.get("generator")) is not None and (generator.device.type == "cuda") != on_device:
            raise MixedDevices(
                f"Expected a generator on {'cuda' if on_device else 'cpu'}, found {generator.device} at {_line()}"
            )
        before, self._creating = self._creating, on_device  # also what C++ makes on the way, such as zero tangents
        try:
            return func(*args, **(kwargs | {"device": CPU} if _is_cuda(wanted) else kwargs))
        finally:
            self._creating = before

    def _to(self, name: str, x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        here = CUDA if self.holds(x) else CPU
        if name != "to":
            there, dtype, waits, form = torch.device(name), None, True, None
        elif args and isinstance(args[0], Tensor):
            there, dtype, waits, form = (
                CUDA if self.holds(args[0]) else CPU,
                args[0].dtype,
                not kwargs.get("non_blocking"),
                None,
            )
        else:
            there, dtype, non_blocking, form = torch._C._nn._parse_to(*args, **kwargs)
            waits = not non_blocking
        crosses = there is not None and there.type != here.type
        before, self._crossing = self._crossing, (there.type, waits) if crosses else None
        try:
            return x.to(dtype=dtype or x.dtype, copy=copy or crosses, memory_format=form or torch.preserve_format)
        finally:
            self._crossing = before

    def _cross(self, out: Tensor, source: Tensor, there: str, waits: bool) -> Tensor:
        if there == "cuda":
            self._copied(source, waits)
            return self._register(out, self._device)
        if waits:
            self._wait("copy to the host")
            return out
        with torch.utils._python_dispatch._disable_current_modes():
            self._arriving.append((out, out.clone()))
            return out.fill_(torch.nan if out.is_floating_point() else 99)

    def _copied(self, source: Tensor, waits: bool) -> None:
        """Count a copy to the device."""
        self.launches[self._place(), "copy", _line()] += 1
        if waits:
            self._wait("copy that blocks")
        if _storage(source)._cdata not in self._pinned:
            self._count(self.pageable, "copy")

    # -- operators -----------------------------------------------------------------------------------------------------------------
    def operator(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name, tensors = func.overloadpacket.__name__, _tensors(args, kwargs)
        if self._crossing is not None and name in ("_to_copy", "clone"):  # of a value, and of its tangent in forward mode
            return self._cross(func(*args, **kwargs), tensors[0], *self._crossing)
        device = [x for x in tensors if self.holds(x)]
        hosts = [x for x in tensors if not (self.holds(x) or torch._is_zerotensor(x))]  # zero tangents have no device here
        if name.rstrip("_") == "copy":
            self._check_copy(args, kwargs)
        elif device and hosts:
            self._check_mixed(func, name, args, hosts)
        if device and (name.startswith(WAITING) or (name in INDEXING and _has_mask(args[1]))):
            self._wait(name)
        before = {_storage(x)._cdata for x in tensors}
        out = func(*args, **kwargs)
        if device or (self._creating and not tensors):
            fresh = [x for x in _tensors(out) if _storage(x)._cdata not in before]
            for x in fresh if name.rstrip("_") != "copy" else []:
                self._register(x, self._device)
            if (fresh or func._schema.is_mutable) and name not in ALLOCATING:
                self.launches[self._place(), name, _line()] += 1
        return out

    def _place(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return "network" if self._depth else "outside"
        number = node._sequence_nr()
        return "network" if number > 2**62 or any(number in nodes for nodes in self._nodes[-64:]) else "outside"

    def _check_copy(self, args: tuple, kwargs: dict) -> None:
        into, source = map(self.holds, args[:2])
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if source and not into:
            self._wait("copy to the host")
        elif into and not source:
            self._copied(args[1], waits)

    def _check_mixed(self, func: Any, name: str, args: tuple, hosts: list[Tensor]) -> None:
        scalars = all(x.dim() == 0 for x in hosts)
        if name in INDEXING and self.holds(args[0]) and (len(args) < 3 or self.holds(args[2]) or args[2].dim() == 0):
            self._copied(hosts[0], True)
        elif not (scalars and (torch.Tag.pointwise in func.tags or name.rstrip("_") in HOST_SCALARS)) or self._into_host(
            name, args
        ):
            shapes = ", ".join(f"{'cuda' if self.holds(x) else 'cpu'} {tuple(x.shape)}" for x in _tensors(args))
            raise MixedDevices(f"{func}: expected all tensors on one device, found {shapes} at {_line()}")

    def _into_host(self, name: str, args: tuple) -> bool:
        return name.endswith("_") and isinstance(args[0], Tensor) and not self.holds(args[0])


def _has_mask(indices: Any) -> bool:
    return any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(indices))


def _line() -> str:
    """Return "file:line function" of the innermost frame of the project, outside of this file."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and name != __file__:
            return f"{name[len(ROOT) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def _cpu_autocast(init: Any) -> Any:
    def of_the_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, "cpu", *args, **kwargs)

    return of_the_cpu


class _Functions(TorchFunctionMode):
    def __init__(self, gpu: FakeCuda):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.gpu.function(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    def __init__(self, gpu: FakeCuda):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunction():
            if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
                with self:  # inference mode leaves these whole
                    out = func.decompose(*args, **(kwargs or {}))
                if out is not NotImplemented:
                    return out
            if func.namespace == "prims":  # shapes of zero tangents
                return func(*args, **(kwargs or {}))
            return self.gpu.operator(func, args, kwargs or {})
