"""References with an identity: the real images' features, computed once, stored, and refused where they do not fit.

Our own files are safetensors that say with which extractor, weights and images they were made. The .npz statistics of EDM,
guided-diffusion and clean-fid ("mu" and "sigma", Inception) are read too; they name nothing, so their sha256 stands for them.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from distill import checkpoint
from eval import fidelity
from eval.features import Extractor, fingerprint
from eval.generate import chunks, from_uint8, to_uint8
from eval.metrics import Reference
from teachers import Teacher

ACCEPTED = "a .safetensors reference of this project, or an .npz with mu [D] and sigma [D, D]"
FOREIGN = "inception-v3-compat"  # what the .npz files of the field were made with


@dataclass(frozen=True)
class Identity:
    """What a reference was made from; two numbers are comparable only against the same one. ``images`` is 0 where unknown."""

    features: str
    features_sha256: str
    data: str
    images: int
    data_sha256: str
    resize: str = "none"


def extract(images: Tensor, extractor: Extractor, chunk: int, accelerator: Accelerator) -> Tensor:
    """Features [N, D] of uint8 images, shared out over the processes in whole chunks; every process returns all of them."""
    mine = chunks(len(images), chunk, accelerator.process_index, accelerator.num_processes)
    hidden = None if accelerator.is_main_process else True
    parts = []
    for indices in tqdm(mine, desc=f"{extractor.name} features of the real images", leave=False, disable=hidden):
        part = images[indices.start : indices.stop]
        if short := chunk - len(part):
            part = torch.cat([part, part[-1:].expand(short, *part.shape[1:])])
        parts.append((indices.start, extractor(part.to(accelerator.device)).fid[: chunk - short]))
    return torch.cat([features for _, features in sorted(gather_object(parts), key=lambda part: part[0])])


def of_images(
    images: Tensor, name: str, extractor: Extractor, chunk: int, accelerator: Accelerator, cache: Path | None = None
) -> tuple[Reference, Identity]:
    """The reference of a data set; taken from ``cache`` where that holds this very one, and written there otherwise."""
    identity = Identity(extractor.name, extractor.fingerprint, name, len(images), fingerprint(images))
    if cache is not None and cache.is_file():
        reference, theirs = load(cache, extractor)
        _same(theirs, identity, cache)
        return reference, identity
    reference = Reference(extract(images, extractor, chunk, accelerator))
    if cache is not None:
        if accelerator.is_main_process:
            save(cache, reference, identity)
        accelerator.wait_for_everyone()
    return reference, identity


def decoder_floor(
    model: Teacher, images: Tensor, extractor: Extractor, reference: Reference, accelerator: Accelerator
) -> float:
    """FID of the real images, encoded and decoded by a latent model's codec, against themselves as they are."""
    assert model.codec is not None
    parts = []
    for part in images.split(64):
        x = from_uint8(part, accelerator.device)
        parts.append(to_uint8(model.codec.decode(model.codec.encode(x))).cpu())
    features = extract(torch.cat(parts), extractor, 256, accelerator)
    return fidelity.frechet(fidelity.statistics(features), reference.statistics)


def save(path: Path, reference: Reference, identity: Identity) -> None:
    assert reference.features is not None
    checkpoint.save(path, {"features": reference.features}, {"reference": asdict(identity)})


def load(path: Path, extractor: Extractor) -> tuple[Reference, Identity]:
    """A stored reference. ValueError, in one line that says what differs, where it was made with another extractor, or is none."""
    if path.suffix == ".npz":
        reference, identity = _foreign(path, extractor)
    else:
        tensors, description = checkpoint.load(path)
        if "reference" not in description:
            raise ValueError(
                f"{path}: a {'model' if 'network' in description else 'file'}, no reference: accepted are {ACCEPTED}"
            )
        if tensors["features"].dtype != torch.float32:
            raise ValueError(f"{path}: features are {tensors['features'].dtype}, torch.float32 is accepted")
        reference, identity = Reference(tensors["features"]), Identity(**description["reference"])
    sha256 = extractor.fingerprint if identity.features_sha256 else ""
    wanted = replace(identity, features=extractor.name, features_sha256=sha256)
    _same(identity, wanted, path)
    return reference, identity


def _same(theirs: Identity, ours: Identity, path: Path) -> None:
    for field, value in asdict(theirs).items():
        mine = asdict(ours)[field]
        if value != mine:
            short = [v[:12] if field.endswith("sha256") else v for v in (value, mine)]
            raise ValueError(f"{path}: this reference has {field} {short[0]!r}, here it is {short[1]!r}: they must agree")


def _foreign(path: Path, extractor: Extractor) -> tuple[Reference, Identity]:
    try:
        with np.load(path, allow_pickle=False) as file:
            given = {"mu": file["mu"], "sigma": file["sigma"]}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}; accepted is {ACCEPTED}") from None
    mu, sigma = given["mu"], given["sigma"]
    if mu.dtype not in (np.float32, np.float64) or sigma.dtype != np.float64:
        raise ValueError(f"{path}: mu is {mu.dtype} and sigma {sigma.dtype}: accepted are float32 or float64, and float64")
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{path}: mu has shape {mu.shape} and sigma {sigma.shape}: accepted is {ACCEPTED}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    given["mu"] = mu.astype(np.float32)  # as torch-fidelity has it, which refuses to mix types
    return Reference(None, given), Identity(FOREIGN, "", path.stem, 0, digest, "as the file was made, unknown")
