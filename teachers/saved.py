"""The file format of models: one safetensors file with the weights and a description that rebuilds the model.

A text-to-image model is saved without its prompts, with the conditions of the empty prompt. Older files hold prompts: as a tensor of their
JSON text, because safetensors limits the description to 100 MB, or in the description.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import files
from distill.denoiser import Denoiser
from distill.guidance import GuidanceRange
from distill.reading import malformed
from distill.sampling import SEARCHED, Sampling
from distill.schedule import Schedule, schedule_from
from distill.source import Source
from teachers import lora, networks, passport
from teachers.codec import Codec
from teachers.conditions import Conditions
from teachers.hub import check_numbers
from teachers.teacher import EMBEDDINGS, Teacher, frozen, require_network

PROMPTS = "record.prompts"  # name of the prompts among the tensors of an older file


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _timed(sampler: dict, steps: Any) -> bool:
    """Return whether a step count of a sampler's description is possible, and so are its own times."""
    times = sampler.get("times", {}).get(str(steps), None if sampler["grid"] == SEARCHED else [0.0] * (steps + 1))
    return _whole(steps, 1, 10**5) and len(times) == steps + 1 and all(math.isfinite(t) for t in times)


# entries of a description -> whether a value is of the right kind
ENTRIES: dict[str, Callable[[Any], bool]] = {
    "network": lambda v: isinstance(v, dict) and isinstance(v.get("config"), dict),
    "schedule": lambda v: isinstance(v, dict),
    "prediction": lambda v: isinstance(v, str),
    "time": lambda v: isinstance(v, str),
    "sigma_data": lambda v: type(v) in (int, float) and 0 < v < 1e6,
    "shape": lambda v: isinstance(v, list),
    "classes": lambda v: v is None or _whole(v, 0, 10**6),
    "null": lambda v: v is None or _whole(v, 0, 10**6),
    "sampler": lambda v: isinstance(v, dict) and all(map(partial(_timed, v), v.get("steps", []))),
    "record": lambda v: isinstance(v, dict),
}


def save(path: Path | str, model: Teacher) -> None:
    """Write a model as one safetensors file, from which `load_file` rebuilds it. A latent model's autoencoder is referred to.

    Raises ValueError for a model without a network, without the description of its network, or with a codec without a source.
    """
    require_network(model)
    if model.network is None:
        raise ValueError("this model cannot be saved: its Teacher has no network description (teachers.custom.wrap gives one)")
    if model.codec is not None and not model.codec.source:
        raise ValueError("this model cannot be saved: its Codec has no source, the folder of its autoencoder")
    if model.embeddings is not None and not model.embeddings.null:
        raise ValueError(
            "this model cannot be saved: nothing was encoded yet, give PIPELINE,prompts=FILE or data with captions"
        )
    description = model.describe()
    if model.distilled:
        description["passport"] = passport.of(model).describe()
    files.save(path, model.tensors(), description)


def load_file(
    path: Path | str,
    net: nn.Module | None = None,
    find: Callable[[str], Teacher] | None = None,
    source: Callable[[dict[str, Any]], Source] | None = None,
) -> Teacher:
    """Load a model that `save` wrote, frozen and on the CPU.

    ``net``: for a model made with `teachers.custom.wrap`, a module of its class. The weights are loaded into it, and it is frozen.
    ``find``: loads the base of a LoRA adapter from its spec; `teachers.load` passes itself.
    ``source``: finds the images that paths start from; None refuses a model that does not start from noise.

    Raises ValueError for any other file, for a file that needs ``net`` and for one that does not.
    """
    path = Path(path)
    tensors, description = files.load(path)
    if "masked" in description:
        raise ValueError(f"{path}: a masked diffusion model of tokens; accepted here are models of E[x0 | x_t] in numbers")
    if "network" not in description:
        raise ValueError(f"{path}: holds no model; it may be the checkpoint of an unfinished run")
    with malformed(path), warnings.catch_warnings(action="ignore"):
        _check(description, tensors)
        return _built(path, tensors, description, net, find, source)


