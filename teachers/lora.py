"""Models with a LoRA adapter: made of a teacher, read from a file that holds the adapter alone, and merged.

The network's description is {"family": "lora", "config": {"rank", "targets", "network", "source", "sha256"}}: the description of the base,
where it is, and the sha256 of its weights. A source is {"folder", and perhaps "variant" and a fused "lora"} of a pipeline or {"spec"} of
any other model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from distill import files
from teachers import fused_lora, networks
from teachers.hub import component, fetch, read_json, variant_of
from teachers.networks import adapters
from teachers.networks.lora import Adapted, targets_of
from teachers.teacher import Teacher, frozen, require_network

MOST = 1024  # the largest rank


def with_adapter(model: Teacher, spec: str, rank: int, targets: Sequence[str] | None = None, seed: int = 0) -> Teacher:
    """Return the model with a new adapter, which at first changes nothing. Both share the weights of the model.

    ``spec``: from which the model was loaded. ``rank``, ``targets``, ``seed``: as in `Adapted`. A model that has an adapter is returned as
    it is. Raises ValueError for a model without a network, for targets that it lacks, and for an adapter of another rank or other targets.
    """
    denoiser = require_network(model)
    if isinstance(denoiser.net, Adapted):
        mine = (model.network or {})["config"]
        if rank != mine["rank"] or (targets and sorted(targets) != sorted(mine["targets"])):
            kept = ", ".join(mine["targets"])
            raise ValueError(
                f"the teacher has an adapter of rank {mine['rank']} on {kept}: accepted are these, or no --lora-rank"
            )
        return model
    found = targets_of(denoiser.net, targets)
    source = {"rank": rank, "targets": list(found), "network": model.network, "source": _source_of(model, spec)}
    config = source | {"sha256": "" if model.hollow else files.weights_sha256(denoiser.net.state_dict())}
    adapted = frozen(Adapted(denoiser.net, rank, found, seed))
    return replace(model, denoiser=replace(denoiser, net=adapted), network={"family": "lora", "config": config})


def rounded(model: Teacher) -> Teacher:
    """Return the model with its weights rounded to bfloat16, in place: half of the memory of float32."""
    net, network = adapters.wrap(require_network(model).net, model.network or {}, {"kind": "rounded"})
    return replace(model, denoiser=replace(model.parametric, net=frozen(net)), network=network)


def merged(model: Teacher) -> Teacher:
    """Return the model without an adapter: with W + B A in place of W, in float32; unchanged without one."""
    net = getattr(model.denoiser, "net", None)
    if not isinstance(net, Adapted):
        return model
    network = (model.network or {})["config"]["network"]
    plain = network["config"]["network"] if is_rounded(network) else network
    return replace(model, denoiser=replace(model.parametric, net=frozen(net.merged())), network=plain)


def bare(model: Teacher) -> Teacher:
    """Return the model with the network that its adapter lies on; unchanged without one. Nothing is copied."""
    net = getattr(model.denoiser, "net", None)
    if not isinstance(net, Adapted):
        return model
    inner: Any = net.net
    return replace(model, denoiser=replace(model.parametric, net=inner.net if isinstance(inner, adapters.Rounded) else inner))


def build(config: dict, given: nn.Module | None, find: Callable[[str], Teacher] | None) -> nn.Module:
    """Build the network of a description: find the base, and put a new adapter on it.

    ``given``: the base, a module of the user's own inside it, or a network with this adapter, which is returned. ``find``: loads a model
    from its spec. Raises ValueError where the base is not at its source, or has changed.
    """
    if isinstance(given, Adapted):
        return given
    if not (type(config["rank"]) is int and 1 <= config["rank"] <= MOST):
        raise ValueError(f"a LoRA adapter of rank {str(config['rank'])[:20]}: accepted are 1 to {MOST}")
    if given is None:
        base = _base(config["network"], config["source"], find)
    else:
        base = networks.build(config["network"], given) if _innermost(config["network"])["family"] == "given" else given
    if files.weights_sha256(base.state_dict()) != config["sha256"]:
        where = next(iter(config["source"].values()))
        raise ValueError(f"{where}: its weights are not those that this LoRA adapter was trained on")
    return Adapted(base, config["rank"], config["targets"])


def _base(network: dict, source: dict, find: Callable[[str], Teacher] | None) -> nn.Module:
    if is_rounded(network):
        return adapters.wrap(_base(network["config"]["network"], source, find), network, {"kind": "rounded"})[0]
    if "folder" in source:
        folder, variant = fetch(source["folder"], source.get("variant"), download=False), source.get("variant")
        part, name = network_of(folder)
        found = component(folder, part, name, str(folder), variant_of(folder / part, variant, str(folder)))
        if "lora" in source:
            index = read_json(folder / "model_index.json", "no diffusers pipeline")
            fused_lora.fuse(source["lora"], found, str(index["_class_name"]), folder, index, part)
        return networks.around(network, found)
    if find is None:
        raise ValueError(
            f"{source['spec']}: the base of a LoRA adapter is a model without one, found by teachers.load or given as net="
        )
    return require_network(find(source["spec"])).net


def network_of(folder: Path) -> tuple[str, str]:
    """Return the component name and the class of the network of a pipeline."""
    index = read_json(folder / "model_index.json", "no diffusers pipeline")
    part = "unet" if "unet" in index else "transformer"
    return part, index[part][1]


def _source_of(model: Teacher, spec: str) -> dict[str, Any]:
    """Return where the network of a model is: a latent pipeline by its folder, because its spec may need prompts."""
    if model.codec is not None and "source" in model.record:
        fused = {"lora": str(Path(model.record["lora"]).resolve())} if "lora" in model.record else {}
        return {key: model.codec.source[key] for key in ("folder", "variant") if key in model.codec.source} | fused
    return {"spec": str(Path(spec).resolve()) if Path(spec).exists() else spec}


def _innermost(network: dict) -> dict:
    return _innermost(network["config"]["network"]) if network["family"] == "adapter" else network


def is_rounded(network: dict) -> bool:
    """Return whether a description is that of a network in bfloat16 (`rounded`)."""
    return network["family"] == "adapter" and network["config"]["kind"] == "rounded"
