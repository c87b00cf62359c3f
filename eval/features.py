"""Feature extractors by name: torch-fidelity's own, and a user's classifier, TorchScript file or module."""

from __future__ import annotations

import hashlib
import importlib
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from distill.files import weights_sha256
from eval import classifier, fidelity
from eval.clip import Clip
from eval.metrics import Features
from eval.names import EXTRACTORS as OWN
from teachers.hub import first_line


@dataclass(frozen=True)
class Extractor:
    """Extract `Features` from uint8 images [B, C, H, W], in float32 with autocast and TF32 off."""

    name: str
    module: nn.Module  # uint8 [B, 3, H, W] -> features [B, D] or (features, logits [B, C] or None)
    registered: bool = True  # whether it is one of torch-fidelity's extractors
    distance: str | None = None  # what reports call the Frechet distance of its features; None for FID

    @classmethod
    def create(cls, name: str, weights: str | None = None) -> Extractor:
        """Load the extractor ``name``. ``weights``: a file to use instead of a download.

        One process per machine downloads, the others wait. Raises ValueError for an unknown name and for weights that are
        missing, unsafe to load, or of another network.
        """
        with PartialState(cpu=not torch.cuda.is_available()).local_main_process_first():
            if name in fidelity.extractor_names():
                return cls(name, _registered(name, weights))
            if weights is not None:
                raise ValueError(f"--features-weights is for torch-fidelity's extractors; {name!r} has its own weights")
            module = _own(name)
            return cls(name, module, registered=False, distance=_distance(name, module))

    def fits(self, shape: tuple[int, ...]) -> Extractor:
        """Return the extractor after a trial on two images of ``shape`` [C, H, W]. Raises ValueError if the trial fails."""
        try:
            self(torch.zeros(2, *shape, dtype=torch.uint8))
        except RuntimeError as error:
            raise ValueError(
                f"features {self.name!r} cannot take images of shape {shape} ({first_line(error)}): accepted are --features"
                " inception-v3-compat for colour, and a file of recipes/classifier.py --data SPEC for any size"
            ) from None
        return self

    def to(self, device: torch.device) -> Extractor:
        self.module.to(device)
        return self

    def __call__(self, images: Tensor) -> Features:
        """Return the features on the CPU. Raises the errors of `on_device`."""
        found = self.on_device(images)
        return Features(found.fid.cpu(), None if found.logits is None else found.logits.cpu())

    def on_device(self, images: Tensor) -> Features:
        """Return the features on the device of the images, without waiting for it.

        Raises ValueError if they are not [B, D], with logits [B, C] or without.
        """
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        with fidelity.float32_exactly(), torch.inference_mode():
            out: Any = self.module(images)
        out = out if isinstance(out, tuple) else (out, None)
        if len(out) != 2 or any(o is not None and (o.ndim != 2 or len(o) != len(images)) for o in out):
            shapes = [tuple(o.shape) for o in out if o is not None]
            raise ValueError(f"features {self.name!r} gave {shapes} for {len(images)} images: accepted are {OWN}")
        fid, logits = (None if o is None else o.float() for o in out)
        assert fid is not None
        return Features(fid, logits)

    @property
    def fingerprint(self) -> str:
        """The sha256 of the extractor's weights."""
        return weights_sha256(self.module.state_dict())


def _registered(name: str, weights: str | None) -> nn.Module:
    if name.startswith("dinov2") and not (Path(torch.hub.get_dir()) / "facebookresearch_dinov2_main").is_dir():
        raise ValueError(
            f"features {name!r}: torch-fidelity would fetch their code from github.com/facebookresearch/dinov2 and run it; "
            "call torch.hub.load('facebookresearch/dinov2', ...) once if you trust it"
        )
    try:
        return fidelity.Registered(name, weights)
    except OSError as error:  # includes URLError
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"features {name!r}: no weights and no download ({reason}): give a file with --features-weights"
        ) from None
    except (RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{weights}: these are not the weights of {name!r} ({first_line(error)})") from None


def _distance(name: str, module: nn.Module) -> str | None:
    """Return the attribute ``distance`` of a user's module, such as "MobileNet-FD", or None without one."""
    found = getattr(module, "distance", None)
    if found is not None and not (isinstance(found, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 .+-]{0,39}", found)):
        raise ValueError(
            f"features {name!r}: their distance is named {found!r}; accepted are up to 40 letters, digits, spaces and .+-"
        )
    return found


def _own(name: str) -> nn.Module:
    path = Path(name)
    if name.startswith("clip:"):
        return Clip.load(name.removeprefix("clip:"))
    if path.suffix == ".safetensors":
        return classifier.load(path)
    if path.suffix in (".pt", ".ts"):
        if not path.is_file():
            raise ValueError(f"{name}: there is no such file; accepted as features are {OWN}")
        try:
            return torch.jit.load(name, map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(f"{name}: not a TorchScript file ({first_line(error)}): accepted are {OWN}") from None
    module, _, factory = name.partition(":")
    if not factory:
        raise ValueError(f"unknown features {name!r}: accepted are {', '.join(fidelity.extractor_names())}, {OWN}")
    try:
        net = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"features {name!r}: {error}; accepted are {OWN}") from None
    if not isinstance(net, nn.Module):
        raise ValueError(f"features {name!r} are a {type(net).__name__}: accepted are {OWN}")
    return net.eval().requires_grad_(False)


def fingerprint(images: Tensor) -> str:
    """Return the sha256 of uint8 images, possibly memory-mapped from a file larger than the memory."""
    digest = hashlib.sha256()
    for part in images.split(4096):
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()