def _built(
    path: Path,
    tensors: dict[str, Tensor],
    description: dict,
    net: nn.Module | None,
    find: Callable[[str], Teacher] | None,
    source: Callable[[dict[str, Any]], Source] | None,
) -> Teacher:
    if "source" in description and source is None:
        raise ValueError(
            f"samples start from images of {str(description['source']['data'])[:80]!r} instead of noise: accepted here are models that start"
            " from noise"
        )
    record = description["record"] | ({"prompts": _decoded(tensors.pop(PROMPTS))} if PROMPTS in tensors else {})
    rows = {name: tensors.pop(EMBEDDINGS + name) for name in description.get("table", [])}
    if rows:
        embeddings = Conditions.of(rows, record.pop("prompts", ()), description.get("encoder_sha256", ""))
    codec = Codec.from_description(description["codec"], path.parent) if "codec" in description else None
    network = description["network"]
    built = lora.build(network["config"], net, find) if network["family"] == "lora" else networks.build(network, net)
    files.load_weights(built, tensors, str(path))
    schedule = schedule_from(description["schedule"])
    return Teacher(
        Denoiser(frozen(built), schedule, description["prediction"], description["time"], description["sigma_data"]),
        tuple(description["shape"]),
        network,
        description["classes"],
        description["null"],
        Sampling.from_description(description["sampler"]),
        record,
        codec,
        embeddings if rows else None,
        GuidanceRange.of(description["guidance"]) if "guidance" in description else None,
        source(description["source"]) if "source" in description and source is not None else None,
    )


def _decoded(text: Tensor) -> list[str]:
    return json.loads(text.numpy().tobytes())


def _check(description: dict, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for an entry of the wrong type, and for a network that its weights cannot fill."""
    for name, fits in ENTRIES.items():
        if not fits(description[name]):
            raise ValueError(f"{name} is {str(description[name])[:40]!r}; this project writes another kind of value")
    if embedded := [
        name for name in description.get("table", []) if tensors[EMBEDDINGS + name].shape[0] != description["classes"] + 1
    ]:
        raise ValueError(
            f"the conditions {embedded[0]!r} have other rows than {description['classes']} classes and the null class"
        )
    check_size(description["network"], tensors)


def check_size(network: dict, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for a description of a network that is much larger than its weights, before it is built."""
    if network["family"] == "adapter":
        return check_size(network["config"]["network"], tensors)
    if network["family"] not in ("unet2d", "stock"):
        return None
    check_numbers(network["config"], "network")
    weights = sum(tensor.numel() for tensor in tensors.values()) + 1024
    if (size := _size_of(json.dumps(network))) > 2 * weights:
        raise ValueError(f"the network has {size:,} weights, and the file holds {weights:,}")
    return None


@lru_cache(maxsize=64)
def _size_of(network: str) -> int:
    """Return the numbers of weights of a description, as JSON. A run loads students of one description dozens of times."""
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in networks.build(json.loads(network)).state_dict().values())


def load_student(path: Path | str, origin: Teacher) -> Teacher:
    """Load a student of ``origin``, with its conditions: into a copy of its network, if that is a module of the user's own or has a LoRA
    adapter. A copy with an adapter shares the weights of its base, and a latent student the autoencoder.
    """
    network, net = origin.network or {}, require_network(origin).net
    while network.get("family") == "adapter":
        network, net = network["config"]["network"], getattr(net, "net")  # noqa: B009 (a submodule)
    given, start = copy.deepcopy(net) if network.get("family") in ("given", "lora") else None, origin.source
    student = load_file(path, given, source=None if start is None else lambda facts: start)
    one, two = student.codec, origin.codec
    if one is not None and two is not None and one.describe() == two.describe():
        student = replace(student, codec=two)
    if student.embeddings is None or origin.embeddings is None or not origin.embeddings.count:
        return student
    return student.with_conditions(origin.embeddings)


@dataclass(frozen=True)
class Stored:
    """Name a student by its file. A finished student then needs no memory until it is measured.

    ``origin``: a model whose network is of the student's class. ``fingerprint``, ``schedule``: those of the student.
    """

    path: Path
    origin: Teacher
    fingerprint: str
    schedule: Schedule

    @property
    def conditions_sha256(self) -> str | None:
        """The sha256 of the table that the student is used with; None for a model that takes no text."""
        return self.origin.conditions_sha256

    @property
    def guidance(self) -> GuidanceRange | None:
        """The guidance scales of the student, if its network takes them."""
        return self.origin.guidance

    def load(self) -> Teacher:
        """Read the student, frozen and on the CPU."""
        return load_student(self.path, self.origin)
