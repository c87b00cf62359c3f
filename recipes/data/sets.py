"""Load the data sets of --data, and draw training batches from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill import reading
from distill.bits import pixels_to_bits, pixels_to_tokens, to_pixels
from distill.device import send
from distill.images import from_uint8, to_uint8
from distill.train import Batches, BatchSplit
from eval.features import fingerprint
from recipes.data import condition_shards, folders, huggingface, latent_shards, webdataset
from recipes.data.batches import batches as make_batches
from recipes.data.buckets import Buckets, SeveralSizes, is_bucket, read_buckets
from recipes.data.decode import Source, check_label, decode_blocks, format_of, read_all
from recipes.data.latent_shards import BUCKETS
from recipes.data.npz import read_npz
from recipes.data.pixels import changed
from recipes.data.spec import ACCEPTED as ACCEPTED
from recipes.data.spec import WHOLE, parse
from recipes.data.stream import Stream
from teachers.conditions import Conditions
from teachers.prompts import read_prompts


@dataclass(frozen=True)
class Data:
    """Hold a data set.

    ``images``: uint8 [N, C, H, W]; for latents, floats [N, ...] in the denoiser's own space, or `Buckets` of several shapes. ``flip``:
    mirror each training image with probability 1/2. ``latents``: the index of a folder of latents, else None; large ones are `Rows`,
    mapped into memory. ``stream``: the source of training batches if the set does not fit in memory; ``images`` are then the first of
    the set, and the reference is computed from them. ``known_classes``: the number of classes, if known; the labels may not show all.
    ``table``: the conditions of the captions, if they are encoded. ``imageless``: the set has prompts alone, see `of_prompts`. ``bits``:
    images have 2^bits levels, and samples are their bits as channels of +-1 (`distill.bits`); None for samples that are the images.
    ``of_captions``: the classes of captions, of a set whose labels are the numbers of its captions, see `caption_classes`.
    """

    name: str
    images: Tensor
    labels: Tensor | None = None
    captions: list[str] | None = None
    flip: bool = False
    latents: dict | None = None
    stream: Stream | None = None
    known_classes: int | None = None
    table: Conditions | None = None
    imageless: bool = False
    bits: int | None = None
    of_captions: dict[str, int] | None = None

    @classmethod
    def of_prompts(cls, prompts: list[str], name: str) -> Data:
        """Return a set of prompts without images. `shaped` gives it the shape of a model's samples."""
        return cls(name, torch.zeros(1).expand(len(prompts), 1), captions=prompts, imageless=True)

    def shaped(self, shape: tuple[int, ...]) -> Data:
        """Return the set with samples of this shape, where it has no images: zeros [N, *shape] that take no memory."""
        return replace(self, images=torch.zeros(1).expand(len(self.images), *shape)) if self.imageless else self

    @classmethod
    def of(cls, images: Tensor | np.ndarray, labels: Tensor | np.ndarray | None = None, name: str | None = None) -> Data:
        """Return a data set made in Python.

        ``images`` [N, C, H, W]: uint8, or floats in [-1, 1], which are rounded to uint8. ``labels`` [N]: integers from 0. ``name``: the
        set's name in reports; default is the number of images and the start of their sha256. Raises ValueError for other shapes,
        types and ranges.
        """
        images = torch.as_tensor(images).detach().cpu()
        accepted = "accepted are [N, C, H, W] as uint8, or as floats in [-1, 1]"
        floats = images.is_floating_point()
        if images.ndim != 4 or not images.numel() or not (floats or images.dtype == torch.uint8):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; {accepted}")
        if floats and not images.abs().max() <= 1:  # also true for NaN
            raise ValueError(f"images have values from {images.min():.4g} to {images.max():.4g}; {accepted}")
        if labels is not None:
            labels = torch.as_tensor(labels).detach().cpu()
            integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
            if labels.shape != images.shape[:1] or not integers:
                raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}; accepted are integers [{len(images)}]")
            labels = labels.long()
            for label in (int(labels.min()), int(labels.max())):
                check_label("labels", label)
        pixels = to_uint8(images.float()) if floats else images
        return cls(name or f"{len(pixels)} images, sha256 {fingerprint(pixels)[:8]}", pixels, labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image or latent. Raises ValueError for a set of several shapes."""
        return tuple(self.images.shape[1:])

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample of `x0`: that of an image or latent, or of the bits of an image."""
        return self.shape if self.bits is None else (self.shape[0] * self.bits, *self.shape[1:])

    def in_bits(self, bits: int) -> Data:
        """Return the set of images rounded to 2^``bits`` levels, with their bits as samples."""
        tokens = pixels_to_tokens(pixels_to_bits(from_uint8(self.images), bits), bits)
        return replace(self, name=f"{self.name}, {bits} bits", images=to_uint8(to_pixels(tokens, 2**bits)), bits=bits)

    @property
    def classes(self) -> int | None:
        """The number of classes; None without labels."""
        return None if self.labels is None else max(self.known_classes or 0, int(self.labels.max()) + 1)

    def of_classes(self, labels: list[int]) -> Data:
        """Return the images of these classes alone, as classes 0, 1, ... in this order; those of one class have no labels.

        Raises ValueError for a class without images, one that is named twice, and a set without labels or a stream.
        """
        if self.labels is None or self.stream is not None:
            raise ValueError(f"{self.name}: labels=... needs a set with labels that is held in memory")
        known = sorted(set(self.labels.tolist()))
        if wrong := [label for label in labels if label not in known or labels.count(label) > 1]:
            raise ValueError(f"{self.name}: labels={wrong[0]}: accepted are {_shortened(known)}, each once")
        rows = torch.isin(self.labels, torch.tensor(labels)).nonzero()[:, 0]
        number = torch.tensor([labels.index(int(label)) for label in self.labels[rows]])
        return replace(
            self,
            name=f"{self.name}, labels {'+'.join(map(str, labels))}",
            images=self.images[rows],
            labels=number if len(labels) > 1 else None,
            captions=None if self.captions is None else [self.captions[row] for row in rows.tolist()],
            known_classes=len(labels),
        )

    @property
    def caption_classes(self) -> dict[str, int]:
        """The class of each caption, of images with captions and labels; captions of several classes are left out. {} without labels."""
        if self.of_captions is not None or self.labels is None or self.captions is None:
            return self.of_captions or {}
        found: dict[str, set[int]] = {}
        for caption, label in zip(self.captions, self.labels.tolist(), strict=True):
            found.setdefault(caption.strip(), set()).add(label)
        return {caption: next(iter(labels)) for caption, labels in found.items() if len(labels) == 1}

    def require_pixels(self) -> Tensor:
        """Return the images as uint8. Raises ValueError for latents, which FID cannot be measured against."""
        if self.latents is not None or self.imageless:
            what = "prompts alone" if self.imageless else "latents"
            raise ValueError(f"{self.name} holds {what}, which FID cannot be measured against; give a stored --reference")
        return self.images

    def of_one_shape(self, shape: tuple[int, ...] | None = None) -> Data:
        """Return the set or, of several shapes, the samples of this one; without it, or where none has it, those of the largest."""
        if not isinstance(self.images, Buckets):
            return self
        rows = self.images.rows(shape)
        images = self.images.parts[self.images.starts.index(rows.start)]
        labels, captions = (None if known is None else known[rows] for known in (self.labels, self.captions))
        return replace(self, images=images, labels=labels, captions=captions)  # type: ignore[arg-type]

    def pixels(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Return height and width of the images of latents of a shape, where the conditions of their size follow the shape.

        They do where --sizes made the latents; None for all other sets.
        """
        factor = (self.latents or {}).get("factor")
        return None if factor is None else (factor * shape[-2], factor * shape[-1])

    def x0(self, index: Tensor | slice, device: torch.device | str = "cpu") -> Tensor:
        """Return samples as float32 [B, ...]: images in [-1, 1] or their bits, latents unchanged."""
        return self.scaled(self.images[index], device)

    def scaled(self, images: Tensor, device: torch.device | str) -> Tensor:
        """Return images or latents of this set, as it stores them, as float32 [B, ...] on ``device``."""
        if images.is_floating_point():
            return send(images.contiguous(), device).float()
        pixels = from_uint8(images, device)
        return pixels if self.bits is None else pixels_to_bits(pixels, self.bits)

    def captioned(self, prompts: list[str]) -> Data:
        """Return the set with each image's caption as label: its position in ``prompts``.

        A set with labels is returned unchanged if none of its captions is a prompt. Raises ValueError for an unknown caption.
        """
        place = {prompt: i for i, prompt in enumerate(prompts)}
        unknown = [caption for caption in self.captions or [] if caption.strip() not in place]
        if unknown and self.labels is not None and len(unknown) == len(self.captions or []):
            return self
        if unknown:
            raise ValueError(
                f"{self.name}: the caption {unknown[0]!r} is none of the teacher's {len(prompts)} prompts; "
                "accepted are the lines of prompts=FILE, or conditions that recipes/latents.py wrote"
            )
        labels = torch.tensor([place[caption.strip()] for caption in self.captions or []])
        stream = None if self.stream is None else self.stream.captioned(place)
        return replace(self, labels=labels, stream=stream, known_classes=len(prompts), of_captions=self.caption_classes)

    def walk(
        self, block: int, most: int | None = None, rank: int = 0, world: int = 1, piece: int | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor | None, list[str] | None]]:
        """Pass over the set, or its first ``most`` images, once, in order and never mirrored.

        Yields (number, images, labels, captions) of each block of about ``block`` images that belongs to process ``rank``: every
        ``world``-th block. With ``piece`` it yields a block in pieces of about so many images.
        """
        if self.stream is None:
            count, size = min(len(self.images), most or len(self.images)), piece or block
            for number, first in list(enumerate(range(0, count, block)))[rank::world]:
                for start in range(first, last := min(first + block, count), size):
                    part = slice(start, min(start + size, last))
                    labels, captions = (None if known is None else known[part] for known in (self.labels, self.captions))
                    yield number, self.images[part], labels, captions  # type: ignore[misc]
            return
        for number, kept in decode_blocks(self.stream.source, self.stream.form, block, most, rank, world, piece):
            records = [record for record, _ in kept]
            labels = None if self.labels is None else torch.tensor([record.label for record in records])
            captions = None if self.captions is None else [record.caption or "" for record in records]
            yield number, torch.from_numpy(np.stack([pixels for _, pixels in kept])), labels, captions

    def batches(
        self,
        split: BatchSplit,
        seed: int,
        phase: str,
        device: torch.device,
        condition: Callable[[Tensor | None], dict[str, Tensor]],
        null: int | None = None,
        null_probability: float = 0.0,
    ) -> Batches:
        """Return the function step -> iterator of microbatches (x0, cond) from that step on.

        Samples are drawn with replacement, as a function of (seed, phase, step); for a stream see `Stream.microbatches`. Those of a
        step have one shape: of several, it is drawn by the number of samples.
        `recipes.data.batches` describes how they reach a GPU.
        ``condition``: labels [B] or None -> the conditions of the network, such as `Teacher.condition`. Labels are replaced by ``null``
        with ``null_probability``, the label dropout of classifier-free guidance.
        """

        return make_batches(self, split, seed, phase, device, condition, null, null_probability)


def _shortened(known: list[int]) -> str:
    return ", ".join(map(str, known if len(known) <= 12 else [*known[:12], "..."]))


def load(spec: str) -> Data:
    """Load the data set of a spec, one of `spec.ACCEPTED`. Raises ValueError in one line for any other."""
    kind, where, options = parse(spec)
    loaded = _loaded(kind, where, options)
    if "labels" in options:
        loaded = loaded.of_classes([int(label) for label in options["labels"].split("+")])
    if WHOLE & options.keys():
        images = changed(loaded.images, options)
        size = "x".join(map(str, images.shape[2:]))
        loaded = replace(loaded, images=images, name=f"{loaded.name} {size}{' grey' * ('grey' in options)}")
    return loaded.in_bits(int(options["bits"])) if "bits" in options else loaded


def _loaded(kind: str, where: str, options: dict[str, str]) -> Data:
    flip = "flip" in options
    if kind == "digits":
        from teachers.digits import digits

        return Data("digits", *digits(), flip=flip)
    if kind == "latents":
        return _latents(Path(where))
    if kind == "prompts":
        return Data.of_prompts(read_prompts(where), Path(where).stem)
    if kind == "npz":
        return Data(Path(where).stem, *read_npz(Path(where)), flip=flip)
    if kind in folders.TORCHVISION:
        return Data(kind, *folders.read_torchvision(kind, where, "download" in options), flip=flip)
    return replace(_decoded(_source(kind, where, options), options), flip=flip)


def several_sizes(spec: str, sizes: tuple[tuple[int, int], ...]) -> SeveralSizes:
    """Return the images of a spec for `recipes/latents.py --sizes`. Raises ValueError for a set without encoded images."""
    kind, where, options = parse(spec)
    if changing := sorted(WHOLE & options.keys()):
        raise ValueError(
            f"--sizes with --data {spec}: {changing[0]} changes its images; accepted are FOLDER, hf and wds without it"
        )
    if kind not in ("folder", "hf", "wds") or "size" in options:
        what = "its size=... is another size" if "size" in options else "its images have one size"
        raise ValueError(f"--sizes with --data {spec}: {what}; accepted are FOLDER, hf and wds without size=...")
    return SeveralSizes.of(_source(kind, where, options), sizes)


def _latents(folder: Path) -> Data:
    """Read a folder of latents with its conditions. One of several folders has those of all, for the size of its own images."""
    several = BUCKETS in reading.read_text(folder / "index.json")
    latents, labels, captions, index = read_buckets(folder) if several else latent_shards.read_latents(folder)
    part = not several and is_bucket(folder)
    table = condition_shards.read_conditions(folder.absolute().parent if part else folder)
    name = "/".join(folder.absolute().parts[-2 if part else -1 :])
    data = Data(name, latents, labels, captions, latents=index, table=table)  # type: ignore[arg-type]
    size = None if several or table is None else data.pixels(data.shape)
    return data if size is None or table is None else replace(data, table=table.sized(*size))


def _source(kind: str, where: str, options: dict[str, str]) -> Source:
    if kind == "hf":
        return huggingface.hub_source(where, options, "stream" in options)
    if kind == "wds":
        return webdataset.shards_source(where, int(options["classes"]) if "classes" in options else None)
    return folders.folder_source(Path(where))


def _decoded(source: Source, options: dict[str, str]) -> Data:
    form = format_of(source, int(options["size"]) if "size" in options else None)
    held = int(options["stream"]) if "stream" in options else None
    found = read_all(source, form, held)
    for label in () if found.labels is None else (min(found.labels), max(found.labels)):
        check_label(source.name, label, source.classes)
    labels = None if found.labels is None else torch.tensor(found.labels)
    images = torch.from_numpy(found.images)
    if held is None:
        return Data(source.name, images, labels, found.captions, known_classes=source.classes)
    if labels is not None and source.classes is None:
        raise ValueError(f"{source.name}: the number of classes is unknown, and a labelled stream needs it: add classes=N")
    stream = Stream(source, form, held, labels is not None)
    return Data(f"{source.name}, first {len(images)}", images, labels, found.captions, False, None, stream, source.classes)
