"""teachers.load(spec) -> Teacher, one table of what a spec can be, and the file format students are written in."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from distill import checkpoint
from distill.denoiser import Denoiser, DenoiserLike, Guided
from distill.grid import GRIDS
from distill.schedule import describe, schedule_from
from teachers.codec import Codec

ACCEPTED = (
    "'digits', a .safetensors file of this project, a diffusers pipeline folder or hub id (owner/name), "
    "'PIPELINE,prompts=FILE' for one that takes text, "
    "'package.module:factory,schedule=...,prediction=...', 'experts:SPEC|SPEC,logsnr=NUMBER', "
    "'guided:FILE,size=SIDE,head_channels=WIDTH', 'oracle:gaussian', 'oracle:mixture' or 'oracle:digits'"
)

# network family -> module with build(config) -> nn.Module called as (x, c_noise, **cond)
FAMILIES = {
    "unet2d": "teachers.unet",
    "stock": "teachers.stock",
    "adapter": "teachers.adapter",
    "module": "teachers.module",
}
TABLE = "table."  # before the names of a prompts' table in a file, beside the network's weights


@dataclass(frozen=True)
class Teacher:
    """A trained model: its denoiser, the shape of one sample, how it is conditioned, and where it comes from.

    ``network``: what rebuilds the network ({"family": ..., "config": ...}), None for oracles. ``classes``: class labels
    0..classes-1, None without labels; ``null``: the label that stands for none. ``sampler``: what a distilled student was made
    for ({"name", "grid", "steps"} and perhaps "times", those of each step count), empty for a model that takes any. ``record``:
    method and provenance, as saved. ``codec``: what turns the latents of a latent model into images. ``table``: what the network
    of a text model is told for each of its classes, which are prompts, and for none: {name: [classes + 1, ...]}.
    """

    denoiser: DenoiserLike
    shape: tuple[int, ...]
    network: dict | None = None
    classes: int | None = None
    null: int | None = None
    sampler: dict = field(default_factory=dict)
    record: dict = field(default_factory=dict)
    codec: Codec | None = None
    table: dict[str, Tensor] | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one image, which for a latent model is not `shape`."""
        return self.shape if self.codec is None else tuple(self.decode(torch.zeros(1, *self.shape)).shape[1:])

    def decode(self, x0: Tensor) -> Tensor:
        """Images in [-1, 1] from what the denoiser works on."""
        return x0 if self.codec is None else self.codec.decode(x0)

    @property
    def parametric(self) -> Denoiser:
        """The denoiser as a network. ValueError for an oracle, which has none to copy, train or save."""
        if not isinstance(self.denoiser, Denoiser):
            raise ValueError(
                "an oracle has no network, and experts have several: a model of one network with weights is needed here"
            )
        return self.denoiser

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what the model computes with: weights and description, or an oracle's definition."""
        if not isinstance(self.denoiser, Denoiser):
            return hashlib.sha256(repr((self.record, self.denoiser)).encode()).hexdigest()
        facts = {k: v for k, v in self.describe().items() if k not in ("record", "codec")}
        weights = self.denoiser.net.state_dict() | {TABLE + name: rows for name, rows in (self.table or {}).items()}
        if self.codec is None:
            return checkpoint.weights_sha256(weights, json.dumps(facts, sort_keys=True))
        weights |= {"codec." + name: value for name, value in self.codec.network.state_dict().items()}
        return checkpoint.weights_sha256(weights, json.dumps(facts, sort_keys=True), repr((self.codec.scale, self.codec.shift)))

    @property
    def conditions(self) -> str:
        """What the denoiser is told beside x and t, in words."""
        kind = "labels" if self.table is None else "prompts (" + ", ".join(sorted(self.table)) + ")"
        return "no condition" if self.classes is None else f"{self.classes} {kind}"

    def told_as(self, other: Teacher) -> bool:
        """Whether both are told the same for the same labels."""
        one, two = (model.table or {} for model in (self, other))
        same = one.keys() == two.keys() and all(one[k].shape == two[k].shape and torch.equal(one[k], two[k]) for k in one)
        return self.conditions == other.conditions and same

    def condition(self, labels: Tensor | None) -> dict[str, Tensor]:
        """What the denoiser takes beside x and t for these labels [B]."""
        if self.classes is None or labels is None:
            return {}
        if self.table is None:
            return {"labels": labels}
        return {name: rows[labels.to(rows.device)].to(labels.device) for name, rows in self.table.items()}

    def guided(self, scale: float) -> DenoiserLike:
        """The denoiser under classifier-free guidance. ValueError for a model that knows no "none" label."""
        if scale == 1:
            return self.denoiser
        if self.null is None:
            raise ValueError("guidance needs a teacher trained with a null class; this one has none: use --guidance 1")
        return Guided(self.denoiser, self.condition(torch.tensor([self.null])), scale)

    def to(self, device: torch.device) -> Teacher:
        if isinstance(self.denoiser, Denoiser):
            self.denoiser.net.to(device)
        if self.codec is not None:
            self.codec.to(device)
        if self.table is not None:
            self.table.update({name: rows.to(device) for name, rows in self.table.items()})
        return self

    def times(self, steps: int) -> Tensor:
        """The grid [steps + 1] that was made for this step count, the uniform one for a model that takes any."""
        if given := self.sampler.get("times", {}).get(str(steps)):
            return torch.tensor(given, dtype=torch.float64)
        return GRIDS[self.sampler.get("grid", "uniform")](self.denoiser.schedule, steps)

    def student(self) -> Denoiser:
        """A trainable copy of the denoiser."""
        return dataclasses.replace(self.parametric, net=copy.deepcopy(self.parametric.net).requires_grad_(True))

    def describe(self) -> dict:
        """Everything but the weights, as JSON."""
        d = self.parametric
        return {
            "network": self.network,
            "schedule": describe(d.schedule),
            "prediction": d.prediction,
            "time": d.time,
            "sigma_data": d.sigma_data,
            "shape": list(self.shape),
            "classes": self.classes,
            "null": self.null,
            "sampler": self.sampler,
            "record": self.record,
            **({} if self.table is None else {"table": sorted(self.table)}),
            **({} if self.codec is None else {"codec": self.codec.describe()}),
        }


