"""What becomes of the features of one cell: all of them on the main process for every metric, or only their sums for FID."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol as Contract

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from eval.metrics import Features, Moments, Reference, measure, measure_moments


class Collector(Contract):
    """``add`` is called with each chunk of this process; ``numbers``, on every process, returns the metrics on the main one."""

    def add(self, index: Tensor, labels: Tensor | None, features: Features) -> None: ...

    def numbers(self, accelerator: Accelerator, reference: Reference, images: int, classes: int | None) -> dict: ...


class Whole:
    """Every feature, in the order of its index: FID, KID, IS, precision, recall, to the bit whatever the number of processes."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor | None, Features]] = []

    def add(self, index: Tensor, labels: Tensor | None, features: Features) -> None:
        self.parts.append((index, labels, features))

    def numbers(self, accelerator: Accelerator, reference: Reference, images: int, classes: int | None) -> dict:
        parts = gather_object(self.parts)
        if not accelerator.is_main_process:
            return {}
        index = torch.cat([index for index, _, _ in parts])
        order = index.argsort()
        assert torch.equal(index[order], torch.arange(images)), "an index is missing or stands twice"

        def whole(pick: Callable) -> Tensor | None:
            rows = [pick(part) for part in parts]
            return None if rows[0] is None else torch.cat(rows)[order]

        fid, labels = whole(lambda part: part[2].fid), whole(lambda part: part[1])
        assert fid is not None
        features = Features(fid, whole(lambda part: part[2].logits))
        return measure(features, reference) | _classes(features.logits, labels, classes)


class Sums:
    """Float64 moments of 20 groups: FID and its interval alone, in memory that does not grow with the number of images."""

    def __init__(self) -> None:
        self.moments: Moments | None = None

    def add(self, index: Tensor, labels: Tensor | None, features: Features) -> None:
        new = Moments.of(features.fid, index)
        if self.moments is None:
            self.moments = new
        else:
            self.moments += new

    def numbers(self, accelerator: Accelerator, reference: Reference, images: int, classes: int | None) -> dict:
        moments = self.moments or Moments.of(torch.zeros(0, reference.dimension))
        flat = [
            torch.from_numpy(part).to(accelerator.device, torch.float64) for part in (moments.n, moments.total, moments.outer)
        ]
        n, total, outer = (accelerator.reduce(part).cpu().numpy() for part in flat)
        assert n.sum() == images, "an index is missing or stands twice"
        return measure_moments(Moments(n, total, outer), reference) if accelerator.is_main_process else {}


COLLECTORS: dict[str, Callable[[], Collector]] = {"all": Whole, "fid": Sums}


def _classes(logits: Tensor | None, labels: Tensor | None, classes: int | None) -> dict:
    """By an extractor that scores just these classes: how many images of each it sees, and the part that is what was asked for."""
    if labels is None or logits is None or logits.shape[1] != classes:
        return {"agreement": None}
    seen = logits.argmax(1)
    return {
        "agreement": (seen == labels).float().mean().item(),
        "labels_asked": torch.bincount(labels, minlength=classes).tolist(),
        "labels_seen": torch.bincount(seen, minlength=classes).tolist(),
    }
