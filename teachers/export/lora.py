"""The adapter of a LoRA student as a file of diffusers, for `load_lora_weights` of its teacher's pipeline, and the scheduler to set there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill.files import FILE_MODE, replacing_folder
from teachers import passport
from teachers.export import deliver, latent
from teachers.hub import fetch
from teachers.lora import is_rounded, merged
from teachers.networks.lora import NAME, Adapted
from teachers.teacher import Teacher, require_network

FOLDER = "lora"


def export_lora(model: Teacher, folder: Path) -> float | None:
    """Write ``folder``/lora: pytorch_lora_weights.safetensors, passport.json, and scheduler/, or scheduler-N/ for a step count N that
    needs its own.

    Returns the largest difference of a pixel between our sampler and the teacher's pipeline with both, and None for a model without an
    adapter. Raises ValueError if the pipeline cannot load one, and RuntimeError if it gives other pixels; the folder is then removed.
    """
    net = require_network(model).net
    if not isinstance(net, Adapted):
        return None
    if model.codec is None or not hasattr(latent.origin(model)[0], "load_lora_weights"):
        name = "pixel-space pipeline" if model.codec is None else latent.origin(model)[0].__name__
        raise ValueError(f"a {name} has no load_lora_weights: the exported pipeline holds the merged weights")
    plain = merged(model.to(torch.device("cpu")))
    deliver.check_exportable(plain)
    home, part, _ = latent.origin(model)
    base = fetch(model.codec.source["folder"], variant := model.codec.source.get("variant"), download=False)
    network = (model.network or {})["config"]["network"]
    differences = []
    with replacing_folder(folder / FOLDER) as aside:
        home.save_lora_weights(aside, **{f"{part}_lora_layers": stock_names(net)})
        for path in aside.iterdir():
            path.chmod(FILE_MODE)
        for pipeline, (steps, only) in latent.pipelines(plain).items():
            scheduler = latent.table_scheduler(plain, steps) if only is None else latent.flow_scheduler(only)
            name = pipeline.replace("pipeline", "scheduler")
            scheduler.save_pretrained(aside / name)
            halved = part if is_rounded(network) else None
            how = {"folder": str(aside.resolve()), "class": type(scheduler).__name__, "scheduler": name, "rounded": halved}
            differences.append(deliver.verify(plain, base, steps, variant, lora=how))
        if model.distilled:
            passport.write(aside / passport.NAME, passport.of(model))
    return max(differences)


def stock_names(net: Adapted) -> dict[str, torch.Tensor]:
    """Return the weights of an adapter by the names that they have in the network of diffusers, contiguous as its files need them."""
    from diffusers import ModelMixin

    modules: Any = net.named_modules()
    prefix = next(name for name, module in modules if isinstance(module, ModelMixin)) + "."
    state = net.state_dict().items()
    return {name.removeprefix(prefix).replace(f".{NAME}.", "."): value.cpu().contiguous() for name, value in state}
