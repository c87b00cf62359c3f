"""Masked diffusion models (`distill.masked`) of images with few levels, and their file: weights with a description."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from distill import files
from distill.bits import to_pixels
from distill.masked import Masked
from distill.reading import malformed
from teachers import networks
from teachers.saved import check_size
from teachers.students import untrained
from teachers.teacher import frozen


@dataclass(frozen=True)
class MaskedModel:
    """Hold a masked diffusion model.

    ``denoiser``: E[onehot(x0) | x_t]. ``shape``: of the tokens of an image, [C, H, W]. ``network``: the description from which
    `teachers.networks.build` rebuilds the network. ``classes``: the number of labels, None for an unconditional model. ``steps``: the
    step count that a student was made for, None for a model that takes any. ``record``: method and provenance.
    """

    denoiser: Masked
    shape: tuple[int, ...]
    network: dict
    classes: int | None = None
    steps: int | None = None
    record: dict = field(default_factory=dict)

    def condition(self, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the denoiser's conditions for labels [B]."""
        return {} if self.classes is None or labels is None else {"labels": labels}

    def decode(self, tokens: Tensor) -> Tensor:
        """Return images in [-1, 1] of tokens [B, C, H, W]."""
        return to_pixels(tokens, self.denoiser.values)

    def student(self) -> Masked:
        """Return a trainable copy of the denoiser."""
        return replace(self.denoiser, net=copy.deepcopy(self.denoiser.net).requires_grad_(True))

    def masks(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Return ``count`` samples at t = 1: every token is the mask."""
        return torch.full((count, *self.shape), self.denoiser.values, device=device)


def new(
    shape: tuple[int, ...], values: int, classes: int | None, channels: tuple[int, ...], layers: int, seed: int
) -> MaskedModel:
    """Return a model of ``values`` categories with a new UNet2DModel, see `teachers.students.untrained`."""
    made = untrained((shape[0] * (values + 1), *shape[1:]), classes, channels, layers, seed)
    assert made.network is not None
    return MaskedModel(Masked(made.parametric.net, values), shape, made.network, classes)


def save(path: Path | str, model: MaskedModel) -> None:
    """Write a model as one safetensors file, from which `load` rebuilds it."""
    described = {"values": model.denoiser.values, "shape": list(model.shape), "classes": model.classes, "steps": model.steps}
    files.save(
        path, model.denoiser.net.state_dict(), {"masked": described, "masked_network": model.network, "record": model.record}
    )


def load(path: Path | str) -> MaskedModel:
    """Load a model that `save` wrote, frozen and on the CPU. Raises ValueError for any other file."""
    path = Path(path)
    tensors, description = files.load(path)
    if "masked" not in description:
        kind = "a continuous diffusion model" if "network" in description else "no model"
        raise ValueError(f"{path}: {kind}; accepted are the masked diffusion models that recipes/masked.py wrote")
    with malformed(path):
        known, network = description["masked"], description["masked_network"]
        numbers = [known["values"], *known["shape"], *(known[k] for k in ("classes", "steps") if known[k] is not None)]
        if any(type(n) is not int or not 1 <= n <= 2**16 for n in numbers) or len(known["shape"]) != 3:
            raise ValueError(f"values, shape, classes and steps are {numbers}; this project writes another kind of value")
        if network["family"] != "unet2d":
            raise ValueError(f"the network is of family {network['family']!r}; accepted is 'unet2d'")
        check_size(network, tensors)
        net = networks.build(network)
        files.load_weights(net, tensors, str(path))
        channels = known["shape"][0] * (known["values"] + 1)
        if (config := network["config"])["in_channels"] != channels or config["out_channels"] != channels:
            raise ValueError(f"the network has {config['in_channels']} channels, and its tokens need {channels}")
        denoiser = Masked(frozen(net), known["values"])
        return MaskedModel(denoiser, tuple(known["shape"]), network, known["classes"], known["steps"], description["record"])
