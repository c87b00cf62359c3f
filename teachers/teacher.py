"""The class `Teacher`: a trained model, with everything needed to condition, sample, decode, save and identify it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from distill import files
from distill.denoiser import Denoiser, DenoiserLike, Guided
from distill.device import lay_out
from distill.guidance import AtScale, GuidanceRange
from distill.sampling import Sampling
from distill.schedule import describe
from distill.source import Source
from teachers.codec import Codec
from teachers.conditions import SIZES, Conditions, as_float, described
from teachers.hollow import is_hollow

MOST_VALUES, MOST_CLASSES, MOST_PROMPTS = 2**26, 1_000_000, 10**10  # of a sample, labels, and rows of a table
EMBEDDINGS = "table."  # prefix of the conditions among the tensors of a file


@dataclass(frozen=True)
class Teacher:
    """Hold a trained model, teacher or student.

    ``denoiser``: E[x0 | x_t]. ``shape``: the shape of one sample, without the batch. ``network``: the description from which
    `teachers.networks.build` rebuilds the network, {"family", "config"}; None for oracles and experts. ``classes``: labels are
    0..classes-1; None for an unconditional model. ``null``: the label of the unconditional case, for guidance. ``sampling``: how a
    student is sampled; it has no step counts for a model that takes any. ``record``: method and provenance, as saved. ``codec``: the
    autoencoder of a latent model. ``embeddings``: the conditions of a text-to-image model. A label is a row of their table, which
    comes with the data (`with_conditions`): a model without data has 0 classes. The last row is the unconditional case. ``guidance``:
    the scales of a network that takes the guidance scale as a condition; None for any other. ``source``: the images that paths start
    from; None for noise.

    Raises ValueError for a shape or a number of classes that is none, or is too large to be meant.
    """

    denoiser: DenoiserLike
    shape: tuple[int, ...]
    network: dict | None = None
    classes: int | None = None
    null: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    record: dict = field(default_factory=dict)
    codec: Codec | None = None
    embeddings: Conditions | None = None
    guidance: GuidanceRange | None = None
    source: Source | None = None

    def __post_init__(self):
        whole = all(isinstance(n, Integral) and 1 <= n <= 2**16 for n in self.shape)
        if not whole or not 1 <= len(self.shape) <= 4 or math.prod(self.shape) > MOST_VALUES:
            raise ValueError(
                f"samples of shape {self.shape}: accepted are 1 to 4 whole numbers, {MOST_VALUES:,} values at most"
            )
        most = MOST_CLASSES if self.embeddings is None else MOST_PROMPTS
        for name, value, least in (("classes", self.classes, int(self.embeddings is None)), ("null", self.null, 0)):
            if value is not None and not (isinstance(value, Integral) and least <= value <= most):
                raise ValueError(f"{name} {value}: accepted are whole numbers from {least} to {most:,}")

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one image; for a latent model it differs from `shape`."""
        if self.codec is None:
            return self.shape
        device = "meta" if is_hollow(self.codec.network) else "cpu"
        return tuple(self.decode(torch.zeros(1, *self.shape, device=device)).shape[1:])

    def decode(self, x0: Tensor) -> Tensor:
        """Return images in [-1, 1] of samples x0; the identity for pixel-space models."""
        return x0 if self.codec is None else self.codec.decode(x0)

    @property
    def parametric(self) -> Denoiser:
        """The denoiser, if it is one network. Raises ValueError for oracles and experts."""
        return require_network(self)

    @property
    def hollow(self) -> bool:
        """Whether the network has shapes alone and no weights, for the plan of a run."""
        return isinstance(self.denoiser, Denoiser) and is_hollow(self.denoiser.net)

    @property
    def distilled(self) -> bool:
        """Whether the model was made for particular step counts."""
        return bool(self.sampling.steps)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of all that determines the outputs: weights and description, or the definition of an oracle.

        The conditions of a text-to-image model are not part of it, see `conditions_sha256`.
        """
        if not isinstance(self.denoiser, Denoiser):
            return hashlib.sha256(repr((self.record, self.denoiser)).encode()).hexdigest()
        facts = {k: v for k, v in self.describe().items() if k not in ("record", "codec", "table", "encoder_sha256")}
        before = [json.dumps(facts, sort_keys=True)]
        weights = self.parametric.net.state_dict()
        if self.codec is not None:
            weights |= {"codec." + name: value for name, value in self.codec.network.state_dict().items()}
            before.append(repr((self.codec.scale, self.codec.shift)))
        return files.weights_sha256(weights, *before)

    @property
    def conditions_sha256(self) -> str | None:
        """The sha256 of the table of a text-to-image model; None for other models."""
        return None if self.embeddings is None else self.embeddings.sha256

    @property
    def conditions(self) -> str:
        """What the denoiser is conditioned on, in words."""
        if self.embeddings is not None:
            return f"{self.classes or ''} prompts ({self.embeddings.names})".lstrip()
        return "no condition" if self.classes is None else f"{self.classes} labels"

    def same_conditioning(self, other: Teacher) -> bool:
        """Return whether both models have equal conditions for equal labels, or text encoders that agree."""
        if self.embeddings is None or other.embeddings is None:
            return self.conditions == other.conditions
        return self.embeddings.agrees_with(other.embeddings)

    def with_conditions(self, table: Conditions) -> Teacher:
        """Return a text-to-image model whose labels are the rows of ``table``.

        Raises ValueError for any other model, and for a table of another text encoder.
        """
        if self.embeddings is None:
            raise ValueError(f"the model takes {self.conditions}, not text: accepted are text-to-image models")
        if not self.embeddings.agrees_with(table):
            one, other = (some.encoder[:12] or some.names for some in (table, self.embeddings))
            raise ValueError(
                f"the conditions were made by another text encoder or tokenizer ({one}) than the model's ({other}): "
                "encode them with the model, by recipes/latents.py"
            )
        return dataclasses.replace(self, classes=table.count, null=table.count, embeddings=table)

    def condition(self, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the denoiser's conditions for labels [B], on their device: {} for an unconditional model or without labels.

        A network that takes the guidance scale gets that of `GuidanceRange.scale`. Raises ValueError for a text-to-image model without
        a table.
        """
        if self.classes is None or labels is None:
            return {}
        rows = {"labels": labels} if self.embeddings is None else self.embeddings(labels)
        return rows | self._scale(labels)

    def _scale(self, like: Tensor) -> dict[str, Tensor]:
        """Return the guidance scale of a call that names none, for a network that takes it, [B]."""
        if self.guidance is None:
            return {}
        return {"guidance": torch.full(like.shape[:1], self.guidance.scale, device=like.device)}

    @property
    def own_scale(self) -> float:
        """The guidance scale of the denoiser where none is named: 1, no guidance, unless its network takes another."""
        return 1.0 if self.guidance is None else self.guidance.scale

    def guided(self, scale: float | None) -> DenoiserLike:
        """Return the denoiser with guidance of this scale: classifier-free, or as a condition of a network that takes it.

        ``scale``: None for `own_scale`. Raises ValueError without a null class.
        """
        if scale is None or (scale == 1 and self.guidance is None):
            return self.denoiser
        if self.guidance is not None:
            return AtScale(self.denoiser, scale)
        return Guided(self.denoiser, self._null_condition(), scale, self._guided_norm)

    def guided_over(self, wanted: GuidanceRange) -> DenoiserLike:
        """Return the denoiser with guidance of each sample's own scale, its condition ``guidance`` [B], anywhere in a range.

        Raises ValueError without a null class, and where the network takes the scale and was not trained for all of the range.
        """
        if self.guidance is None:
            return Guided(self.denoiser, self._null_condition(), None, self._guided_norm)
        if wanted.low not in self.guidance or wanted.high not in self.guidance:
            raise ValueError(
                f"guidance range {wanted}: the teacher takes scales of {self.guidance}; accepted are ranges within"
            )
        return self.denoiser

    @property
    def _guided_norm(self) -> Any:
        """The norm that guidance keeps, of a network whose pipeline rescales; else None."""
        return getattr(getattr(self.denoiser, "net", None), "guided_norm", None)

    def _null_condition(self) -> dict[str, Tensor]:
        if self.null is None:
            raise ValueError("guidance needs a teacher trained with a null class; this one has none: use --guidance 1")
        if self.embeddings is None:
            return {"labels": torch.tensor([self.null])}
        # of the size of the images, the unconditional half takes the conditions of the other one
        return {name: as_float(row, "cpu") for name, row in self.embeddings.null.items() if name not in SIZES}

    def to(self, device: torch.device) -> Teacher:
        """Move the model in place, and return self. Conditions stay; its autoencoder moves to where it encodes or decodes.

        A hollow model stays on the meta device.
        """
        if isinstance(self.denoiser, Denoiser) and not self.hollow:
            lay_out(self.denoiser.net.to(device), device)
        return self

    def times(self, steps: int) -> Tensor:
        """Return the time grid of a step count, float64 [steps + 1]."""
        return self.sampling.times_for(self.denoiser.schedule, steps)

    def student(self) -> Denoiser:
        """Return a trainable copy of the denoiser."""
        return dataclasses.replace(self.parametric, net=copy.deepcopy(self.parametric.net).requires_grad_(True))

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a file of the model holds: weights, and the conditions of the empty prompt."""
        null = {} if self.embeddings is None else self.embeddings.null
        return self.parametric.net.state_dict() | {EMBEDDINGS + name: row for name, row in null.items()}

    def describe(self) -> dict:
        """Return everything but the tensors as JSON data. A text-to-image model is described without its prompts."""
        d, text = self.parametric, self.embeddings is not None
        return {
            "network": self.network,
            "schedule": describe(d.schedule),
            "prediction": d.prediction,
            "time": d.time,
            "sigma_data": d.sigma_data,
            "shape": list(self.shape),
            "classes": 0 if text else self.classes,
            "null": 0 if text else self.null,
            "sampler": self.sampling.describe(),
            "record": self.record,
            **described(self.embeddings),
            **({} if self.codec is None else {"codec": self.codec.describe()}),
            **({} if self.guidance is None else {"guidance": self.guidance.describe()}),
            **({} if self.source is None else {"source": self.source.facts}),
        }


def require_network(model: Teacher) -> Denoiser:
    """Return the denoiser of a model that is one network. Raises ValueError for oracles and experts."""
    if not isinstance(model.denoiser, Denoiser):
        raise ValueError("an oracle has no network, and experts have several: accepted is a model of one network with weights")
    return model.denoiser


def frozen(net: nn.Module) -> nn.Module:
    """Put a network in eval mode without gradients, and return it."""
    return net.eval().requires_grad_(False)
