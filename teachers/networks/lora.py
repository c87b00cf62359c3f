"""Low-rank adapters (LoRA, Hu et al. 2106.09685): W becomes W + B A, with A [rank, in] and B [out, rank], B = 0 at the start."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from teachers.networks.adapters import Rounded

NAME = "default"  # of the adapter, as peft calls it
ALL, ATTENTION = "all", "attention"  # as targets: every layer that can have an adapter, or these
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "qkv")


class Adapted(nn.Module):
    """Hold a network with a LoRA adapter around weights that never change, the base.

    The modules are copies, the weights are those of ``base`` itself: it stays as it is, and its memory is used once. Copies of this
    module share the base too. The state dict holds the adapter alone, and `requires_grad_` reaches the adapter alone.

    ``targets``: names of linear layers and 2-d convolutions, or the ends of names after a dot, see `targets_of`. ``seed``: of A.
    Raises ValueError for a target that no layer has.
    """

    def __init__(self, base: nn.Module, rank: int, targets: Sequence[str], seed: int = 0):
        super().__init__()
        self.net = _sharing(base).requires_grad_(False)
        peft = _peft()
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=_matching(base, targets))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, self.net, adapter_name=NAME)
        for weight in self.adapter():
            weight.data = weight.data.float()
        self.register_state_dict_post_hook(_adapter_only)
        self.register_load_state_dict_post_hook(_base_is_there)

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.net(x, t, **cond)

    def adapter(self) -> Iterator[nn.Parameter]:
        """Yield the weights of the adapter."""
        yield from (weight for name, weight in self.named_parameters() if is_adapter(name))

    def requires_grad_(self, requires_grad: bool = True) -> Adapted:
        for weight in self.adapter():
            weight.requires_grad_(requires_grad)
        return self

    def __deepcopy__(self, memo: dict) -> Adapted:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        memo |= {id(weight): weight for name, weight in self.named_parameters() if not is_adapter(name)}
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def merged(self) -> nn.Module:
        """Return the base with W + B A in place of W, in float32, as a network of its own. Layers without an adapter are shared."""
        net = copy.deepcopy(self).net
        for name, layer in list(net.named_modules()):
            if hasattr(layer, "lora_A"):
                inner: Any = copy.deepcopy(layer.base_layer).float()
                inner.weight.data += layer.get_delta_weight(NAME).float()  # type: ignore[operator]
                net.set_submodule(name, inner)
        return (copy.deepcopy(net.net).float() if isinstance(net, Rounded) else net).requires_grad_(False)


def is_adapter(name: str) -> bool:
    """Return whether this is the name of a weight of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def targets_of(net: nn.Module, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Return the targets of an adapter of this network: ``wanted``, or all layers. ("all",) and ("attention",) name groups of layers.

    Raises ValueError, with the names that there are, where no layer has a name of ``wanted``, or none is an attention projection.
    """
    names = [name for name, _ in _layers(net)]
    if wanted is None or tuple(wanted) == (ALL,):
        return tuple(_ends_of(names))
    group = tuple(wanted) == (ATTENTION,)
    found = tuple(target for target in (PROJECTIONS if group else wanted) if any(_ends(name, target) for name in names))
    if not found or len(found) < len(wanted):
        missing = next((target for target in wanted if target not in found), ATTENTION)
        raise ValueError(
            f"--lora-targets {missing}: no layer has this name; there are {', '.join(_ends_of(names))}, or {ALL} or {ATTENTION} by itself"
        )
    return found


def _ends_of(names: list[str]) -> list[str]:
    """Return the last words of names, without numbers alone."""
    return sorted(
        {".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:]) for parts in (name.split(".") for name in names)}
    )


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _layers(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that can have an adapter: linear ones and convolutions without groups, which a low rank does not split."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            yield name, module


def _matching(net: nn.Module, targets: Sequence[str]) -> list[str]:
    targets = targets_of(net, targets)
    return [name for name, _ in _layers(net) if any(_ends(name, target) for target in targets)]


def _sharing(net: nn.Module) -> nn.Module:
    """Return a copy of the modules of a network around its own weights."""
    return copy.deepcopy(net, {id(weight): weight for weight in net.parameters()})


def _adapter_only(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    for name in [name for name in state if name.startswith(prefix) and not is_adapter(name)]:
        del state[name]


def _base_is_there(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if is_adapter(name)]


def _peft() -> Any:
    """Import peft. Raises ValueError where it is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("LoRA needs the package peft: pip install 'fewstep[lora]', or leave --lora-rank out")
    import peft

    return peft
