"""--data: images as uint8 [N, C, H, W] with labels, or latents, and the batches every recipe trains on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.rng import Rng, seed_of
from distill.train import Batches, Shares
from eval.generate import from_uint8
from recipes import folders, hub, shards, stored
from recipes.decode import Source, form_of, read_all, walk
from recipes.stream import Stream

ACCEPTED = (
    "'digits', an .npz file with images uint8 [N, H, W, C] and, where there are any, labels and captions [N], a folder of images "
    "(sub-folders are classes), a folder of latents (recipes/latents.py makes them), hf:NAME or hf:FOLDER (the datasets package; "
    "split=, config=, image=, label=, caption= choose), wds:PATTERN (shards such as a-{000..127}.tar), mnist:ROOT, "
    "fashionmnist:ROOT or cifar10:ROOT (ROOT,download fetches them); further options after commas: flip mirrors half of the "
    "training images, and of folders, hf and wds size=32 crops the centre and resizes, stream=10000 holds so many images in memory, "
    "classes=1000 says how many a stream has"
)
DECODED = frozenset({"size", "stream", "flip"})
OPTIONS: dict[str, frozenset[str]] = {
    "digits": frozenset({"flip"}),
    "npz": frozenset({"flip"}),
    "latents": frozenset(),
    "folder": DECODED,
    "wds": DECODED | {"classes"},
    "hf": DECODED | {"classes", "split", "config", "image", "label", "caption"},
    **dict.fromkeys(folders.TORCHVISION, frozenset({"download", "flip"})),
}
SWITCHES, NUMBERS = {"flip", "download"}, {"size", "stream", "classes"}


@dataclass(frozen=True)
class Data:
    """``images``: uint8 [N, C, H, W]; floats [N, ...] in the denoiser's own space where ``latents``, the index of their folder, is
    given. With ``stream`` the images are the first of the set, which the reference is made of, and batches come from all of it.
    ``flip``: half of a batch is mirrored. ``known_classes``: how many there are, where the labels here may not show all."""

    name: str
    images: Tensor
    labels: Tensor | None = None
    captions: list[str] | None = None
    flip: bool = False
    latents: dict | None = None
    stream: Stream | None = None
    known_classes: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    @property
    def classes(self) -> int | None:
        return None if self.labels is None else max(self.known_classes or 0, int(self.labels.max()) + 1)

    @property
    def pixels(self) -> Tensor:
        """The images as uint8. ValueError for latents, against which nothing can be measured."""
        if self.latents is not None:
            raise ValueError(f"{self.name} holds latents, which have no pixels to measure against: name a stored --reference")
        return self.images

    def x0(self, index: Tensor | slice, device: torch.device | str = "cpu") -> Tensor:
        """What denoisers work on: float32 [B, C, H, W] in [-1, 1] of images, latents as they are."""
        return self._scaled(self.images[index], device)

    def _scaled(self, images: Tensor, device: torch.device | str) -> Tensor:
        return from_uint8(images, device) if self.latents is None else images.contiguous().to(device).float()

    def captioned(self, prompts: list[str]) -> Data:
        """The same images, each labelled with the place of its caption among ``prompts``; unchanged where there are labels and no
        caption is a prompt. ValueError for a caption that is none of them."""
        place = {prompt: i for i, prompt in enumerate(prompts)}
        strangers = [caption for caption in self.captions or [] if caption.strip() not in place]
        if strangers and self.labels is not None and len(strangers) == len(self.captions or []):
            return self
        if strangers:
            raise ValueError(
                f"{self.name}: the caption {strangers[0]!r} is none of the teacher's {len(prompts)} prompts: a line of prompts=FILE "
                "for each caption is accepted"
            )
        labels = torch.tensor([place[caption.strip()] for caption in self.captions or []])
        stream = None if self.stream is None else self.stream.captioned(place)
        return replace(self, labels=labels, stream=stream, known_classes=len(prompts))

    def walk(
        self, block: int, most: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[int, Tensor, Tensor | None, list[str] | None]]:
        """The set once, or its first ``most``, in order and never flipped: (number, images, labels, captions) of every ``world``-th
        block of about ``block`` images, from ``rank`` on."""
        if self.stream is None:
            count = min(len(self.images), most or len(self.images))
            for number, start in list(enumerate(range(0, count, block)))[rank::world]:
                part = slice(start, min(start + block, count))
                labels, captions = (None if known is None else known[part] for known in (self.labels, self.captions))
                yield number, self.images[part], labels, captions  # type: ignore[misc]
            return
        for number, kept in walk(self.stream.source, self.stream.form, block, most, rank, world):
            records = [record for record, _ in kept]
            labels = None if self.labels is None else torch.tensor([record.label for record in records])
            captions = None if self.captions is None else [record.caption or "" for record in records]
            yield number, torch.from_numpy(np.stack([pixels for _, pixels in kept])), labels, captions

    def batches(
        self,
        shares: Shares,
        seed: int,
        phase: str,
        device: torch.device,
        conditional: bool = True,
        null: int | None = None,
        null_probability: float = 0.0,
    ) -> Batches:
        """Microbatches (x0, {"labels"}) from any step on, drawn with replacement as a function of (seed, phase, step); of a stream
        see `Stream.microbatches`.

        Labels are replaced by ``null`` with ``null_probability``, the dropout that classifier-free guidance needs.
        """

        def stream(step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
            generator = torch.Generator()
            flow = None if self.stream is None else self.stream.microbatches(shares, seed, phase, step)
            while True:
                for turn in range(shares.accumulate):
                    rng = Rng(generator.manual_seed(seed_of(seed, phase, step, "data")), shares.batch_size, shares.rows(turn))
                    index = rng.integers(len(self.images))
                    images, labels = self._drawn(index) if flow is None else next(flow)
                    x0 = self._scaled(images, device)
                    cond = {}
                    if conditional and labels is not None:
                        if null is not None and null_probability:
                            labels = torch.where(rng.uniform() < null_probability, null, labels)
                        cond = {"labels": labels.to(device)}
                    if self.flip:
                        mirrored = (rng.uniform() < 0.5).to(device)
                        x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
                    yield x0, cond
                step += 1

        return stream

    def _drawn(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.images[index], None if self.labels is None else self.labels[index]


def load(spec: str) -> Data:
    """The data set a spec names. ValueError in one line that says what is accepted."""
    kind, where, options = _parse(spec)
    flip = "flip" in options
    if kind == "digits":
        from teachers.digits import digits

        return Data("digits", *digits(), flip=flip)
    if kind == "latents":
        latents, labels, captions, index = stored.read_latents(Path(where))
        return Data(Path(where).absolute().name, latents, labels, captions, latents=index)
    if kind == "npz":
        return Data(Path(where).stem, *stored.read_npz(Path(where)), flip=flip)
    if kind in folders.TORCHVISION:
        return Data(kind, *folders.read_torchvision(kind, where, "download" in options), flip=flip)
    return replace(_decoded(_source(kind, where, options), options), flip=flip)


def _source(kind: str, where: str, options: dict[str, str]) -> Source:
    if kind == "hf":
        return hub.hub_source(where, options, "stream" in options)
    if kind == "wds":
        return shards.shards_source(where, int(options["classes"]) if "classes" in options else None)
    return folders.folder_source(Path(where))


def _decoded(source: Source, options: dict[str, str]) -> Data:
    form = form_of(source, int(options["size"]) if "size" in options else None)
    held = int(options["stream"]) if "stream" in options else None
    found = read_all(source, form, held)
    labels = None if found.labels is None else torch.tensor(found.labels)
    if labels is not None and (labels.min() < 0 or (source.classes is not None and labels.max() >= source.classes)):
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise ValueError(f"{source.name}: label {wrong}: accepted are 0 to classes - 1, classes is {source.classes}")
    images = torch.from_numpy(found.images)
    if held is None:
        return Data(source.name, images, labels, found.captions, known_classes=source.classes)
    if labels is not None and source.classes is None:
        raise ValueError(f"{source.name}: a stream with labels does not show how many classes there are: add classes=N")
    stream = Stream(source, form, held, labels is not None)
    return Data(f"{source.name}, first {len(images)}", images, labels, found.captions, False, None, stream, source.classes)


def _parse(spec: str) -> tuple[str, str, dict[str, str]]:
    """Kind, place and options. ValueError where the kind is unknown or does not take an option."""
    where, *rest = [spec] if Path(spec).exists() else re.split(r",(?![^{]*\})", spec)
    options = dict(text.partition("=")[::2] for text in rest)
    prefix, colon, place = where.partition(":")
    path = Path(where)
    if where == "digits":
        kind = "digits"
    elif colon and place and (prefix in ("hf", "wds") or prefix in folders.TORCHVISION):
        kind, where = prefix, place
    elif where and path.is_dir():
        kind = "latents" if stored.is_latents(path) else "folder"
    elif path.suffix == ".npz" and path.is_file():
        kind = "npz"
    else:
        raise ValueError(f"unknown data {spec!r}: accepted are {ACCEPTED}")
    for key, value in options.items():
        fits = not value if key in SWITCHES else value.isdigit() and int(value) > 0 if key in NUMBERS else bool(value)
        if key not in OPTIONS[kind] or not fits:
            takes = ", ".join(sorted(k if k in SWITCHES else f"{k}=..." for k in OPTIONS[kind])) or "none"
            raise ValueError(f"data {spec!r}: {key!r} is no option of {kind} ({takes}): accepted are {ACCEPTED}")
    return kind, where, options
