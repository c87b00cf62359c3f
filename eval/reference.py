"""References: the features of the real images, computed once, stored with their identity, and refused if it does not match.

A reference of this project is a safetensors file that records extractor, weights and images. The .npz statistics of EDM,
guided-diffusion and clean-fid ("mu" and "sigma", Inception) are accepted too. Their sha256 is their identity.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from distill import files
from distill.device import send
from distill.images import from_uint8, to_uint8
from distill.rng import seed_of
from distill.sampling import Sampling
from eval import fidelity, generate, npz_statistics
from eval.behind import one_behind
from eval.columns import plural
from eval.features import Extractor, fingerprint
from eval.gathering import gather_rows
from eval.generate import chunks
from eval.metrics import Reference
from eval.names import REFERENCES as ACCEPTED
from eval.progress import progress
from teachers import Teacher

FOREIGN = "inception-v3-compat"  # the extractor of the .npz files


@dataclass(frozen=True)
class Identity:
    """Hold what a reference was made from. Numbers are comparable only for equal identities. ``images`` is 0 if unknown."""

    features: str
    features_sha256: str
    data: str
    images: int
    data_sha256: str
    resize: str = "none"


def extract(images: Tensor, extractor: Extractor, chunk: int, accelerator: Accelerator) -> Tensor:
    """Return features [N, D] of uint8 images [N, C, H, W]. The processes share the work, and each returns all features."""
    mine = chunks(len(images), chunk, accelerator.process_index, accelerator.num_processes)
    shown = progress(mine, desc=f"{extractor.name} features of the real images", leave=False, show=accelerator.is_main_process)
    found = one_behind(extractor.on_device(send(_whole(images, part), accelerator.device)) for part in shown)
    return _in_order((features.fid for features in found), mine, len(images))


def _in_order(found: Iterable[Tensor], mine: list[range], count: int) -> Tensor:
    """Return the features [N, D] of all processes in the order of the images, from those of this process's chunks."""
    parts = [features[: count - part.start] for features, part in zip(found, mine, strict=True)]
    index = [torch.arange(part.start, part.start + len(rows)) for rows, part in zip(parts, mine, strict=True)]
    features, order = gather_rows(parts), gather_rows(index)
    assert features is not None and order is not None
    return features[order.argsort()]


@dataclass(frozen=True)
class Generated:
    """Name ``count`` images of a teacher as the real ones: DDIM with ``steps`` steps and guidance, of another seed than the cells'."""

    teacher: Teacher
    steps: int
    guidance: float
    count: int
    seed: int

    def features(self, extractor: Extractor, chunk: int, accelerator: Accelerator, folder: Path) -> tuple[Reference, Identity]:
        """Return their reference, from the file reference-HASH.safetensors in ``folder``, which is made where it is missing."""
        made = (self.teacher.fingerprint, self.teacher.conditions_sha256, self.steps, self.guidance, self.seed)
        digest = hashlib.sha256(repr(made).encode()).hexdigest()
        name = f"the teacher with {self.steps} steps" + (f", guidance {self.guidance:g}" if self.guidance != 1 else "")
        identity = Identity(extractor.name, extractor.fingerprint, name, self.count, digest)
        key = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
        return kept(
            identity, lambda: self._drawn(extractor, chunk, accelerator), accelerator, folder / f"reference-{key}.safetensors"
        )

    def _drawn(self, extractor: Extractor, chunk: int, accelerator: Accelerator) -> Tensor:
        schedule = self.teacher.denoiser.schedule
        sampling = Sampling().on_best_grid(schedule, self.steps).on_entries(schedule, self.steps)
        mine = chunks(self.count, chunk, accelerator.process_index, accelerator.num_processes)
        shown = progress(mine, desc="images of the teacher, as reference", leave=False, show=accelerator.is_main_process)
        denoiser = self.teacher.guided(self.guidance)
        seed = seed_of("reference", self.seed)
        drawn = generate.images(self.teacher, sampling, self.steps, shown, seed, accelerator.device, denoiser=denoiser)
        return _in_order((extractor.on_device(batch.pixels).fid for batch in drawn), mine, self.count)


def _whole(images: Tensor, part: range) -> Tensor:
    """Return the images of a chunk. Copies of the last one fill a chunk that goes beyond them."""
    rows = images[part.start : part.stop]
    short = len(part) - len(rows)
    return torch.cat([rows, rows[-1:].expand(short, *rows.shape[1:])]) if short else rows