def frozen(net: nn.Module) -> nn.Module:
    return net.eval().requires_grad_(False)


def save(path: Path | str, model: Teacher) -> None:
    """One safetensors file from which `load_file` rebuilds the model; of a latent model, where its autoencoder lies."""
    if model.codec is not None and not model.codec.source:
        raise ValueError("a model whose codec came from no folder cannot be saved: give Codec its source")
    table = {TABLE + name: rows for name, rows in (model.table or {}).items()}
    checkpoint.save(path, model.parametric.net.state_dict() | table, model.describe())


def load_file(path: Path | str) -> Teacher:
    path = Path(path)
    tensors, description = checkpoint.load(path)
    if "network" not in description:
        raise ValueError(f"{path}: holds no model (a checkpoint of an unfinished run?)")
    network = description["network"]
    if network["family"] not in FAMILIES:
        raise ValueError(f"{path}: unknown network family {network['family']!r}: accepted are {', '.join(FAMILIES)}")
    table = {name: tensors.pop(TABLE + name) for name in description.get("table", [])}
    codec = Codec.from_description(description["codec"], path.parent) if "codec" in description else None
    net = importlib.import_module(FAMILIES[network["family"]]).build(network["config"])
    checkpoint.load_weights(net, tensors, str(path))
    denoiser = Denoiser(
        frozen(net),
        schedule_from(description["schedule"]),
        description["prediction"],
        description["time"],
        description["sigma_data"],
    )
    return Teacher(
        denoiser,
        tuple(description["shape"]),
        network,
        description["classes"],
        description["null"],
        description["sampler"],
        description["record"],
        codec,
        table or None,
    )


def _from(module: str) -> Callable[[str], Teacher]:
    return lambda spec: importlib.import_module(module).load(spec)


def load(spec: str) -> Teacher:
    """A teacher from its spec, frozen and on the CPU. ValueError in one line that says what is accepted."""
    path = Path(spec)
    if spec == "digits":
        return load_file(Path(__file__).parent / "digits" / "teacher.safetensors")
    if spec.startswith("experts:"):
        return _from("teachers.experts")(spec)
    if spec.startswith("oracle:"):
        return _from("teachers.oracle")(spec)
    if spec.startswith("guided:"):
        return _from("teachers.guided")(spec)
    if path.is_dir():
        if (path / "student.safetensors").is_file():
            return load_file(path / "student.safetensors")
        return _from("teachers.pipeline")(spec)
    where = spec.partition(",")[0]
    if not path.is_file() and ":" in where:
        return _from("teachers.module")(spec)
    if path.is_file() or path.suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        return load_file(path)
    if Path(where).is_dir() or (where.count("/") == 1 and not where.startswith((".", "/"))):
        return _from("teachers.pipeline")(spec)
    raise ValueError(f"unknown teacher {spec!r}: accepted are {ACCEPTED}")
