"""The file format of models: one safetensors file with the weights and a description that rebuilds the model.

Prompts are a tensor of their JSON text, because safetensors limits the description to 100 MB. Older files have them in the description.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from distill import files
from distill.denoiser import Denoiser
from distill.sampling import Sampling
from distill.schedule import schedule_from
from teachers import networks
from teachers.codec import Codec
from teachers.teacher import EMBEDDINGS, Teacher, frozen, require_network

PROMPTS = "record.prompts"  # name of the prompts among the tensors of a file


def save(path: Path | str, model: Teacher) -> None:
    """Write a model as one safetensors file, from which `load_file` rebuilds it. A latent model's autoencoder is referred to.

    Raises ValueError for a model without a network, without the description of its network, or with a codec without a source.
    """
    require_network(model)
    if model.network is None:
        raise ValueError("this model cannot be saved: its Teacher has no network description (teachers.custom.wrap gives one)")
    if model.codec is not None and not model.codec.source:
        raise ValueError("this model cannot be saved: its Codec has no source, the folder of its autoencoder")
    tensors, description = model.tensors(), model.describe()
    if "prompts" in model.record:
        tensors |= {PROMPTS: _encoded(model.record["prompts"])}
        description["record"] = {key: value for key, value in model.record.items() if key != "prompts"}
    files.save(path, tensors, description)


def load_file(path: Path | str, net: nn.Module | None = None) -> Teacher:
    """Load a model that `save` wrote, frozen and on the CPU.

    ``net``: for a model made with `teachers.custom.wrap`, a module of its class. The weights are loaded into it, and it is frozen.

    Raises ValueError for any other file, for a file that needs ``net`` and for one that does not.
    """
    path = Path(path)
    tensors, description = files.load(path)
    if "network" not in description:
        raise ValueError(f"{path}: holds no model; it may be the checkpoint of an unfinished run")
    record = description["record"] | ({"prompts": _decoded(tensors.pop(PROMPTS))} if PROMPTS in tensors else {})
    embeddings = {name: tensors.pop(EMBEDDINGS + name) for name in description.get("table", [])}
    codec = Codec.from_description(description["codec"], path.parent) if "codec" in description else None
    try:
        built = networks.build(description["network"], net)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    files.load_weights(built, tensors, str(path))
    schedule = schedule_from(description["schedule"])
    return Teacher(
        Denoiser(frozen(built), schedule, description["prediction"], description["time"], description["sigma_data"]),
        tuple(description["shape"]),
        description["network"],
        description["classes"],
        description["null"],
        Sampling.from_description(description["sampler"]),
        record,
        codec,
        embeddings or None,
    )


def _encoded(data: list[str]) -> Tensor:
    """Return JSON data as the bytes of its text, uint8 [N]."""
    return torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8)


def _decoded(text: Tensor) -> list[str]:
    return json.loads(text.numpy().tobytes())


def load_student(path: Path | str, origin: Teacher) -> Teacher:
    """Load a student of ``origin``; into a copy of its network, if that is a module of the user's own."""
    network, net = origin.network or {}, require_network(origin).net
    while network.get("family") == "adapter":
        network, net = network["config"]["network"], getattr(net, "net")  # noqa: B009 (a submodule)
    return load_file(path, copy.deepcopy(net) if network.get("family") == "given" else None)