def of_images(
    images: Tensor, name: str, extractor: Extractor, chunk: int, accelerator: Accelerator, cache: Path | None = None
) -> tuple[Reference, Identity]:
    """Return the reference of uint8 images [N, C, H, W], read from ``cache`` if that file exists, else written to it.

    A damaged file is named on standard error and replaced. Raises ValueError if the file holds another reference.
    """
    identity = Identity(extractor.name, extractor.fingerprint, name, len(images), fingerprint(images))
    return kept(identity, lambda: extract(images, extractor, chunk, accelerator), accelerator, cache)


def kept(
    identity: Identity, features: Callable[[], Tensor], accelerator: Accelerator, cache: Path | None
) -> tuple[Reference, Identity]:
    """Return the reference of an identity, read from ``cache`` if that file exists, else of ``features`` [N, D], and written to it.

    A damaged file is named on standard error and replaced. Raises ValueError if the file holds another reference.
    """
    if cache is not None and cache.is_file():
        try:
            reference, theirs = _read(cache)
        except ValueError as error:
            if accelerator.is_main_process:
                tqdm.write(f"{error}: the reference is computed again", file=sys.stderr)
        else:
            _same(theirs, identity, cache)
            return reference, identity
    reference = Reference(features())
    if cache is not None:
        if accelerator.is_main_process:
            save(cache, reference, identity)
        accelerator.wait_for_everyone()
    return reference, identity


def decoder_floor(
    model: Teacher, images: Tensor, extractor: Extractor, reference: Reference, accelerator: Accelerator
) -> float:
    """Return the FID of the real images after encoding and decoding. It bounds the FID of a latent model from below."""
    assert model.codec is not None
    parts = []
    for part in images.split(64):
        x = from_uint8(part, accelerator.device)
        parts.append(to_uint8(model.decode(model.codec.encode(x))).cpu())
    features = extract(torch.cat(parts), extractor, 256, accelerator)
    return fidelity.frechet(fidelity.statistics(features), reference.statistics)


def save(path: Path, reference: Reference, identity: Identity) -> None:
    """Write a reference with its identity."""
    assert reference.features is not None
    files.save(path, {"features": reference.features}, {"reference": asdict(identity)})


def load(path: Path, extractor: Extractor) -> tuple[Reference, Identity]:
    """Load a stored reference. Raises ValueError if it was made with another extractor, or if the file is no reference."""
    reference, identity = _read(path)
    sha256 = extractor.fingerprint if identity.features_sha256 else ""
    _same(identity, replace(identity, features=extractor.name, features_sha256=sha256), path)
    return reference, identity


def _read(path: Path) -> tuple[Reference, Identity]:
    """Read a reference of any extractor. Raises ValueError for a file that is none, or that is damaged."""
    if path.suffix == ".npz":
        return _foreign(path)
    tensors, description = files.load(path)
    if "reference" not in description:
        kind = "a model" if "network" in description else "a file"
        raise ValueError(f"{path}: {kind}, no reference: accepted are {ACCEPTED}")
    features = tensors.get("features", torch.zeros(0))
    if features.dtype != torch.float32:
        raise ValueError(f"{path}: features are {features.dtype}, torch.float32 is accepted")
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{path}: features have shape {tuple(features.shape)}, accepted is [N, D] of at least 2 images")
    if bad := int((~features.isfinite().all(1)).sum()):
        raise ValueError(f"{path}: the features of {plural(bad, 'image')} are not finite")
    try:
        identity = Identity(**description["reference"])
    except TypeError:
        known = ", ".join(field.name for field in fields(Identity))
        raise ValueError(f"{path}: its identity does not have the entries {known}") from None
    if wrong := [name for name, value in asdict(identity).items() if type(value) is not (int if name == "images" else str)]:
        raise ValueError(f"{path}: {wrong[0]} of its identity is a {type(asdict(identity)[wrong[0]]).__name__}")
    if identity.images != len(features):
        raise ValueError(f"{path}: it holds the features of {len(features):,} images, its identity says {identity.images}")
    return Reference(features), identity


def _same(theirs: Identity, ours: Identity, path: Path) -> None:
    for field, value in asdict(theirs).items():
        mine = asdict(ours)[field]
        if value != mine:
            short = [v[:12] if field.endswith("sha256") else v for v in (value, mine)]
            raise ValueError(f"{path}: this reference has {field} {short[0]!r}, here it is {short[1]!r}: they must agree")


def _foreign(path: Path) -> tuple[Reference, Identity]:
    given = npz_statistics.read(path)
    given["mu"] = given["mu"].astype(np.float32)  # torch-fidelity's type of mu; it refuses to mix types
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Reference(None, given), Identity(FOREIGN, "", path.stem, 0, digest, "as the file was made, unknown")
